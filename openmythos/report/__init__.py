"""The page of a run: curves, tables and samples."""
