"""Load the data of a recipe: rows, streams, cached features, episodes."""

import json
import logging
import random
from itertools import islice

import torch
from transformers import TrainingArguments

from ..data.augment import gray_copy, image_augmentation
from ..data.collators import CaptionCollator, FeatureCollator
from ..data.episodes import EpisodeCollator, EpisodeImages, EpisodeOptions, ImageEpisodeCollator
from ..data.feature_cache import cache_vision_features
from ..data.rows import UnreadableRowError, decode_row, is_remote, load_rows
from ..data.stream import CaptionStream, load_stream, take_rows
from .recipe import DataConfig, Recipe, to_dict

logger = logging.getLogger(__name__)


def load_validation(data: DataConfig):
    """Load the rows of `data.validation`, or None; from the Hub no more than `validation_limit`."""
    path, limit = data.validation, data.validation_limit
    if not path:
        return None
    if not is_remote(path if isinstance(path, str) else path[0]):
        return load_rows(path, data.format, limit=limit)
    if limit is None:
        raise ValueError("data.validation on the Hub needs data.validation_limit: its rows are kept on the disk.")
    return take_rows(load_stream(path, data.format, data.revision), limit)


def readable_rows(rows, count: int, processor):
    """Select the first `count` rows that can be decoded, or as many as there are.

    Raises:
        ValueError: there is none.
    """
    readable = []
    for index in range(len(rows)):
        if len(readable) == count:
            break
        try:
            decode_row(rows[index], processor.image_processor)
            readable.append(index)
        except UnreadableRowError as error:
            logger.warning("evaluation.captions: skipped: %s", error)
    if not readable:
        raise ValueError(f"evaluation.captions: none of the {len(rows)} validation rows can be read.")
    return rows.select(readable)


