"""Training data: files → samples → batches."""
