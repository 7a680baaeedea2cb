"""A fracbit checkpoint in formats of other programs. To add one, write a file here and a line in records/tables.py."""
