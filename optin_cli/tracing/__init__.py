"""Proposing a table for an unknown architecture from its autograd graph."""
