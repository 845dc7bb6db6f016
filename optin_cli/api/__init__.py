"""The library's face: the stages as functions, with the caller's own models and data.

Every function takes a model as it is at hand (`open_model` says which forms there are) and changes none that the caller
holds, unless it is asked to. Options have the names of the command line, in Python spelling.
"""
