"""Tasks of lmms-eval on pictures that ship with this repo."""
