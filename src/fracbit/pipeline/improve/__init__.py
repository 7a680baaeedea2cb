"""Checkpoints that other programs have quantized, made better without leaving their format."""
