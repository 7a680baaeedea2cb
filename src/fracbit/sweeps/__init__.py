"""Sweeps: grids of runs, measured in this process or on Ray and stored as rows."""
