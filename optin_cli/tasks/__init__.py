"""What a model is for: one object a task, with everything that is special about it."""
