"""What is prunable in a model: the vocabulary (anatomy), the tables (families), and how models are opened."""
