"""The parts of benchmarks/gpu.py: each is a module with `run(job)`, and runs in a process of its own."""
