"""Load the data of a recipe: rows, streams, cached features, episodes."""

import json
import random
from itertools import islice
from typing import Any

import torch
from transformers import TrainingArguments

from ..data.augment import gray_copy, image_augmentation
from ..data.collators import CaptionCollator, FeatureCollator
from ..data.episodes import EpisodeCollator, EpisodeImages, EpisodeOptions, ImageEpisodeCollator
from ..data.feature_cache import cache_vision_features
from ..data.rows import UnreadableRowError, decode_row, is_remote, load_rows, text_ids
from ..data.stream import CaptionStream, load_stream, take_rows
from .setup import calibrate_adapter
from .trainer import logger


def load_validation(data: dict[str, Any]):
    """Rows of `data.validation`, or None. Of shards on the Hub no more than `validation_limit` rows are read."""
    path, limit = data.get("validation"), data.get("validation_limit")
    if not path:
        return None
    if is_remote(path if isinstance(path, str) else path[0]):
        if limit is None:
            raise ValueError("data.validation on the Hub needs data.validation_limit: its rows are kept on the disk.")
        return take_rows(load_stream(path, data.get("format"), data.get("revision")), limit)
    return load_rows(path, data.get("format"), limit=limit)


def readable_rows(rows, count: int, processor):
    """The first `count` rows that can be decoded, or as many as there are.

    Raises:
        ValueError: there is none.
    """
    found = []
    for index in range(len(rows)):
        if len(found) == count:
            break
        try:
            decode_row(rows[index], processor.image_processor)
            found.append(index)
        except UnreadableRowError as error:
            logger.warning("evaluation.captions: skipped: %s", error)
    if not found:
        raise ValueError(f"evaluation.captions: none of the {len(rows)} validation rows can be read.")
    return rows.select(found)


