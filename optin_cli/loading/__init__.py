"""Models from checkpoints, libraries and open modules."""
