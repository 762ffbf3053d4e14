"""What every entry point shares: configuration, tracking, errors. Knows nothing of models or training."""
