"""Masks become smaller weights: slice, check against the masked model, write, load back, check again."""
