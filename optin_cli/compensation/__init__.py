"""Refitting the layers around pruned units by least squares."""
