"""Tiny models and data sets that every test shares."""
