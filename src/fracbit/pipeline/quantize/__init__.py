"""Quantizing a model: the schedule, the two loops, and the steps inside a block."""
