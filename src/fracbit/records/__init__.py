"""Records: schemes, recipes, allocations, rows. Strings and numbers; importing them never imports torch."""
