"""Reading picture-caption pairs."""

import re
from pathlib import Path


def is_copyleft(licence: str) -> bool:
    """True for licences that weights which ship must not be trained on (GPL family, CC-BY-SA)."""
    return bool(re.search(r"GPL|GFDL|-SA\b", licence))


def load_pairs(path):
    from datasets import load_dataset

    yield from load_dataset("parquet", data_files=str(path), split="train")
