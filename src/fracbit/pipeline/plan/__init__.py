"""Planning: which scheme each layer gets within a budget, and what the run will need. Nothing is written."""
