"""Reports: fits, Pareto fronts and the page, made only from rows; torch is never imported."""
