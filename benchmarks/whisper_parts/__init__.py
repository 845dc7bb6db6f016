"""The parts of benchmarks/whisper.py."""
