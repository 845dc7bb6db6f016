"""A model with fewer tokens: which ones data needs, the tokenizer and the weights without the others."""
