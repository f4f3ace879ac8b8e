"""Read image-caption pairs: parquet, image folders, img2dataset's output."""

import hashlib
import io
import re
from glob import glob
from pathlib import Path

import torch
from datasets import Dataset, Image, load_dataset
from PIL import Image as PILImage

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp")
CAPTION_COLUMNS = ("caption", "text", "txt")
FORMATS = ("parquet", "imagefolder", "webdataset", "files")


class UnreadableRowError(ValueError):
    """A training row without a caption or without a picture that can be decoded."""


def is_copyleft(licence: str) -> bool:
    """True for licences that weights which ship are not trained on (GPL family, Creative Commons share-alike), short or in words."""
    families = (
        r"GPL|GFDL|General Public Licen|Free Documentation Licen|((CC|BY)[-_ ]?|NC[-_ ])SA(?![a-z])|share[-_ ]?alike"
    )
    return bool(re.search(families, licence, re.IGNORECASE))


def guess_format(path: str) -> str:
    """The reader for a path: `.tar`, or a folder with such, is webdataset, `.parquet` is parquet; other folders are image folders by
    their metadata file, or without one pictures with a text file each."""
    if Path(path).is_dir():
        if any(Path(path).glob("*.tar")):
            return "webdataset"
        return "imagefolder" if any(Path(path).rglob("metadata.*")) else "files"
    for suffix, name in ((".parquet", "parquet"), (".tar", "webdataset")):
        if path.endswith(suffix):
            return name
    raise ValueError(
        f"{path}: expected a .parquet file, a .tar of webdataset or a folder of pictures with metadata.jsonl."
    )


def load_rows(
    path: str | list[str], format: str | None = None, exclude_copyleft: bool = False, limit: int | None = None
) -> Dataset:
    """Rows with the columns `image` (undecoded: {"bytes", "path"}) and `caption`, and what else the source has.

    Args:
        path: a file, a glob, a list of files, or a folder: of tars, of pictures with `metadata.jsonl`, of pictures with a text file each.
        format: one of `parquet`, `imagefolder`, `webdataset`, `files`; by default from the path.
        exclude_copyleft: drop rows whose `licence` column states none or a copyleft one.
        limit: keep only the first so many rows.

    Raises:
        FileNotFoundError: no such file, or no file that matches a glob.
        ValueError: unknown format, several image folders, or no picture, caption or (to exclude by) licence column.
    """
    paths = [str(p) for p in (path if isinstance(path, (list, tuple)) else [path])]
    format = format or guess_format(paths[0])
    if format not in FORMATS:
        raise ValueError(f"data format {format!r} is not one of {', '.join(FORMATS)}.")
    for p in paths:
        if not is_remote(p) and not Path(p).exists() and not glob(p, recursive=True):
            raise FileNotFoundError(f"training data {p} does not exist.")
    if format in ("imagefolder", "files"):
        if len(paths) > 1:
            raise ValueError(f"an image folder is one path, got {len(paths)}: {', '.join(paths)}.")
        if format == "files":
            rows = load_files(paths[0])
        else:
            rows = load_dataset("imagefolder", data_dir=paths[0], split="train")
    else:
        files = [str(Path(p) / "*.tar") if Path(p).is_dir() else p for p in paths]
        rows = load_dataset(format, data_files=files, split="train")
    rows = named_columns(rows, paths[0])
    if exclude_copyleft:
        if "licence" not in rows.column_names:
            raise ValueError(
                f"exclude_copyleft needs a licence column; {paths[0]} has only {', '.join(rows.column_names)}."
            )
        keep = [i for i, licence in enumerate(rows["licence"]) if licence and not is_copyleft(licence)]
        rows = rows.select(keep)
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def is_remote(path: str) -> bool:
    """True for `hf://...` and other addresses that `datasets` opens by itself."""
    return "://" in path


def named_columns(rows, source: str):
    """A data set or stream with its picture column as `image`, undecoded, and its text column as `caption`.

    Raises:
        ValueError: it has no such column; the message names `source`.
    """
    if rows.column_names is None:  # a stream that does not say
        rows = rows._resolve_features()
    names = {}
    for target, candidates in (("image", IMAGE_COLUMNS), ("caption", CAPTION_COLUMNS)):
        names[target] = next((c for c in candidates if c in rows.column_names), None)
        if names[target] is None:
            raise ValueError(
                f"{source} has no {target} column: expected one of {', '.join(candidates)}, "
                f"found {', '.join(rows.column_names)}."
            )
    rows = rows.rename_columns({old: new for new, old in names.items() if old != new})
    return rows.cast_column("image", Image(decode=False))


def load_files(folder: str) -> Dataset:
    """Pictures below `folder` with their caption in a text file of the same name, as img2dataset's `files` output has them.

    Raises:
        FileNotFoundError: no picture has one.
    """
    pictures = sorted(p for suffix in IMAGE_COLUMNS[1:] for p in Path(folder).rglob(f"*.{suffix}"))
    pairs = [(str(p), p.with_suffix(".txt")) for p in pictures]
    pairs = [(picture, text.read_text()) for picture, text in pairs if text.exists()]
    if not pairs:
        raise FileNotFoundError(f"{folder} has no picture with a caption in a .txt file of the same name.")
    images, captions = zip(*pairs, strict=True)
    rows = Dataset.from_dict({"image": list(images), "caption": list(captions)})
    states = [(s.st_size, s.st_mtime_ns) for s in (Path(picture).stat() for picture in images)]
    digest = hashlib.sha256(f"{rows._fingerprint} {states}".encode()).hexdigest()
    # in the fingerprint, so that nothing made of other pictures under these names is taken for theirs
    return rows.cast_column("image", Image(), new_fingerprint=digest[:16])


def row_name(row: dict) -> str:
    """How an error message calls a row."""
    names = (row.get("id"), row.get("__key__"), (row.get("image") or {}).get("path"))
    return str(next((name for name in names if name not in (None, "")), "without a name"))


def row_caption(row: dict) -> str:
    """The stripped caption of a row of `load_rows`.

    Raises:
        UnreadableRowError: it has none.
    """
    caption = row.get("caption")
    caption = caption.decode(errors="replace") if isinstance(caption, bytes) else caption
    if not isinstance(caption, str) or not caption.strip():
        raise UnreadableRowError(f"row {row_name(row)} has no caption.")
    return caption.strip()


def caption_length(row: dict) -> int:
    """Characters of a row's caption, 0 without one: batches of similar length need less padding."""
    return len(row["caption"]) if isinstance(row["caption"], (str, bytes)) else 0


def decode_row(row: dict, image_processor) -> tuple[torch.Tensor, str]:
    """Picture (3, height, width) uint8 and caption of a row of `load_rows`.

    Raises:
        UnreadableRowError: no caption, no picture, or a picture that cannot be decoded; the message names the row.
    """
    caption = row_caption(row)
    image = row.get("image") or {}
    if not image.get("bytes") and not image.get("path"):
        raise UnreadableRowError(f"row {row_name(row)} has no picture.")
    try:
        source = io.BytesIO(image["bytes"]) if image.get("bytes") else image["path"]
        with PILImage.open(source) as picture:
            return image_processor.process_image(picture, do_convert_rgb=True), caption
    except (OSError, ValueError, PILImage.DecompressionBombError) as error:
        raise UnreadableRowError(f"row {row_name(row)}: picture cannot be read: {error}") from error


def text_ids(tokenizer, text: str | list[str]) -> list:
    """Token ids of a text, or of several; one that says "<image>" is text: as the placeholder it would ask for another picture."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
