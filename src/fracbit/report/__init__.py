"""Reports: fits, fronts and the page, made from rows alone; torch is never imported."""
