"""Checkpoints that other programs have quantized, read as the floats that they stand for. One file for each format."""
