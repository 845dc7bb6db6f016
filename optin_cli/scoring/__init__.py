"""Trajectory importance (OPTIN): anatomy + batches -> a score for every unit. No labels, no weight gradients."""
