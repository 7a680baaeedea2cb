"""Studies of a float model in memory: what errors and dropped blocks cost. Only prune.py writes a checkpoint."""
