"""Training data: generated data sets, and loaders of published formats."""
