"""Compute vision features once and read them back from disk."""

import copy
import hashlib
import json
import math
from pathlib import Path

import torch
from datasets import Dataset
from filelock import FileLock
from tqdm import tqdm

from ..files import write_json
from .collators import CaptionCollator

BATCH_SIZE = 64
COMPILE_FROM = 10_000  # images; compiling takes as long as 1,000 of them


@torch.inference_mode()
def write_vision_features(vision_tower, collator, rows: Dataset, views: int, file: Path) -> tuple[list[int], list[int]]:
    """Write features in bfloat16 of augmented images into a file; return its shape and the readable rows."""
    tower = copy.deepcopy(vision_tower).eval().to(torch.bfloat16)
    if views * len(rows) >= COMPILE_FROM:
        tower.compile()
    device = next(tower.parameters()).device
    features, readable = None, []
    for view in range(views):
        collator.set_epoch(view)
        for start in tqdm(range(0, len(rows), BATCH_SIZE), desc=f"vision features, view {view + 1} of {views}"):
            # the first view finds out which rows can be read
            indices = (range(len(rows)) if view == 0 else readable)[start : start + BATCH_SIZE]
            pairs = {i: pair for i in indices if (pair := collator.read(rows[i])) is not None}
            if not pairs:
                continue
            # encode
            pixel_values = collator.images([image for image, _ in pairs.values()])["pixel_values"]
            hidden = tower(pixel_values.to(device, torch.bfloat16)).last_hidden_state.cpu()
            # the first batch says how large the file is
            if features is None:
                shape = [views, len(rows), *hidden.shape[1:]]
                features = torch.from_file(str(file), shared=True, size=math.prod(shape), dtype=torch.bfloat16)
                features = features.view(shape)
            place = len(readable) if view == 0 else start
            features[view, place : place + len(pairs)] = hidden
            if view == 0:
                readable += pairs
        if features is None:
            raise RuntimeError(f"none of the {len(rows)} training rows can be read.")
    collator.set_epoch(0)
    return shape, readable


def cache_vision_features(
    vision_tower, collator: CaptionCollator, rows: Dataset, views: int, folder: str, transform: str
) -> tuple[torch.Tensor, Dataset]:
    """Compute the features of a frozen vision tower once, and keep them in a file.

    The file's name is a digest of all that the features depend on, weights included; `transform` describes what the
    collator does to an image. View v is the collator's epoch v. Of several processes one computes, the others wait.

    Returns:
        Features (views, readable rows, tokens, width) in bfloat16, and the rows with `feature_row` instead of images.
    """
    file = Path(folder) / f"vision_{_digest(vision_tower, collator, rows, views, transform)}.bin"
    index_file = file.with_suffix(".json")
    if not index_file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):
            if not index_file.exists():  # another process may have been first
                part = file.with_suffix(".part")
                part.unlink(missing_ok=True)
                shape, readable = write_vision_features(vision_tower, collator, rows, views, part)
                part.replace(file)
                write_json(index_file, {"shape": shape, "rows": readable})
    # map the file
    index = json.loads(index_file.read_text())
    features = torch.from_file(str(file), shared=False, size=math.prod(index["shape"]), dtype=torch.bfloat16)
    rows = rows.select(index["rows"]).remove_columns("image")
    return features.view(index["shape"])[:, : len(rows)], rows.add_column("feature_row", list(range(len(rows))))


def _digest(vision_tower, collator: CaptionCollator, rows: Dataset, views: int, transform: str) -> str:
    # _fingerprint is private in datasets 5.2; tests/test_data.py changes the rows
    made_of = f"{transform} {views} {collator.seed} {rows._fingerprint}"
    digest = hashlib.sha256(made_of.encode())
    digest.update(collator.processor.image_processor.to_json_string().encode())
    for name, tensor in sorted(vision_tower.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:24]
