"""Sweeps: grids of runs, measured in this process or on Ray, rows into one store."""
