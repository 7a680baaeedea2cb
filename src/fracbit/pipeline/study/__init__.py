"""Studies of a float model in memory: what errors and dropped blocks cost. No checkpoint is written."""
