"""Mutate files and inputs, and check that nothing crashes."""
