"""Tools for MicroVLM. The model's own modules lie next to config.json, where the Hub loads them from."""

from pathlib import Path

_root = Path(__file__).resolve().parent.parent
if (_root / "modeling_microvlm.py").exists():  # a checkout; a wheel has the model's modules in this folder
    __path__.append(str(_root))
