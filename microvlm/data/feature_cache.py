"""Compute vision features once and read them back from disk."""

import hashlib
import json
import math
from pathlib import Path

import torch
from datasets import Dataset
from filelock import FileLock
from tqdm import tqdm

from .collators import CaptionCollator


@torch.inference_mode()
def write_vision_features(
    vision_tower, collator: CaptionCollator, rows: Dataset, views: int, file: Path, batch_size: int
) -> tuple[list[int], list[int]]:
    """Features of `views` augmentations of every picture into a file.

    Returns:
        The shape of what the file holds, (views, rows, tokens, width) in bfloat16, and the indices of the rows that could be read:
        they fill the first places of every view.
    """
    device = next(vision_tower.parameters()).device
    features, readable = None, []
    for view in range(views):
        collator.set_epoch(view)
        for start in tqdm(range(0, len(rows), batch_size), desc=f"vision features, view {view + 1} of {views}"):
            chunk = (range(len(rows)) if view == 0 else readable)[start : start + batch_size]
            found = {i: pair for i in chunk if (pair := collator.read(rows[i])) is not None}
            if not found:
                continue
            pixel_values = collator.pictures([picture for picture, _ in found.values()])["pixel_values"].to(device)
            with torch.autocast(device.type, torch.bfloat16):
                hidden = vision_tower(pixel_values).last_hidden_state.to("cpu", torch.bfloat16)
            if features is None:
                shape = [views, len(rows), *hidden.shape[1:]]
                features = torch.from_file(str(file), shared=True, size=math.prod(shape), dtype=torch.bfloat16)
                features = features.view(shape)
            at = len(readable) if view == 0 else start
            features[view, at : at + len(found)] = hidden
            if view == 0:
                readable += found
        if features is None:
            raise RuntimeError(f"none of the {len(rows)} training rows can be read.")
    collator.set_epoch(0)
    return shape, readable


def cache_vision_features(
    vision_tower,
    collator: CaptionCollator,
    rows: Dataset,
    views: int,
    folder: str,
    transform: str,
    batch_size: int = 64,
) -> tuple[torch.Tensor, Dataset]:
    """Features of a frozen vision tower for `views` augmentations of every picture, kept in a file.

    The file is named after a digest of all that the features depend on, the tower's weights included: with another model,
    transform or data set it is made anew, never taken for theirs. Of several processes that need it at once one makes it, the others wait.

    Args:
        vision_tower: pictures (N, 3, height, width) -> `last_hidden_state` (N, tokens, width).
        collator: reads and augments the pictures; view v is its epoch v.
        rows: of `load_rows`.
        folder: where the files are; made if needed.
        transform: describes what `collator` does to a picture.

    Returns:
        The features (views, readable rows, tokens, width) in bfloat16, mapped from the file, and the readable rows without their
        picture, with a column `feature_row`.

    Raises:
        RuntimeError: no row, or too few, can be read.
    """
    digest = hashlib.sha256(f"{transform} {views} {collator.seed} {collator.size} {rows._fingerprint}".encode())
    digest.update(collator.processor.image_processor.to_json_string().encode())
    for name, tensor in sorted(vision_tower.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    file = Path(folder) / f"vision_{digest.hexdigest()[:24]}.bin"
    index_file = file.with_suffix(".json")
    if not index_file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):
            if not index_file.exists():
                part = file.with_suffix(".part")
                part.unlink(missing_ok=True)
                training = vision_tower.training
                vision_tower.eval()
                shape, readable = write_vision_features(vision_tower, collator, rows, views, part, batch_size)
                vision_tower.train(training)
                part.replace(file)
                index_part = index_file.with_suffix(".json.part")
                index_part.write_text(json.dumps({"shape": shape, "rows": readable}))
                index_part.replace(index_file)
    index = json.loads(index_file.read_text())
    features = torch.from_file(str(file), shared=False, size=math.prod(index["shape"]), dtype=torch.bfloat16)
    kept = rows.select(index["rows"]).remove_columns("image")
    features = features.view(index["shape"])[:, : len(kept)]
    return features, kept.add_column("feature_row", list(range(len(kept))))
