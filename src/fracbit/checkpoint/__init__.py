"""Checkpoints: sources read lazily, the saved format, outputs written whole or not at all, the bridge to transformers."""
