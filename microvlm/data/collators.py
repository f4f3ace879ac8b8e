"""Build training batches from rows: images, tokens, labels."""

import logging
import zlib

import torch

from .rows import UnreadableRowError, decode_row, row_caption, text_ids

MIN_ROWS_BEFORE_STOP = 100  # a share over fewer rows says little
logger = logging.getLogger(__name__)


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
