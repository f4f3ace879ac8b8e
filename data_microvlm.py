"""Picture-caption pairs for training and evaluation: parquet, image folders, webdataset tars, the output of img2dataset.

All come through `datasets`, with pictures left as bytes: one that cannot be decoded is then skipped, named and
counted by the collator instead of ending the run, until more than a stated share of the rows is bad.
"""

import hashlib
import io
import json
import logging
import math
import random
import re
import zlib
from collections import defaultdict
from glob import glob
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset, Image, load_dataset
from filelock import FileLock
from PIL import Image as PILImage
from tqdm import tqdm

logger = logging.getLogger(__name__)

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp")
CAPTION_COLUMNS = ("caption", "text", "txt")
FORMATS = ("parquet", "imagefolder", "webdataset", "files")
MIN_ROWS_BEFORE_STOP = 100  # a share over fewer rows says little


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


class CaptionCollator:
    """Rows -> batch: `<prompt with the picture><caption><eos>`, loss on the caption and the end only.

    Args:
        processor: a `MicroVLMProcessor`.
        prompt_ids: the prompt with all placeholders, from `model.default_prompt`.
        augment: a function on a batch of pictures (B, 3, height, width) in [0, 1], training only. What it draws depends
            on the seed, the epoch and the batch alone: a resumed run sees what an uninterrupted one does, however far
            ahead a loader reads.
        image_size: side of the pictures, the processor's own by default.
        max_unreadable_share: training stops when more rows than this cannot be read.
        seed: of the augmentation.
        max_caption_tokens: a longer caption is cut to so many tokens, and then has no end token to learn; default: none is cut.

    Attributes:
        seen, unreadable: rows so far, counted over all workers of a data loader.

    Raises:
        RuntimeError: too many unreadable rows, or a batch with none that can be read.
    """

    def __init__(
        self,
        processor,
        prompt_ids: list[int],
        augment=None,
        image_size=None,
        max_unreadable_share: float = 0.01,
        seed: int = 0,
        max_caption_tokens: int | None = None,
    ):
        self.processor = processor
        self.prompt_ids = list(prompt_ids)
        self.augment = augment
        self.size = None if image_size is None else {"height": image_size, "width": image_size}
        self.max_unreadable_share = max_unreadable_share
        self.seed = seed
        self.max_caption_tokens = max_caption_tokens
        # seen, unreadable, epoch: shared, because a data loader's workers hold copies of self
        self.counts = torch.zeros(3, dtype=torch.long).share_memory_()
        self.epoch = None  # of the rows at hand, where they say it themselves

    @property
    def seen(self) -> int:
        return int(self.counts[0])

    @property
    def unreadable(self) -> int:
        return int(self.counts[1])

    def set_epoch(self, epoch: int) -> None:
        """Let pictures be augmented otherwise than in other epochs."""
        self.counts[2] = epoch

    def _augment(self, pictures: torch.Tensor, view: str = "") -> torch.Tensor:
        epoch = int(self.counts[2]) if self.epoch is None else self.epoch
        start = zlib.crc32(f"{self.seed} {epoch}{view}".encode())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(pictures.contiguous().numpy(), start))
            return self.augment(pictures)

    def read(self, row: dict) -> tuple[torch.Tensor, str] | None:
        """Picture and caption of a row, counted; None if it cannot be read."""
        self.counts[0] += 1
        try:
            return decode_row(row, self.processor.image_processor)
        except UnreadableRowError as error:
            self.counts[1] += 1
            logger.warning("skipped (%d of %d rows so far): %s", self.unreadable, self.seen, error)
            share = self.unreadable / self.seen
            if self.seen >= MIN_ROWS_BEFORE_STOP and share > self.max_unreadable_share:
                raise RuntimeError(
                    f"{self.unreadable} of {self.seen} training rows cannot be read, more than the allowed share of "
                    f"{self.max_unreadable_share:g}. The last one: {error}"
                ) from error
            return None

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        pairs = self.read_all(rows)
        answers = self.answers([caption for _, caption in pairs])
        batch = self._sequences([self.prompt_ids] * len(answers), answers)
        return batch | self.pictures([picture for picture, _ in pairs])

    def read_all(self, rows: list[dict]) -> list[tuple]:
        """`read` of the rows that can be read."""
        self.epoch = rows[0].get("epoch")
        pairs = [pair for pair in map(self.read, rows) if pair is not None]
        if not pairs:
            raise RuntimeError(f"none of the {len(rows)} rows of a batch can be read.")
        return pairs

    def answers(self, captions: list[str]) -> list[list[int]]:
        """Tokens of captions with the end token, cut to `max_caption_tokens`."""
        tokenizer = self.processor.tokenizer
        return [(ids + [tokenizer.eos_token_id])[: self.max_caption_tokens] for ids in text_ids(tokenizer, captions)]

    def _sequences(self, prompts: list[list[int]], answers: list[list[int]]) -> dict[str, torch.Tensor]:
        """Prompts and answers as `input_ids`, `attention_mask` and `labels` (B, T), padding on the left as in generation."""
        lines = [(*prompt, *answer) for prompt, answer in zip(prompts, answers, strict=True)]
        length = max(map(len, lines))
        input_ids = torch.full((len(lines), length), self.processor.tokenizer.pad_token_id)
        labels = torch.full((len(lines), length), -100)
        attention_mask = torch.zeros(len(lines), length, dtype=torch.long)
        for i, (line, answer) in enumerate(zip(lines, answers, strict=True)):
            input_ids[i, length - len(line) :] = torch.tensor(line)
            labels[i, length - len(answer) :] = torch.tensor(answer, dtype=torch.long)
            attention_mask[i, length - len(line) :] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}

    def pictures(self, pictures: list[torch.Tensor], view: str = "") -> dict[str, torch.Tensor]:
        """The batch's part for the vision tower: resized, augmented, normalised `pixel_values` (B, 3, height, width).

        Another `view` is augmented otherwise.
        """
        image_processor = self.processor.image_processor
        kwargs = {"return_tensors": "pt"} | ({} if self.size is None else {"size": self.size})
        if self.augment is None:
            return {"pixel_values": image_processor(pictures, **kwargs)["pixel_values"]}
        small = image_processor(pictures, do_normalize=False, **kwargs)["pixel_values"]
        mean, std = image_processor.image_mean, image_processor.image_std
        return {"pixel_values": image_processor.normalize(self._augment(small, view), mean, std)}


