"""The formats that a pruned model can be written in: each is a writer that saves, loads back and compares."""
