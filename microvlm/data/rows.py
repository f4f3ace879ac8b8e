"""Read image-caption pairs: parquet, image folders, img2dataset's output."""

import hashlib
import re
from glob import glob
from pathlib import Path

import torch
from datasets import Dataset, Image, load_dataset

from ..files import one_line
from ..model import PIXEL_LIMIT, open_image, require

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp")
CAPTION_COLUMNS = ("caption", "text", "txt")
FORMATS = {".parquet": "parquet", ".tar": "webdataset"}
WANTED = "write metadata.jsonl beside the pictures, a line of file_name and caption each"
HINTS = {  # what people have instead, by the ending of a file
    ".parquet": "parquet files: name them, as FOLDER/**/train-*.parquet",
    ".arrow": "what `save_to_disk` wrote: write it with `to_parquet`",
    ".csv": f"a table: {WANTED}, or metadata.csv",
    ".json": f"JSON, as COCO and LLaVA have it: {WANTED}",
    ".jsonl": f"JSON lines: {WANTED}",
    ".txt": f"captions in one text file: {WANTED}",
}
COPYLEFT = r"GPL|GFDL|General Public Licen|Free Documentation Licen|((CC|BY)[-_ ]?|NC[-_ ])SA(?![a-z])|share[-_ ]?alike"


class UnreadableRowError(ValueError):
    """A training row without a caption or without an image that can be decoded."""


def is_copyleft(licence: str) -> bool:
    """Tell whether a licence, short or in words, is copyleft (GPL family, Creative Commons share-alike)."""
    return bool(re.search(COPYLEFT, licence, re.IGNORECASE))


def list_paths(path: str | Path | list) -> list[str]:
    """List one path or several."""
    return [str(p) for p in (path if isinstance(path, (list, tuple)) else [path])]


def is_remote(path: str | list[str]) -> bool:
    """Tell whether a path is an address that `datasets` opens, such as `hf://...`."""
    return any("://" in p for p in list_paths(path))


def check_sources(paths: list[str]) -> None:
    """Raise FileNotFoundError for a local path or glob without a file, ValueError without any path."""
    require(bool(paths), "the data is an empty list of paths.")
    for path in paths:
        if not is_remote(path) and not Path(path).exists() and not glob(path, recursive=True):
            raise FileNotFoundError(f"data {path} does not exist.")


def load_rows(path: str | list[str], exclude_copyleft: bool = False, limit: int | None = None) -> Dataset:
    """Load rows with the columns `image` (undecoded: {"bytes", "path"}) and `caption`.

    A path is a .parquet or .tar of webdataset, a glob or a list of them; or a folder of tars, of images with
    `metadata.jsonl`, or of images with text files.
    """
    paths = list_paths(path)
    check_sources(paths)
    first = Path(paths[0])
    # read
    if first.is_dir() and not any(first.glob("*.tar")):
        require(len(paths) == 1, f"an image folder is one path, got {len(paths)}: {', '.join(paths)}.")
        described = any(first.rglob("metadata.*"))
        rows = load_dataset("imagefolder", data_dir=paths[0], split="train") if described else load_files(first)
    else:
        format = FORMATS.get(".tar" if first.is_dir() else first.suffix)
        expected = "expected a .parquet file, a .tar of webdataset or a folder of pictures with metadata.jsonl."
        require(format is not None, held(first, [first], f"{first}: {expected}"))
        files = [str(Path(p) / "*.tar") if Path(p).is_dir() else p for p in paths]
        rows = load_dataset(format, data_files=files, split="train")
    rows = named_columns(rows, paths[0])
    # choose
    if exclude_copyleft:
        columns = ", ".join(rows.column_names)
        require("licence" in rows.column_names, f"exclude_copyleft needs a licence column; {first} has only {columns}.")
        rows = rows.select([i for i, licence in enumerate(rows["licence"]) if licence and not is_copyleft(licence)])
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def held(path: Path, files: list[Path], otherwise: str) -> str:
    """Say what a source that is not read holds instead, and what to do."""
    hints = (HINTS[file.suffix] for file in files if file.suffix in HINTS)
    return f"{path} holds {hint}." if (hint := next(hints, None)) else otherwise


def named_columns(rows, source: str):
    """Name the columns of a data set or stream `image`, undecoded, and `caption`."""
    if rows.column_names is None:  # a stream of unknown columns
        rows = rows._resolve_features()  # private in datasets 5.2; tests/test_stream.py reads tars through it
    names = {}
    for target, candidates in (("image", IMAGE_COLUMNS), ("caption", CAPTION_COLUMNS)):
        expected, columns = ", ".join(candidates), ", ".join(rows.column_names)
        column = next((c for c in candidates if c in rows.column_names), None)
        require(column is not None, f"{source} has no {target} column: expected one of {expected}, found {columns}.")
        names |= {} if column == target else {column: target}
    rows = rows.rename_columns(names)
    return rows.cast_column("image", Image(decode=False))


def load_files(folder: Path) -> Dataset:
    """Load images with captions in text files of the same name, as img2dataset writes them."""
    files = sorted(folder.rglob("*"))
    images = [p for p in files if p.suffix.lower()[1:] in IMAGE_COLUMNS[1:] and p.with_suffix(".txt").exists()]
    if not images:
        problem = f"{folder} has no picture with a caption in a .txt file of the same name."
        raise FileNotFoundError(held(folder, files, problem))
    captions = [image.with_suffix(".txt").read_text() for image in images]
    rows = Dataset.from_dict({"image": list(map(str, images)), "caption": captions})
    # into the fingerprint: caches of other images under these names are not taken (_fingerprint: datasets 5.2)
    states = [(s.st_size, s.st_mtime_ns) for s in (image.stat() for image in images)]
    digest = hashlib.sha256(f"{rows._fingerprint} {states}".encode()).hexdigest()
    return rows.cast_column("image", Image(), new_fingerprint=digest[:16])


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


def caption_length(row: dict) -> int:
    """Count the characters of a row's caption; batches of similar length need less padding."""
    return len(row["caption"]) if isinstance(row["caption"], (str, bytes)) else 0


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


def text_ids(tokenizer, text: str | list[str]) -> list:
    """Tokenize a text, or several, as text: a written "<image>" is no placeholder."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