class TrainingData:
    """The data of a recipe. The model is only read.

    Attributes:
        rows: a `Dataset`, or a `CaptionStream`; with cached features without `images`.
        validation: a `Dataset` or None.
        collator, eval_collator: rows -> batch.
        memory_batches: episodes of validation images, or None.
        caption_rows: validation rows whose images are captioned at every evaluation, or None.
    """

    def __init__(self, recipe: Recipe, args: TrainingArguments, processor, model):
        self.data, self.evaluation, self.args = recipe.data, recipe.evaluation, args
        self.processor, self.model, self.prompt = processor, model, model.default_prompt(1)[0].tolist()
        if self.data.episodes is not None and model.model.memory is None:
            raise ValueError("data.episodes teach a memory: set config: {use_memory: true}.")
        # rows
        self.validation = load_validation(self.data)
        for name in ("captions", "memory"):
            if getattr(self.evaluation, name) and self.validation is None:
                raise ValueError(f"evaluation.{name} needs data.validation.")
        self.rows = self.images = self._load_rows() if self.data.stream is None else self._load_stream()
        # batches
        augmentation = self.data.augmentation
        self.augment = None if augmentation is None else image_augmentation(**augmentation)
        self.collator, self.eval_collator = self.caption_collator(self.augment), self.caption_collator(None)
        self.memory_batches = self.caption_rows = None
        if self.data.vision_cache is not None:
            self._use_features()
        elif self.data.episodes is not None:
            self._use_image_episodes()
        # images to caption
        if count := self.evaluation.captions:
            self.caption_rows = readable_rows(self.validation.shuffle(seed=args.seed), count, processor)

    def _load_rows(self):
        path = self.data.train
        if is_remote(path if isinstance(path, str) else path[0]):
            raise ValueError("data.train on the Hub is read as a stream: set data.stream, or download its files first.")
        return load_rows(path, self.data.format, self.data.exclude_copyleft, self.data.limit)

    def _load_stream(self) -> CaptionStream:
        args = self.args
        rows = load_stream(self.data.train, self.data.format, self.data.revision)
        grouped = args.train_sampling_strategy == "group_by_length"
        return CaptionStream(
            rows,
            args.seed,
            shuffle_buffer=self.data.stream.shuffle_buffer,
            limit=self.data.limit,
            group_size=args.train_batch_size * args.gradient_accumulation_steps if grouped else 1,
            rank=args.process_index,
            world_size=args.world_size,
        )

    def caption_collator(self, augment, kind=CaptionCollator, **kwargs) -> CaptionCollator:
        kwargs |= {"seed": self.args.seed, "max_caption_tokens": self.data.max_caption_tokens}
        share = self.data.max_unreadable_share
        return kind(self.processor, self.prompt, augment, self.data.image_size, share, **kwargs)

    def sample(self, count: int) -> list[dict]:
        """Draw `count` training rows with their images, the same on every rank."""
        if isinstance(self.images, CaptionStream):
            return list(islice(CaptionStream(self.images.rows, self.args.seed, shuffle_buffer=count), count))
        return list(self.images.shuffle(seed=self.args.seed).select(range(min(count, len(self.images)))))

    def _use_features(self) -> None:
        """Train on cached features of a frozen vision tower."""
        if any(p.requires_grad for p in self.model.model.vision_tower.parameters()):
            raise ValueError("data.vision_cache needs a frozen vision tower, but `trainable` matches its parameters.")
        features, self.rows = self._features(self.images, self.data.vision_cache.views)
        if skipped := len(self.images) - len(self.rows):
            print(f"{skipped} of {len(self.images)} training rows could not be read: skipped", flush=True)
        if self.data.episodes is None:
            self.collator = FeatureCollator(features, self.processor, self.prompt)
            self.collator.max_caption_tokens = self.data.max_caption_tokens
            return
        self.collator = self._episode_collator(self.images, features, self.rows)
        if count := self.evaluation.memory:
            features, readable = self._features(self.validation, 2)
            self.memory_batches = self._batches(
                self._episode_collator(self.validation, features, readable), readable, count
            )

    def _features(self, rows, views: int, gray: bool = False):
        """Compute or read features (views, rows, tokens, width), and the rows that can be read."""
        augment = gray_copy if gray else self.augment
        transform = "gray" if gray else json.dumps(self.data.augmentation, sort_keys=True)
        tower, folder = self.model.model.vision_tower, self.data.vision_cache.folder
        with self.args.main_process_first(desc="vision features"):
            return cache_vision_features(tower, self.caption_collator(augment), rows, views, folder, transform)

    def _episode_collator(self, rows, features: torch.Tensor, readable) -> EpisodeCollator:
        """Make episodes of cached features; `readable` are those of the rows that can be read."""
        if "concept" not in readable.column_names:
            raise ValueError("data.episodes needs a column `concept`: which images show the same thing.")
        memory, skip = self.model.config.memory_config, self.model.model.vision_tower.num_prefix_tokens
        pool = self.model.model.memory.key_encoder.pool

        def pool_view(view: torch.Tensor) -> torch.Tensor:
            return torch.cat([pool(part, skip) for part in view.split(512)])

        # key features, of grey copies too if the memory wants them
        gray = pool_view(self._features(rows, 1, gray=True)[0][0]) if memory.gray_weight else None
        images = EpisodeImages(
            features,
            torch.stack([pool_view(view) for view in features]),
            gray,
            readable["caption"][:],
            readable["concept"][:],
        )
        options = EpisodeOptions(seed=self.args.seed, **to_dict(self.data.episodes))
        return EpisodeCollator(images, self.processor, self.prompt, memory.max_content_tokens, options)

    def _use_image_episodes(self) -> None:
        """Make episodes of images as they come."""
        size, batch = self.data.episodes.size, self.args.per_device_train_batch_size
        if batch % size:
            raise ValueError(f"a batch of {batch} does not divide into episodes of {size}.")
        options = {"size": size, "max_tokens": self.model.config.memory_config.max_content_tokens}
        self.collator = self.caption_collator(self.augment, ImageEpisodeCollator, **options)
        if count := self.evaluation.memory:
            collator = self.caption_collator(self.augment, ImageEpisodeCollator, **options)
            self.memory_batches = self._batches(collator, self.validation, count)

    def _batches(self, collator, rows, count: int) -> list[dict]:
        """Collate fixed batches to evaluate the memory on, at most `count`."""
        size = self.args.per_device_train_batch_size
        count = min(count, len(rows) // size)
        if not count:
            raise ValueError(f"evaluation.memory needs {size} validation rows, there are {len(rows)}.")
        order = list(range(len(rows)))
        random.Random(self.args.seed).shuffle(order)
        return [collator([rows[i] for i in order[k * size : (k + 1) * size]]) for k in range(count)]