class PictureEpisodeCollator(CaptionCollator):
    """Rows -> episodes for the memory from plain picture-caption pairs, as a stream has them: no concepts, no kept features.

    Every `size` neighbouring rows share a memory. Half of them, drawn at random, are written to it: the caption under another view of the
    picture. All of them ask: where the row was written the caption can be read back, elsewhere ScopeNet has to say that it cannot.
    Where the readable rows do not fill the last episode some are repeated, without an answer: for the memory's losses alone.

    Args:
        size: rows of an episode; the seed's E = 4.
        max_tokens: of a stored caption with its end; a longer one is cut.
        others: as in `CaptionCollator`.
    """

    def __init__(self, *args, size: int = 4, max_tokens: int = 32, **kwargs):
        super().__init__(*args, **kwargs)
        self.episode_size, self.max_tokens = size, max_tokens

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        pairs = self.read_all(rows)
        readable = len(pairs)
        pairs += [pairs[i % readable] for i in range(-readable % self.episode_size)]
        pictures, captions = [picture for picture, _ in pairs], [caption for _, caption in pairs]
        answers = self.answers(captions)
        asked = [*answers[:readable], *[[]] * (len(pairs) - readable)]
        batch = self._sequences([self.prompt_ids] * len(pairs), asked) | self.pictures(pictures)
        batch["support_pixel_values"] = self.pictures(pictures, "support")["pixel_values"]
        tokens = torch.full((len(pairs), self.max_tokens), -1)
        for i, ids in enumerate(answers):
            ids = ids[: self.max_tokens]
            tokens[i, : len(ids)] = torch.tensor(ids)
        epoch = int(self.counts[2]) if self.epoch is None else self.epoch
        draw = random.Random(f"{self.seed} {epoch} {captions}")
        known = [draw.random() < 0.5 for _ in range(readable)]
        known = torch.tensor([known[i % readable] for i in range(len(pairs))])  # a repeated row with its first
        batch["support_tokens"] = tokens.view(-1, self.episode_size, self.max_tokens)
        batch["support_active"] = known.view(-1, self.episode_size)
        batch["target_tokens"] = tokens.masked_fill(~known.unsqueeze(1), -1)
        return batch | {"known": known}


