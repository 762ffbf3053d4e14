"""The emoji world, the training set of the small default."""
