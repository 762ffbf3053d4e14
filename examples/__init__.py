"""Worked examples: data sets and what is made with them."""
