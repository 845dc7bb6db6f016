"""The command line: each module parses one command's options, calls one function and prints."""
