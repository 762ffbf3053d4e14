"""Where training samples come from: what is made here, and the loaders of published formats."""
