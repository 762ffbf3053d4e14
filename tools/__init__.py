"""Commands that make or convert files; README.md lists them."""
