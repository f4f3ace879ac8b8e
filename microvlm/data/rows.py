"""Read and decode image-caption pairs."""

import re

import torch
from datasets import Dataset

from ..files import one_line
from ..model import PIXEL_LIMIT, open_image, require
from .layouts import is_remote, open_data
from .stream import is_hub_dataset, load_stream, take_rows

COPYLEFT = r"GPL|GFDL|General Public Licen|Free Documentation Licen|((CC|BY)[-_ ]?|NC[-_ ])SA(?![a-z])|share[-_ ]?alike"


class UnreadableRowError(ValueError):
    """A training row without a caption or without an image that can be decoded."""


def is_copyleft(licence: str) -> bool:
    """Tell whether a licence, short or in words, is copyleft (GPL family, Creative Commons share-alike)."""
    return bool(re.search(COPYLEFT, licence, re.IGNORECASE))


def load_rows(path: str | list[str], exclude_copyleft=False, limit=None, split="train", revision=None) -> Dataset:
    """Load rows with the columns `image` (undecoded: {"bytes", "path"}) and `caption` in any layout, or of the Hub."""
    if is_remote(path) or is_hub_dataset(path):
        limits = "--limit, or validation_limit in a recipe"
        require(limit is not None, f"{path} is no file or folder; as a data set of the Hub it needs {limits}.")
        rows = take_rows(load_stream(path, revision, split), limit)
    else:
        rows = open_data(path, split)
    if exclude_copyleft:
        columns = ", ".join(rows.column_names)
        require("licence" in rows.column_names, f"exclude_copyleft needs a licence column; {path} has only {columns}.")
        rows = rows.select([i for i, licence in enumerate(rows["licence"]) if licence and not is_copyleft(licence)])
    require(len(rows) > 0, f"{path} has no rows.")
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def row_name(row: dict) -> str:
    """Name a row for an error message."""
    names = (row.get("id"), row.get("__key__"), (row.get("image") or {}).get("path"))
    return one_line(str(next((name for name in names if name not in (None, "")), "without a name")))


def row_caption(row: dict) -> str:
    """Return the stripped caption of a row of `load_rows`."""
    caption = row.get("caption")
    caption = caption.decode(errors="replace") if isinstance(caption, bytes) else caption
    if not isinstance(caption, str) or not caption.strip():
        raise UnreadableRowError(f"row {row_name(row)} has no caption.")
    return caption.strip()


def decode_row(row: dict, image_processor) -> tuple[torch.Tensor, str]:
    """Decode image (3, height, width) uint8 and caption of a row, or raise UnreadableRowError."""
    caption = row_caption(row)
    image = row.get("image") or {}
    if not image.get("bytes") and not image.get("path"):
        raise UnreadableRowError(f"row {row_name(row)} has no picture.")
    try:
        image = open_image(image, getattr(image_processor, "pixel_limit", PIXEL_LIMIT))
        return image_processor.process_image(image, do_convert_rgb=False), caption
    except (OSError, ValueError) as error:
        raise UnreadableRowError(f"row {row_name(row)}: picture cannot be read: {one_line(str(error))}") from error


def ordinary_tokens(tokenizer) -> list[int]:
    """List the tokens that are no control tokens, in their order."""
    return sorted(set(range(len(tokenizer))) - set(tokenizer.added_tokens_decoder))


def text_ids(tokenizer, text: str | list[str]) -> list:
    """Tokenize a text, or several, as text: a written "<image>" is no placeholder."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
