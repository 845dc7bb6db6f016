"""Measure a model's cost (latency, memory, MACs, bytes) and quality (metrics, fidelity, gates)."""
