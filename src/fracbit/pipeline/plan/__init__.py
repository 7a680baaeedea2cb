"""Planning: what a budget buys, who gets which scheme, and what the run will need. Nothing is written."""
