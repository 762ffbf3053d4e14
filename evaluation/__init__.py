"""Benchmarks of a checkpoint: official files in, official submissions and scores out (`evaluate.py`)."""
