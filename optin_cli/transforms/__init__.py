"""Changes to a model: masking, slicing, merging of tokens."""
