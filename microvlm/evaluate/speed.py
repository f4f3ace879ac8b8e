"""Measure seconds per caption and bytes on disk."""

import json
import time
from pathlib import Path
from statistics import median

import torch
from transformers import PreTrainedModel
from transformers.generation import BaseStreamer
from transformers.utils import cached_file

from ..data.rows import decode_row
from .captions import NEW_TOKENS, caption_rows

SPEED_IMAGES = 64


class Clock(BaseStreamer):
    """Notes when `generate()` hands over the prompt and then each new token."""

    def __init__(self):
        self.times = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def time_generate(model: PreTrainedModel, new_tokens: int, **inputs: torch.Tensor) -> tuple[float, float]:
    """Greedy generation.

    Args:
        new_tokens: how many, 2 or more; the end-of-text token does not stop it.
        inputs: of `generate()`.

    Returns:
        Seconds to the first token, and tokens per second behind it.

    Raises:
        RuntimeError: another number of tokens came.
    """
    clock = Clock()
    started = time.perf_counter()
    model.generate(
        **inputs, streamer=clock, do_sample=False, num_beams=1, min_new_tokens=new_tokens, max_new_tokens=new_tokens
    )
    times = clock.times[1:]  # the first entry is the prompt
    if len(times) != new_tokens:
        raise RuntimeError(f"generate() gave {len(times)} tokens, {new_tokens} were asked for.")
    return times[0] - started, (new_tokens - 1) / (times[-1] - times[0])


def speed_scores(model, processor, rows, batch_size: int = 16, repeats: int = 3) -> dict[str, float | int | str]:
    """Seconds to the first token of one picture, tokens a second behind it, and pictures a second in batches with reading and decoding;
    medians of `repeats` after one round that does not count.
    """
    rows = rows.select(range(min(SPEED_IMAGES, len(rows))))
    picture = decode_row(rows[0], processor.image_processor)[0]
    prompt = model.default_prompt(1)
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    first, rate, whole = [], [], []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        pixel_values = processor.image_processor([picture], return_tensors="pt")["pixel_values"].to(model.device)
        prepared = time.perf_counter() - start
        seconds, tokens = time_generate(model, NEW_TOKENS, **inputs, pixel_values=pixel_values)
        start = time.perf_counter()
        caption_rows(model, processor, rows, batch_size)
        whole.append(len(rows) / (time.perf_counter() - start))
        first.append(prepared + seconds)
        rate.append(tokens)
    return {
        "first_token_seconds": median(first[1:]),
        "tokens_per_second": median(rate[1:]),
        "pictures_per_second": median(whole[1:]),
        "batch_size": min(batch_size, len(rows)),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def weight_files(name: str, revision: str | None = None) -> list[Path]:
    """The safetensors files of a checkpoint in a folder or of the Hub, already loaded once.

    Raises:
        OSError: there are none.
    """
    options = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    for single in ("model.safetensors", "adapter_model.safetensors"):
        if (file := cached_file(name, single, **options)) is not None:
            return [Path(file)]
    index = cached_file(name, "model.safetensors.index.json", **options)
    if index is None:
        raise OSError(f"{name} has no safetensors files.")
    shards = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
    return [Path(cached_file(name, shard, revision=revision)) for shard in shards]


def size_scores(model, name: str, revision: str | None = None) -> dict[str, float | int]:
    """Parameters, a tied one once and packed ones as many as they stand for; bytes of the weights on the disk; bits a parameter."""
    config = type(model.config).from_dict(model.config.to_dict())
    with torch.device("meta"):
        parameters = sum(p.numel() for p in type(model)(config).parameters())
    stored = sum(file.stat().st_size for file in weight_files(name, revision))
    return {"parameters": parameters, "weights_bytes": stored, "bits_per_parameter": 8 * stored / parameters}