class FeatureCollator(CaptionCollator):
    """`CaptionCollator` that hands out kept features of a frozen vision tower, another view of a picture every epoch.

    Args:
        features: (views, rows, tokens, width), from `cache_vision_features`; a row's place is its `feature_row`.
        processor, prompt_ids: as in `CaptionCollator`.
    """

    def __init__(self, features: torch.Tensor, processor, prompt_ids: list[int]):
        super().__init__(processor, prompt_ids)
        self.features = features

    def read(self, row: dict) -> tuple[int, str]:
        self.counts[0] += 1
        return row["feature_row"], row_caption(row)

    def pictures(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """Features `vision_features` (B, tokens, width)."""
        index = torch.tensor(indices)
        return {"vision_features": self.features[(int(self.counts[2]) + index) % len(self.features), index]}


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


def random_affine(
    n: int, degrees: float, shift: float, scale: float, aspect: float = 0.15, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Maps (n, 2, 3) from crop to picture, coordinates in [-1, 1]: rotation, shift, zoom and stretch drawn evenly."""
    uniform = lambda *size: torch.rand(*size, generator=generator) * 2 - 1  # noqa: E731
    angle = uniform(n) * math.radians(degrees)
    zoom, stretch = torch.exp(uniform(n) * math.log1p(scale)), torch.exp(uniform(n) * aspect)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = angle.cos() * zoom * stretch, -angle.sin() * zoom
    theta[:, 1, 0], theta[:, 1, 1] = angle.sin() * zoom, angle.cos() * zoom / stretch
    theta[:, :, 2] = uniform(n, 2) * shift
    return theta


def change_colors(x: torch.Tensor, strength: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """Pictures (B, 3, H, W) in [0, 1]: random saturation, contrast, brightness, ground, an erased patch and noise."""
    B, _, H, W = x.shape
    rand = lambda *size: torch.rand(*size, generator=generator)  # noqa: E731
    gray = x.mean(1, keepdim=True)
    saturation = 1 + 2 * strength * (2 * rand(B, 1, 1, 1) - 1)
    x = gray + (x - gray) * torch.where(rand(B, 1, 1, 1) < 0.3 * strength, torch.zeros(()), saturation)
    x = (x - 0.5) * (1 + strength * (2 * rand(B, 1, 1, 1) - 1)) + 0.5 + 0.35 * strength * (rand(B, 1, 1, 1) - 0.5)
    # pictograms come on white: for one in three the ground is another pale colour
    ground = torch.where(rand(B, 1, 1, 1) < 0.33, 1 - strength * rand(B, 3, 1, 1), torch.ones(()))
    x = torch.where(gray > 0.97, x * ground, x)
    for i in torch.nonzero(rand(B) < strength).flatten().tolist():
        h, w = int(H * (0.1 + 0.25 * rand(1))), int(W * (0.1 + 0.25 * rand(1)))
        top, left = int((H - h) * rand(1)), int((W - w) * rand(1))
        x[i, :, top : top + h, left : left + w] = rand(3, 1, 1)
    return (x + 0.06 * strength * torch.randn(x.shape, generator=generator)).clamp(0, 1)


def change_style(x: torch.Tensor, share: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """Pictures (B, 3, H, W) in [0, 1]: a share of them outlined, a quarter of it as bare lines on white, and as many blurred."""
    B = len(x)
    gray = F.pad(x.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    slope = (gray[..., 1:-1, 2:] - gray[..., 1:-1, :-2]).abs() + (gray[..., 2:, 1:-1] - gray[..., :-2, 1:-1]).abs()
    lines = 1 - F.max_pool2d((4 * slope).clamp(0, 1), 3, stride=1, padding=1)
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    draw = torch.rand(B, 1, 1, 1, generator=generator)
    x = torch.where(draw < share, lines * torch.where(draw < share / 4, torch.ones(()), x), x)
    return torch.where((draw >= share) & (draw < 2 * share), blurred, x)


def picture_augmentation(
    degrees: float = 10, shift: float = 0.1, scale: float = 0.2, color: float = 0.25, style: float = 0.0
):
    """A function on a batch of pictures (B, 3, H, W) in [0, 1]: small affine maps, changes of style and colour; no flips:
    captions say left and right. Outside the picture its border goes on."""

    def augment(x: torch.Tensor) -> torch.Tensor:
        grid = F.affine_grid(random_affine(len(x), degrees, shift, scale), list(x.shape), align_corners=False)
        x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
        x = change_style(x, style) if style else x
        return change_colors(x, color) if color else x

    return augment


def gray_copy(x: torch.Tensor) -> torch.Tensor:
    """Pictures (B, 3, H, W) without their colours, in the same shape."""
    return x.mean(1, keepdim=True).expand_as(x).contiguous()


# ------------------------------------------------------------------------------------------------------ episodes for the memory

ONSETS = "b c d f g h j k l m n p r s t v w z br ch dr kr sh st th tr".split()
VOWELS = "a e i o u ai ea ie oo".split()
CODAS = ["", "", "", "n", "r", "l", "s", "m", "k"]
FACTS = (
    "This is {name} the {noun}.",
    "This is {name}, the {noun}.",
    "{name} the {noun}.",
    "My {noun} is called {name}.",
    "This {noun} is named {name}.",
    "Here is {name} the {noun}.",
    "A {noun} called {name}.",
    "{name} is a {noun}.",
)
QUESTIONS = (
    "Who is the {noun}?",
    "What is the {noun} called?",
    "What is the name of the {noun}?",
    "Tell me about the {noun}.",
)


def make_names(number: int, seed: int = 0) -> list[str]:
    """Pronounceable made-up names, all different, the same for the same seed; a longer list begins with the shorter one."""
    draw, names = random.Random(seed), {}
    while len(names) < number:
        name = "".join(draw.choice(ONSETS) + draw.choice(VOWELS) for _ in range(draw.choice((1, 2, 2, 3))))
        names.setdefault((name + draw.choice(CODAS)).capitalize())
    return list(names)


def caption_noun(caption: str) -> str:
    """What a caption names, without its article: `A hiking boot.` -> `hiking boot`."""
    return re.sub(r"^(An?|The)\s+(?=\S)", "", caption.strip()).rstrip(".")


UNWRITTEN = ("new", "unknown")  # kinds of query for what no memory holds


class EpisodeCollator(FeatureCollator):
    """Rows -> episodes: memories to be written, and the rows as queries to them. No gradient step lies between the two.

    A batch has `groups` memories. Each stores a fact per support picture ("This is Bimo the penguin."), the name drawn at random every
    time, so that no name can settle in the weights. The group's rows ask for them: `view` another view of a stored picture, `style` a
    picture of the same concept in another style, `text` a question in words, `new` a picture that was not stored, with the nearest
    look-alike of it stored for half of them, or `unknown` a question in words about one. The answer is the stored sentence, or the caption
    where nothing was stored; an unknown question has none, ScopeNet alone learns from it.

    Args:
        features: (views, rows, tokens, width), as in `FeatureCollator`.
        pooled: key features of the same pictures (views, rows, 2 x width).
        gray: key features of their grey copies (rows, 2 x width), or None.
        captions, concepts: of all rows of `features`.
        groups: memories per batch.
        sizes: smallest and largest number of facts in a memory; drawn evenly on a logarithmic scale.
        shares: of the kinds of query, `view`, `style`, `text`, `new`, `unknown`.
        names: how many made-up names there are in training.
        max_tokens: longest fact, in tokens with its end.
        key_pairs: pictures per batch for the contrastive loss of the keys, two views each.
        seed: of all that is drawn, with the epoch and the rows.
    """

    def __init__(
        self,
        features: torch.Tensor,
        pooled: torch.Tensor,
        gray: torch.Tensor | None,
        captions: list[str],
        concepts: list[str],
        processor,
        prompt_ids: list[int],
        max_tokens: int,
        groups: int = 4,
        sizes: tuple[int, int] = (1, 256),
        shares: dict[str, float] | None = None,
        names: int = 4000,
        key_pairs: int = 512,
        seed: int = 0,
    ):
        super().__init__(features, processor, prompt_ids)
        self.pooled, self.gray, self.captions, self.concepts = pooled, gray, captions, concepts
        self.groups, self.sizes, self.max_tokens, self.key_pairs = groups, sizes, max_tokens, key_pairs
        self.shares = shares or {"view": 0.45, "style": 0.1, "text": 0.1, "new": 0.3, "unknown": 0.05}
        if set(self.shares) != {"view", "style", "text", "new", "unknown"}:
            raise ValueError(f"shares must be of view, style, text, new and unknown, got {', '.join(self.shares)}.")
        self.names, self.seed = make_names(names), seed
        words = {word for caption in captions for word in caption_noun(caption).split()}
        self.vocabulary = sorted(words | {name.lower() for name in self.names[: len(words) // 2]})
        tokens = [t for t in processor.tokenizer.get_vocab() if t.lstrip("Ġ▁").isascii() and t.lstrip("Ġ▁").isalpha()]
        self.starts = sorted(t[1:] for t in tokens if t[0] in "Ġ▁")
        self.endings = sorted(t for t in tokens if t[0] not in "Ġ▁")
        self.mates = defaultdict(list)
        for i, concept in enumerate(concepts):
            self.mates[concept].append(i)
        self.lookalikes = self._lookalikes()

    def _lookalikes(self, k: int = 4) -> list[list[int]]:
        """Per row, the rows of other concepts with the most similar key features."""
        x = self.pooled[0].float()
        x = F.normalize((x - x.mean(0)) / x.std(0).clamp(min=1e-4), dim=-1)
        code = {concept: i for i, concept in enumerate(self.mates)}
        concept = torch.tensor([code[c] for c in self.concepts])
        nearest = []
        for start in range(0, len(x), 1024):
            similarity = x[start : start + 1024] @ x.mT
            similarity[concept[start : start + 1024, None] == concept[None]] = -1
            nearest += similarity.topk(min(k, len(x))).indices.tolist()
        return nearest

    def _tokens(self, text: str) -> list[int]:
        return text_ids(self.processor.tokenizer, text)

    def _fact(self, row: int, draw: random.Random) -> tuple[list[int], str]:
        """Tokens of a fact about a row, with the end token, and the noun it uses.

        Four facts in ten call the picture what it is; the others by a noun of another picture, a few random words or words made of random
        tokens, so that the decoder has to read the noun too instead of looking at the picture, and learns to repeat any token. Too
        long for the memory, a noun lends only its last words.
        """
        noun, name, form = caption_noun(self.captions[row]).split(), draw.choice(self.names), draw.choice(FACTS)
        kind = draw.random()
        if kind > 0.8 and self.starts and self.endings:
            parts = [draw.choice((0, 1, 1, 2, 3)) for _ in range(draw.choice((1, 1, 2, 3)))]
            noun = [draw.choice(self.starts) + "".join(draw.choices(self.endings, k=k)) for k in parts]
        elif kind > 0.6:
            noun = [draw.choice(self.vocabulary) for _ in range(draw.choice((1, 1, 2, 3)))]
        elif kind > 0.4:
            noun = caption_noun(draw.choice(self.captions)).split()
        while True:
            ids = [*self._tokens(form.format(name=name, noun=" ".join(noun))), self.processor.tokenizer.eos_token_id]
            if len(ids) <= self.max_tokens or len(noun) == 1:
                return ids[: self.max_tokens], " ".join(noun)
            noun = noun[1:]

    def sentences(self) -> list[list[int]]:
        """Tokens of a fact and of a question about every picture, their forms by turns."""
        out = []
        for i, caption in enumerate(self.captions):
            words = {"noun": caption_noun(caption), "name": self.names[i % len(self.names)]}
            out += [self._tokens(forms[i % len(forms)].format(**words)) for forms in (FACTS, QUESTIONS)]
        return out

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        own = [row["feature_row"] for row in rows]
        if len(own) % self.groups:
            raise ValueError(
                f"a batch of {len(own)} rows does not divide into {self.groups} groups: set dataloader_drop_last."
            )
        draw = random.Random(zlib.crc32(f"{self.seed} {int(self.counts[2])} {own}".encode()))
        views, n, G = len(self.features), len(self.captions), self.groups
        low, high = (math.log(s) for s in self.sizes)
        prompt, user, assistant = self.prompt_ids, self.prompt_ids[0], self.prompt_ids[-1]
        supports, answers, prompts, pictures, known = [], [], [], [], []
        for group in range(G):
            members = own[group * len(own) // G : (group + 1) * len(own) // G]
            size = round(math.exp(draw.uniform(low, high)))
            store: dict[int, tuple[list[int], str]] = {}  # row -> fact and its noun
            plan = []
            for i in members:
                kind = draw.choices(list(self.shares), list(self.shares.values()))[0]
                if kind == "style" and len(self.mates[self.concepts[i]]) < 2:
                    kind = "view"
                written = kind not in UNWRITTEN
                if written and len(store) >= size and i not in store:  # no room: ask for what is there
                    i = draw.choice(list(store))
                    kind = "view" if kind == "style" else kind
                if written and i not in store:
                    store[i] = self._fact(i, draw)
                plan.append((kind, i))
            told = {self.concepts[i] for i in store}
            for kind, i in plan:  # a new picture's look-alike, of a concept no other query asks for
                other = draw.choice(self.lookalikes[i])
                if kind in UNWRITTEN and len(store) < size and draw.random() < 0.5 and self.concepts[other] not in told:
                    store[other] = self._fact(other, draw)
            asked = {self.concepts[i] for _, i in plan}
            rest = [i for i in range(n) if i not in store and self.concepts[i] not in asked]
            for i in draw.sample(rest, min(len(rest), max(0, size - len(store)))):
                store[i] = self._fact(i, draw)
            order = list(store)
            draw.shuffle(order)
            supports.append([(i, draw.randrange(views), store[i][0]) for i in order])
            nouns = {noun.lower() for _, noun in store.values()}
            for kind, i in plan:
                if kind in UNWRITTEN and self.concepts[i] in {self.concepts[j] for j in store}:
                    kind = "view" if kind == "new" else "text"
                    i = next(j for j in store if self.concepts[j] == self.concepts[i])
                if kind == "unknown" and caption_noun(self.captions[i]).lower() in nouns:  # a fact has borrowed it
                    kind = "new"
                picture = i
                if kind == "style":
                    others = [j for j in self.mates[self.concepts[i]] if j != i and j not in store]
                    picture = draw.choice(others) if others else i
                if kind in ("text", "unknown"):
                    noun = store[i][1] if kind == "text" else caption_noun(self.captions[i])
                    question = draw.choice(QUESTIONS).format(noun=noun)
                    prompts.append([user, *self._tokens(question), assistant])
                else:
                    prompts.append(prompt)
                    pictures.append((draw.randrange(views), picture))
                caption = [*self._tokens(self.captions[i]), self.processor.tokenizer.eos_token_id]
                answers.append(store[i][0] if i in store else [] if kind == "unknown" else caption)
                known.append(kind not in UNWRITTEN)
        batch = self._sequences(prompts, answers)
        widest = max(map(len, supports))
        place = torch.zeros(G, widest, 2, dtype=torch.long)
        tokens = torch.full((G, widest, self.max_tokens), -1)
        active = torch.zeros(G, widest, dtype=torch.bool)
        target = torch.zeros(len(rows), self.max_tokens, dtype=torch.long) - 1
        for group, items in enumerate(supports):
            for k, (i, view, fact) in enumerate(items):
                place[group, k] = torch.tensor([view, i])
                tokens[group, k, : len(fact)] = torch.tensor(fact)
                active[group, k] = True
        for row, answer in enumerate(answers):
            if known[row]:
                target[row, : len(answer)] = torch.tensor(answer)
        index = torch.tensor(pictures, dtype=torch.long).view(-1, 2)
        batch["vision_features"] = self.features[index[:, 0], index[:, 1]]
        written = [self.pooled[place[..., 0], place[..., 1]]]
        if self.gray is not None:
            written.append(self.gray[place[..., 1]])
        batch["support_features"] = torch.stack(written, 2)
        batch |= {"support_tokens": tokens, "support_active": active, "target_tokens": target}
        batch["known"] = torch.tensor(known)
        return batch | self._key_batch(draw)

    def _key_batch(self, draw: random.Random) -> dict[str, torch.Tensor]:
        """Two views, or for one in ten two styles, of pictures of different concepts, and the first one's grey copies."""
        concepts = draw.sample(sorted(self.mates), min(self.key_pairs, len(self.mates)))
        first = [draw.choice(self.mates[c]) for c in concepts]
        second = [
            draw.choice(self.mates[c]) if draw.random() < 0.1 else i for i, c in zip(first, concepts, strict=True)
        ]
        view = lambda: torch.tensor([draw.randrange(len(self.pooled)) for _ in first])  # noqa: E731
        features = [self.pooled[view(), torch.tensor(i)] for i in (first, second)]
        if self.gray is not None:
            features.append(self.gray[first])
        return {"key_features": torch.stack(features)}
