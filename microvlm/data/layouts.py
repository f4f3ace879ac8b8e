"""Open images with captions in the layouts that people have, as `datasets` rows of `image` and `caption`."""

import csv
import hashlib
import json
from collections.abc import Sequence
from glob import glob
from pathlib import Path

import datasets
from datasets import Dataset, Image, IterableDataset, Value, load_dataset, load_dataset_builder

from ..files import one_line
from ..model import require

IMAGE_FILES = ("jpg", "jpeg", "png", "webp")
IMAGE_COLUMNS = ("image", *IMAGE_FILES, "file_name", "image_path", "path", "filename", "filepath", "image_name")
CAPTION_COLUMNS = ("caption", "text", "txt", "captions", "sentences", "conversations")
SHARDS = {".parquet": "parquet", ".tar": "webdataset", ".arrow": "arrow"}  # streamed
FORMATS = SHARDS | {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".txt": "csv"}
PATHS, IMAGES = ("string", "large_string"), ("struct", "binary", "large_binary", "null")  # types of an image column
TEXTS = (*PATHS, *IMAGES[1:])
MOST_SHARDS = 256  # of a stream of rows that are at hand


def list_paths(path: str | Path | list) -> list[str]:
    """List one path or several."""
    return [str(p) for p in (path if isinstance(path, (list, tuple)) else [path])]


def is_remote(path: str | list[str]) -> bool:
    """Tell whether a path is an address that `datasets` opens, such as `hf://...`."""
    return any("://" in p for p in list_paths(path))


def open_data(path: str | list[str], split: str = "train", streaming: bool = False):
    """Open paths, globs or a folder; of several splits the named one. A stream where the format is one."""
    paths = list_paths(path)
    require(bool(paths), "the data is an empty list of paths.")
    missing = [p for p in paths if not is_remote(p) and not Path(p).exists() and not glob(p, recursive=True)]
    if missing:
        raise FileNotFoundError(f"data {missing[0]} does not exist.")
    places = [] if is_remote(paths) else [Path(f).absolute() for p in paths for f in glob(p, recursive=True) or [p]]
    folders = [p for p in map(Path, paths) if p.is_dir() and not any(p.glob("*.tar"))]
    require(len(paths) == 1 or not folders, f"an image folder is one path, got {len(paths)}: {', '.join(paths)}.")
    files = [str(Path(p) / "*.tar") if Path(p).is_dir() else p for p in paths]
    try:
        rows = open_folder(folders[0], split, streaming) if folders else open_files(files, streaming)
    except (datasets.exceptions.DatasetGenerationError, StopIteration, ValueError) as error:
        reason = one_line(str(error.__cause__ or error)) or "it is empty."
        if paths[0] in reason:
            raise
        raise ValueError(f"{paths[0]} cannot be read: {reason}") from error
    return named_columns(rows, paths[0], places)


def open_folder(folder: Path, split: str, streaming: bool):
    """Open a folder by what it holds."""
    if (folder / "dataset_dict.json").exists():  # `save_to_disk`, of several splits
        folder /= one_split(json.loads((folder / "dataset_dict.json").read_text())["splits"], split, folder)
    if (folder / "state.json").exists():
        return datasets.load_from_disk(folder).with_format(None)
    files = [p for p in sorted(folder.rglob("*")) if not any(n.startswith(".") for n in p.relative_to(folder).parts)]
    described = [p for p in files if p.name in ("metadata.jsonl", "metadata.csv", "metadata.parquet")]
    if any(b"file_name" in p.read_bytes() for p in described):
        rows = load_dataset("imagefolder", data_dir=str(folder))
        return rows[one_split(rows, split, folder)]
    # as img2dataset writes them
    if images := [p for p in files if p.suffix.lower()[1:] in IMAGE_FILES and p.with_suffix(".txt").exists()]:
        captions = [image.with_suffix(".txt").read_text() for image in images]
        return Dataset.from_dict({"image": [str(image.absolute()) for image in images], "caption": captions})
    if shards := [str(p) for p in files if p.suffix in SHARDS]:  # as on the Hub
        splits = load_dataset_builder(str(folder)).config.data_files
        chosen = [p for p in splits[one_split(splits, split, folder)] if Path(p).suffix in SHARDS]
        return open_files(chosen or shards, streaming)
    # a table of paths and captions
    tables = [p for p in files if p.suffix.lower() in (".csv", ".tsv", ".jsonl", ".json") or p.name == "captions.txt"]
    for word in ("caption", "val" if split == "validation" else split):
        tables = [p for p in tables if word in str(p.relative_to(folder))] or tables
    several = f"several tables, name one: {', '.join(map(str, tables))}"
    none = "no captions: expected parquet, tars, a table of paths and texts, or images with .txt files next to them"
    require(len(tables) == 1, f"{folder} has {several if tables else none}.")
    return open_files([str(tables[0])], streaming)


def one_split(splits, split: str, folder: str | Path) -> str:
    """Choose a split by name, or the only one."""
    names = list(map(str, splits))
    found = f"{folder} has the splits {', '.join(names)}, none of them {split}: name the files or the folder of one."
    require(split in names or len(names) == 1, found)
    return split if split in names else names[0]


def open_files(paths: list[str], streaming: bool):
    """Open files of one format."""
    suffixes = {Path(p).suffix.lower() for p in paths}
    suffix = suffixes.pop()
    expected = f"expected files of one format of {', '.join(FORMATS)}, or a folder."
    require(not suffixes and suffix in FORMATS, f"{paths[0]}: {expected}")
    if suffix == ".json" and len(paths) == 1 and (rows := read_json(Path(paths[0]))):
        return rows
    options = {"streaming": streaming and suffix in SHARDS}
    if FORMATS[suffix] == "csv":  # the caption "None" is a text; in .tsv quotes are, too
        options |= {"keep_default_na": False} | ({"sep": "\t", "quoting": csv.QUOTE_NONE} if suffix == ".tsv" else {})
    return load_dataset(FORMATS[suffix], data_files=paths, split="train", **options)


