"""A fracbit checkpoint in formats that others read. To add one, write its file here and a line in records/tables.py."""
