"""The version of fracbit, in a file of its own torch-free, so that every package and the build may read it."""

__version__ = "0.2.0.dev0"