def read_json(path: Path) -> Dataset | None:
    """Read COCO's captions or a list of rows; None of other JSON, which may be a line a row."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, OSError):  # JSON lines, a glob
        return None
    if isinstance(content, dict):
        if not {"images", "annotations"} <= content.keys():
            return None
        licences = {licence["id"]: licence["name"] for licence in content.get("licenses") or []}
        images = {i["id"]: i | {"licence": licences.get(i.get("license"))} for i in content["images"]}
        content = [images.get(row.get("image_id"), {}) | row for row in content["annotations"]]
    known = isinstance(content, list) and all(isinstance(row, dict) for row in content)
    require(known, f"{path} is neither rows nor COCO's images and annotations.")
    columns = {name: [row.get(name) for row in content] for name in {name: 0 for row in content for name in row}}
    return Dataset.from_dict(columns, on_mixed_types="use_json")


def named_columns(rows, source: str, places: Sequence[Path] = ()):
    """Name the columns of a data set or stream `image`, undecoded, and `caption`, a row for each of several."""
    if rows.column_names is None:  # a stream of unknown columns
        rows = rows._resolve_features()  # private in datasets 5.2; tests/test_stream.py reads tars through it
    names, columns = {}, {name.lower(): name for name in reversed(rows.column_names)}
    for target, candidates in (("image", IMAGE_COLUMNS), ("caption", CAPTION_COLUMNS)):
        expected, found = ", ".join(candidates), ", ".join(rows.column_names)
        column = next((columns[c] for c in candidates if c in columns), None)
        require(column is not None, f"{source} has no {target} column: expected one of {expected}, found {found}.")
        names |= {} if column == target else {column: target}
    rows = rows.rename_columns(names)
    # what the columns hold
    image, caption = rows.features["image"], rows.features["caption"]
    kind = "struct" if isinstance(image, (Image, dict)) else getattr(image, "dtype", None)
    require(kind in (*PATHS, *IMAGES), f"{source} has neither images nor paths in its image column, but {image}.")
    text = getattr(caption, "feature", None if isinstance(caption, dict) else caption)  # of a list
    known = {"from", "value"} <= text.keys() if isinstance(text, dict) else getattr(text, "dtype", None) in TEXTS
    require(known, f"{source} has neither texts nor conversations in its caption column, but {caption}.")
    if kind in PATHS:
        require(places, f"{source} holds the paths of images without the images.")
        require(len({p.parent for p in places}) == 1, f"{source} and others hold paths of images: name one folder's.")
        rows = join_paths(rows, min(places))
    rows = rows.cast_column("image", Image(decode=False))
    return rows if isinstance(caption, Value) else caption_rows(rows)


def join_paths(rows, place: Path):
    """Join the paths of images to the folder that they start from: the table's, or one in it."""
    base = place if place.is_dir() else place.parent
    base = base.parent if base.name == "annotations" else base  # COCO's
    roots = [base, *sorted(p for p in base.iterdir() if p.is_dir()), Path()]
    names = [row["image"] for row in rows.select_columns("image").take(100) if row["image"]]
    found = [root for root in roots if any((root / name).is_file() for name in names)]
    require(found or not names, f"{place} names {''.join(names[:1])}, which is no file in {base} or in a folder of it.")
    several = f"{place} names images that are in {' and in '.join(map(str, found[:2]))}: name them from {base}."
    require(len(found) < 2 or found[0] == base or found[1] == Path(), several)
    root = found[0] if found else base
    if isinstance(rows, IterableDataset):
        features = datasets.Features(rows.features | {"image": Image(decode=False)})
        return rows.map(lambda row: {"image": row["image"] and {"path": str(root / row["image"])}}, features=features)
    images = [name and root / name for name in rows["image"]]
    rows = rows.remove_columns("image").add_column("image", [image and str(image) for image in images])
    # into the fingerprint: caches of other images under these names are not taken (_fingerprint: datasets 5.2)
    states = [(s.st_size, s.st_mtime_ns) for s in (image.stat() for image in images if image and image.exists())]
    digest = hashlib.sha256(f"{rows._fingerprint} {states}".encode()).hexdigest()
    return rows.cast_column("image", Image(), new_fingerprint=digest[:16])


def caption_list(value) -> list[str | None]:
    """List a row's captions; of a conversation the first answer."""
    if value and isinstance(value[0], dict):
        value = [turn["value"] for turn in value if turn["from"] in ("gpt", "assistant")][:1]
    return value or [None]


def caption_rows(rows):
    """Give every caption of a list a row of its own."""
    if isinstance(rows, IterableDataset):

        def split(batch: dict) -> dict:
            pairs = [(i, caption) for i, value in enumerate(batch["caption"]) for caption in caption_list(value)]
            columns = {name: [values[i] for i, _ in pairs] for name, values in batch.items()}
            return columns | {"caption": [caption for _, caption in pairs]}

        features = datasets.Features(rows.features | {"caption": Value("string")})
        return rows.map(split, batched=True, batch_size=32, features=features)
    # first captions, second captions, ...: the images are not copied
    captions, parts = list(map(caption_list, rows["caption"])), []
    for k in range(max(map(len, captions), default=1)):
        column = [c[k] if k < len(c) else None for c in captions]
        part = rows.remove_columns("caption").add_column("caption", column, feature=Value("string"))
        parts.append(part.select([i for i, c in enumerate(captions) if k < len(c)]))
    return datasets.concatenate_datasets(parts)
