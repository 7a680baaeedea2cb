"""Quantizing a model: what will be written, the two loops, and everything that happens inside a block."""
