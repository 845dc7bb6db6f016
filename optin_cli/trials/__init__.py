"""Many budgets of one model: prune to each, measure it, keep it as a point, and choose among the points."""
