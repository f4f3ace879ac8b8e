"""Mutate files and inputs, and look whether anything falls over."""
