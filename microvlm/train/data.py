"""Load the data of a recipe, order its rows, time the wait for them."""

import json
import logging
import random
import time
from itertools import islice

import torch
from datasets import Dataset, concatenate_datasets, interleave_datasets
from transformers import TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..data.augment import gray_copy, image_augmentation
from ..data.collators import CaptionCollator, FeatureCollator
from ..data.episodes import EpisodeCollator, ImageEpisodeCollator
from ..data.feature_cache import cache_vision_features
from ..data.rows import UnreadableRowError, decode_row, load_rows, row_name
from ..data.stream import CaptionStream, load_stream
from ..model import require
from .recipe import Recipe, to_dict

logger = logging.getLogger(__name__)


def readable_rows(rows, count: int, image_processor):
    """Select the first `count` rows that can be decoded, or as many as there are."""
    readable = []
    for index, row in enumerate(rows):
        if len(readable) == count:
            break
        try:
            decode_row(row, image_processor)
            readable.append(index)
        except UnreadableRowError as error:
            logger.warning("evaluation.captions: skipped: %s", error)
    require(bool(readable), f"evaluation.captions: none of the {len(rows)} validation rows can be read.")
    return rows.select(readable)


class TrainingData:
    """The data of a recipe: rows, collators, fixed batches and rows to evaluate on. The model is only read."""

    def __init__(self, recipe: Recipe, args: TrainingArguments, processor, model):
        self.data, self.evaluation, self.args = recipe.data, recipe.evaluation, args
        self.processor, self.model, self.prompt = processor, model, model.default_prompt(1)[0].tolist()
        if self.data.episodes is not None:
            memory = model.model.memory
            require(memory is not None, "data.episodes teach a memory: set config: {use_memory: true}.")
        # images: a `Dataset` or a `CaptionStream`; `rows` are mixed from them, with cached features without pixels
        source, options = self.data.validation, {"limit": self.data.validation_limit, "revision": self.data.revision}
        self.validation = load_rows(source, split="validation", **options) if source else None
        self.images = self._load_rows()
        # batches
        augmentation = self.data.augmentation
        self.augment = None if augmentation is None else image_augmentation(**augmentation)
        self.collator, self.eval_collator = self.caption_collator(self.augment), self.caption_collator(None)
        self.memory_batches = self.caption_rows = None  # what every evaluation asks and captions
        if self.data.vision_cache is not None:
            self._use_features()
        else:
            self.rows = self._mixed(self.images)
            if self.data.episodes is not None:
                self._use_image_episodes()
        # images to caption
        if count := self.evaluation.captions:
            rows = self.validation.shuffle(seed=args.seed)
            self.caption_rows = readable_rows(rows, count, processor.image_processor)

    def _load_rows(self):
        data, args = self.data, self.args
        if data.stream is None:
            rows = load_rows(data.train, data.exclude_copyleft, data.limit, revision=data.revision)
            return self._with_replay(rows) if data.replay else rows
        grouped = args.train_sampling_strategy == "group_by_length"
        return CaptionStream(
            load_stream(data.train, data.revision),
            args.seed,
            shuffle_buffer=data.stream.shuffle_buffer,
            limit=data.limit,
            group_size=args.train_batch_size * args.gradient_accumulation_steps if grouped else 1,
            rank=args.process_index,
            world_size=args.world_size,
        )

    def _with_replay(self, rows: Dataset) -> Dataset:
        """Add the rows of `replay`; `replayed` says which they are."""
        old = load_rows(self.data.replay, self.data.exclude_copyleft)
        columns = [name for name in rows.column_names if name in old.column_names]
        parts = [
            part.select_columns(columns).add_column("replayed", [i] * len(part)) for i, part in enumerate((rows, old))
        ]
        return concatenate_datasets(parts)

    def _mixed(self, rows):
        """Mix new and replayed rows by `replay_share`; the fewer of both are repeated."""
        if not self.data.replay:
            return rows
        share, replayed = self.data.replay_share, torch.tensor(rows["replayed"][:])
        parts = [rows.select((replayed == i).nonzero().flatten().tolist()) for i in (0, 1)]
        return interleave_datasets(parts, [1 - share, share], self.args.seed, stopping_strategy="all_exhausted")

    def caption_collator(self, augment, kind=CaptionCollator, **options) -> CaptionCollator:
        return kind(
            processor=self.processor,
            prompt_ids=self.prompt,
            augment=augment,
            max_unreadable_share=self.data.max_unreadable_share,
            seed=self.args.seed,
            max_caption_tokens=self.data.max_caption_tokens,
            **options,
        )

    def sample(self, count: int) -> list[dict]:
        """Draw `count` training rows with their images, the same on every rank."""
        if isinstance(self.images, CaptionStream):
            return list(islice(CaptionStream(self.images.rows, self.args.seed, shuffle_buffer=count), count))
        return list(self.images.shuffle(seed=self.args.seed).select(range(min(count, len(self.images)))))

    def _use_features(self) -> None:
        """Train on cached features of a frozen vision tower."""
        trains = any(p.requires_grad for p in self.model.model.vision_tower.parameters())
        require(not trains, "data.vision_cache needs a frozen vision tower, but `trainable` matches its parameters.")
        features, rows = self._features(self.images, self.data.vision_cache.views)
        if skipped := len(self.images) - len(rows):
            print(f"{skipped} of {len(self.images)} training rows could not be read: skipped", flush=True)
        self.rows = self._mixed(rows)  # an image that is repeated is encoded once
        if self.data.episodes is None:
            self.collator = self.caption_collator(None, FeatureCollator, features=features)
            return
        self.collator = self._episode_collator(self.images, features, rows)
        if count := self.evaluation.memory:
            features, rows = self._features(self.validation, 2)
            self.memory_batches = self._batches(self._episode_collator(self.validation, features, rows), rows, count)

    def _features(self, rows, views: int, gray: bool = False):
        """Compute or read features (views, rows, tokens, width), and the rows that can be read."""
        collator = self.caption_collator(gray_copy if gray else self.augment)
        transform = "gray" if gray else json.dumps(self.data.augmentation, sort_keys=True)
        tower, folder = self.model.model.vision_tower, self.data.vision_cache.folder
        return cache_vision_features(tower, collator, rows, views, folder, transform)

    def _episode_collator(self, rows, features: torch.Tensor, readable) -> EpisodeCollator:
        """Make episodes of cached features; `readable` are those of the rows that can be read."""
        concepts = "concept" in readable.column_names
        require(concepts, "data.episodes needs a column `concept`: which images show the same thing.")
        memory, skip = self.model.config.memory_config, self.model.model.vision_tower.num_prefix_tokens
        pool = self.model.model.memory.key_encoder.pool

        def pool_view(view: torch.Tensor) -> torch.Tensor:
            return torch.cat([pool(part, skip) for part in view.split(512)])

        return self.caption_collator(
            None,
            EpisodeCollator,
            features=features,
            pooled=torch.stack([pool_view(view) for view in features]),
            # of grey copies too if the memory wants them
            gray=pool_view(self._features(rows, 1, gray=True)[0][0]) if memory.gray_weight else None,
            captions=readable["caption"][:],
            concepts=readable["concept"][:],
            max_tokens=memory.max_content_tokens,
            **to_dict(self.data.episodes),
        )

    def _use_image_episodes(self) -> None:
        """Make episodes of images as they come."""
        size, batch = self.data.episodes.size, self.args.per_device_train_batch_size
        require(batch % size == 0, f"a batch of {batch} does not divide into episodes of {size}.")
        options = {"max_tokens": self.model.config.memory_config.max_content_tokens, **to_dict(self.data.episodes)}
        self.collator = self.caption_collator(self.augment, ImageEpisodeCollator, **options)
        if count := self.evaluation.memory:
            collator = self.caption_collator(self.augment, ImageEpisodeCollator, **options)
            self.memory_batches = self._batches(collator, self.validation, count)

    def _batches(self, collator, rows, count: int) -> list[dict]:
        """Collate fixed batches to evaluate the memory on, at most `count`."""
        size = self.args.per_device_train_batch_size
        require(len(rows) >= size, f"evaluation.memory needs {size} validation rows, there are {len(rows)}.")
        order = list(range(len(rows)))
        random.Random(self.args.seed).shuffle(order)
        starts = range(0, min(count, len(rows) // size) * size, size)
        return [collator([rows[i] for i in order[start : start + size]]) for start in starts]


class SeededLengthGroupedSampler(LengthGroupedSampler):
    """Sample rows of similar length together, in an order of seed and epoch alone."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()


class TrackedCollator:
    """Add the rows' `row_names` and the stream's `cursor` to a collator's batches."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, rows: list[dict]) -> dict:
        batch = self.collator(rows) | {"row_names": [row_name(row) for row in rows]}
        return batch | ({"cursor": rows[-1]["cursor"]} if "cursor" in rows[-1] else {})


class WaitClock:
    """Measure how long training waits for data. Start-up and evaluation are not waiting time."""

    def __init__(self):
        self.waited, self.logged_at, self.total_wait, self.total_time = 0.0, None, 0.0, 0.0

    def wait(self, seconds: float) -> None:
        """Count time spent on a step's batches; those of the first step are start-up."""
        if self.logged_at is None:
            self.logged_at = time.perf_counter()
        else:
            self.waited += seconds

    def skip(self, seconds: float) -> None:
        """Leave time out that is not training."""
        if self.logged_at is not None:
            self.logged_at += seconds

    def take(self) -> dict[str, float]:
        """Return the share of waiting since the last call, as `data_wait`."""
        now = time.perf_counter()
        elapsed = now - self.logged_at
        share = {"data_wait": self.waited / elapsed}
        self.total_wait, self.total_time = self.total_wait + self.waited, self.total_time + elapsed
        self.waited, self.logged_at = 0.0, now
        return share
