"""Run the command line: python -m microvlm."""

from .cli import app

app(prog_name="microvlm")
