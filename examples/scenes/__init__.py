"""The scene world: icons on a ground, with the exact truth of everything that is said about them."""
