"""Tasks: the file format, the shipped set, importers and the admission gate."""
