"""The parts of a model that pruning knows: sites, streams, layers, hidden states."""
