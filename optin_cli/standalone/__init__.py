"""The code that a pruned directory carries, so that it opens without optin.

`from_transformers` or `from_vision` begins a `modeling_optin.py`, then comes `sizes`, and each of the other files where
a model needs it. They import the libraries alone, and optin runs the same code. `loading.standalone_file` puts them
together.
"""
