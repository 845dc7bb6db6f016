"""What a model costs (latency, memory, MACs, bytes) and how good it still is (metrics, fidelity, gates)."""
