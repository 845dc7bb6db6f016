"""Running a model or parts of it: hooks, block calls, replay, caches, memory, MACs."""
