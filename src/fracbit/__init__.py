"""fracbit: compress a language model to any average bit width and see what each bit buys."""

__version__ = "0.1.0"
