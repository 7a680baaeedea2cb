"""How long work reports where it is: one type for every room, from the command line's bar to a notebook's."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with what is being done, steps done, and steps in all."""
