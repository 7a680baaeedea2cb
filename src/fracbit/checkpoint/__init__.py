"""Checkpoints: sources read lazily, the saved format, atomically written outputs, and the bridge to transformers."""
