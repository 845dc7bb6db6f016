"""Propose a family table for a model that is in none: watch it run, try what can be removed, write down what held."""