class TrainingData:
    """The data of a recipe: rows or a stream, collators, episodes to evaluate the memory on.

    Attributes:
        rows: a `Dataset`, or a `CaptionStream`.
        validation: a `Dataset` or None.
        collator, eval_collator: rows -> batch.
        memory_batches: episodes of the validation pictures, or None.
    """

    def __init__(self, recipe: dict[str, Any], args: TrainingArguments, processor, model):
        self.recipe, self.args, self.processor, self.model = recipe, args, processor, model
        self.data, self.memory_batches = recipe["data"], None
        self.episodes = self.data.get("episodes")
        self.prompt = model.default_prompt(1)[0].tolist()
        self.validation = load_validation(self.data)
        augmentation = self.data.get("augmentation")
        self.augment = None if augmentation is None else image_augmentation(**augmentation)
        self.collator, self.eval_collator = self.caption_collator(self.augment), self.caption_collator(None)
        self.rows = self.load_stream() if self.data.get("stream") is not None else self.load_rows()
        if recipe.get("calibration_rows"):
            calibrate_adapter(model, self.eval_collator, self.sample(recipe["calibration_rows"]))
        if self.data.get("vision_cache"):
            self.keep_features()
        elif self.episodes:
            self.teach_pictures()

    def caption_collator(self, augment, cls=CaptionCollator, **kwargs) -> CaptionCollator:
        data = self.data
        kwargs |= {"seed": self.args.seed, "max_caption_tokens": data.get("max_caption_tokens")}
        share = data.get("max_unreadable_share", 0.01)
        return cls(self.processor, self.prompt, augment, data.get("image_size"), share, **kwargs)

    def load_rows(self):
        data = self.data
        if is_remote(data["train"] if isinstance(data["train"], str) else data["train"][0]):
            raise ValueError("data.train on the Hub is read as a stream: set data.stream, or download its files first.")
        return load_rows(data["train"], data.get("format"), data.get("exclude_copyleft", False), data.get("limit"))

    def load_stream(self) -> CaptionStream:
        data, args = self.data, self.args
        if data.get("exclude_copyleft"):
            raise ValueError("data.exclude_copyleft needs all rows at once: not with data.stream.")
        rows = load_stream(data["train"], data.get("format"), data.get("revision"))
        place = {"rank": args.process_index, "world_size": args.world_size}
        if args.train_sampling_strategy == "group_by_length":
            place["group_size"] = args.train_batch_size * args.gradient_accumulation_steps
        return CaptionStream(rows, args.seed, limit=data.get("limit"), **place, **data["stream"])

    def sample(self, count: int) -> list[dict]:
        """So many training rows, the same on every rank."""
        if isinstance(self.rows, CaptionStream):
            whole = CaptionStream(self.rows.rows, self.args.seed, shuffle_buffer=count)
            return list(islice(whole, count))
        return list(self.rows.shuffle(seed=self.args.seed).select(range(min(count, len(self.rows)))))

    def keep_features(self) -> None:
        """Features of a frozen vision tower instead of pictures, and of grey copies for the memory."""
        data, model, tower = self.data, self.model, self.model.model.vision_tower
        if any(p.requires_grad for p in tower.parameters()):
            raise ValueError("data.vision_cache needs a frozen vision tower, but `trainable` matches its parameters.")
        cache, gray = data["vision_cache"], None
        transform = json.dumps(data.get("augmentation"), sort_keys=True)
        copies = bool(self.episodes and model.config.memory_config.gray_weight)

        def features_of(rows, collator, views, transform):
            with self.args.main_process_first(desc="vision features"):
                return cache_vision_features(tower, collator, rows, views, cache["folder"], transform)

        features, readable = features_of(self.rows, self.collator, cache["views"], transform)
        if len(readable) < len(self.rows):
            print(
                f"{len(self.rows) - len(readable)} of {len(self.rows)} training rows could not be read: skipped",
                flush=True,
            )
        if copies:
            gray, _ = features_of(self.rows, self.caption_collator(gray_copy), 1, "gray")
        self.rows = readable
        if not self.episodes:
            self.collator = FeatureCollator(features, self.processor, self.prompt)
            self.collator.max_caption_tokens = data.get("max_caption_tokens")
            return
        skip = tower.num_prefix_tokens
        pool = model.model.memory.key_encoder.pool
        pool_all = lambda view: torch.cat([pool(part, skip) for part in view.split(512)])  # noqa: E731
        pooled = torch.stack([pool_all(view) for view in features])
        model.model.memory.key_encoder.calibrate(pooled.flatten(0, 1))
        self.collator = self.episode_collator(features, pooled, None if gray is None else pool_all(gray[0]), readable)
        model.model.memory.calibrate_words(self.collator.sentences())
        if count := self.recipe.get("evaluation", {}).get("memory"):
            if self.validation is None:
                raise ValueError("evaluation.memory needs data.validation.")
            features, rows = features_of(self.validation, self.caption_collator(self.augment), 2, transform)
            gray = features_of(self.validation, self.caption_collator(gray_copy), 1, "gray")[0] if copies else None
            pooled = torch.stack([pool_all(view) for view in features])
            collator = self.episode_collator(features, pooled, None if gray is None else pool_all(gray[0]), rows)
            self.memory_batches = self.batches_of(collator, rows, count)

    def episode_collator(self, features, pooled, gray, rows) -> EpisodeCollator:
        if "concept" not in rows.column_names:
            raise ValueError("data.episodes needs a column `concept`: which pictures show the same thing.")
        images = EpisodeImages(features, pooled, gray, rows["caption"][:], rows["concept"][:])
        options = EpisodeOptions(**{"seed": self.args.seed, **self.episodes})
        longest = self.model.config.memory_config.max_content_tokens
        return EpisodeCollator(images, self.processor, self.prompt, longest, options)

    def teach_pictures(self) -> None:
        """Episodes of pictures as they come."""
        memory = self.model.config.memory_config
        make = lambda augment: self.caption_collator(  # noqa: E731
            augment, ImageEpisodeCollator, max_tokens=memory.max_content_tokens, **self.episodes
        )
        batch = self.args.per_device_train_batch_size
        if batch % self.episodes["size"]:
            raise ValueError(f"a batch of {batch} does not divide into episodes of {self.episodes['size']}.")
        self.collator = make(self.augment)
        if count := self.recipe.get("calibration_rows"):
            captions = [row["caption"] for row in self.sample(count) if isinstance(row["caption"], str)]
            self.model.model.memory.calibrate_words(text_ids(self.processor.tokenizer, captions))
        if self.validation is not None and (count := self.recipe.get("evaluation", {}).get("memory")):
            self.memory_batches = self.batches_of(make(self.augment), self.validation, count)

    def batches_of(self, collator, rows, count: int) -> list[dict]:
        size = self.args.per_device_train_batch_size
        count = min(count, len(rows) // size)
        if not count:
            raise ValueError(f"evaluation.memory needs {size} validation rows, there are {len(rows)}.")
        order = list(range(len(rows)))
        random.Random(self.args.seed).shuffle(order)
        return [collator([rows[i] for i in order[k * size : (k + 1) * size]]) for k in range(count)]
