"""The operators, one folder each with the same file names."""
