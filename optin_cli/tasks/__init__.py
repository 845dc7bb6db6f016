"""Tasks: the purpose of a model, with its output, labels, loss and metrics. One class a task."""
