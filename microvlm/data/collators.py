"""Build training batches from rows: images, tokens, labels."""

import logging
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from .rows import UnreadableRowError, decode_row, row_caption, text_ids

MIN_ROWS_BEFORE_STOP = 100  # a share over fewer rows says little
logger = logging.getLogger(__name__)


def pad_left(lines: list[list[int]], value: int) -> torch.Tensor:
    rows = [torch.tensor(line, dtype=torch.long) for line in lines]
    return pad_sequence(rows, batch_first=True, padding_value=value, padding_side="left")


@dataclass(eq=False, repr=False)
class CaptionCollator:
    """Build batches `<prompt with the image><caption><eos>`; the loss is on caption and end only.

    The random numbers of `augment` depend on seed, epoch and batch alone, so a resumed run draws the same.
    """

    processor: Any  # a `MicroVLMProcessor`
    prompt_ids: list[int]  # the prompt with all placeholders, from `model.default_prompt`
    augment: Callable[[torch.Tensor], torch.Tensor] | None = None  # on images (B, 3, H, W) in [0, 1], for training
    max_unreadable_share: float = 0.01  # training stops when a larger share of the rows cannot be read
    seed: int = 0  # of the augmentation
    max_caption_tokens: int | None = None  # longer captions are cut, and then have no end token

    def __post_init__(self):
        # seen, unreadable, epoch: shared, because a data loader's workers hold copies of self
        self.counts = torch.zeros(3, dtype=torch.long).share_memory_()
        self.row_epoch = None  # of the rows at hand, where they carry it

    @property
    def seen(self) -> int:
        return int(self.counts[0])

    @property
    def unreadable(self) -> int:
        return int(self.counts[1])

    @property
    def epoch(self) -> int:
        return int(self.counts[2]) if self.row_epoch is None else self.row_epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; each augments images in its own way."""
        self.counts[2] = epoch

    def read(self, row: dict) -> tuple[torch.Tensor, str] | None:
        """Decode and count a row; return None if it cannot be read."""
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
        """Build the batch of the rows that can be read."""
        pairs = self.read_all(rows)
        answers = self.answers([caption for _, caption in pairs])
        return self.sequences([self.prompt_ids] * len(answers), answers) | self.images([image for image, _ in pairs])

    def read_all(self, rows: list[dict]) -> list[tuple]:
        """Read the rows that can be read."""
        self.row_epoch = rows[0].get("epoch")
        pairs = [pair for pair in map(self.read, rows) if pair is not None]
        if not pairs:
            raise RuntimeError(f"none of the {len(rows)} rows of a batch can be read.")
        return pairs

    def answers(self, captions: list[str]) -> list[list[int]]:
        """Tokenize captions with the end token, cut to `max_caption_tokens`."""
        tokenizer = self.processor.tokenizer
        return [(ids + [tokenizer.eos_token_id])[: self.max_caption_tokens] for ids in text_ids(tokenizer, captions)]

    def sequences(self, prompts: list[list[int]], answers: list[list[int]]) -> dict[str, torch.Tensor]:
        """Join prompts and answers to `input_ids`, `attention_mask` and `labels` (B, T), padded on the left."""
        padding, pairs = self.processor.tokenizer.pad_token_id, list(zip(prompts, answers, strict=True))
        return {
            "input_ids": pad_left([[*prompt, *answer] for prompt, answer in pairs], padding),
            "attention_mask": pad_left([[1] * (len(prompt) + len(answer)) for prompt, answer in pairs], 0),
            "labels": pad_left([[-100] * len(prompt) + list(answer) for prompt, answer in pairs], -100),
        }

    def images(self, images: list[torch.Tensor], view: str = "") -> dict[str, torch.Tensor]:
        """Resize, augment and normalise images; another `view` draws other augmentations."""
        image_processor = self.processor.image_processor
        if self.augment is None:
            return {"pixel_values": image_processor(images, return_tensors="pt")["pixel_values"]}
        small = image_processor(images, return_tensors="pt", do_normalize=False)["pixel_values"]
        # own random numbers, of seed, epoch, view and images
        start = zlib.crc32(f"{self.seed} {self.epoch}{view}".encode())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(small.contiguous().numpy(), start))
            augmented = self.augment(small)
        mean, std = image_processor.image_mean, image_processor.image_std
        return {"pixel_values": image_processor.normalize(augmented, mean, std)}


@dataclass(eq=False, repr=False, kw_only=True)
class FeatureCollator(CaptionCollator):
    """Build batches from cached vision features, another view of an image every epoch."""

    features: torch.Tensor  # (views, rows, tokens, width), of `cache_vision_features`; a row's index: `feature_row`

    def read(self, row: dict) -> tuple[int, str]:
        """Return the index and the caption of a row, and count it."""
        self.counts[0] += 1
        return row["feature_row"], row_caption(row)

    def images(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """Select `vision_features` (B, tokens, width) of this epoch's view."""
        index = torch.tensor(indices)
        return {"vision_features": self.features[(int(self.counts[2]) + index) % len(self.features), index]}
