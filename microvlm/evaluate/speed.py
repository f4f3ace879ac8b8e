"""Measure seconds per caption and bytes on disk."""

import time
from statistics import median

import torch
from transformers import PreTrainedModel
from transformers.generation import BaseStreamer

from ..data.rows import decode_row
from ..hub import weight_files
from .captions import NEW_TOKENS, caption_rows

SPEED_IMAGES = 64


class Clock(BaseStreamer):
    """Note the time of the prompt and of each new token."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def time_generate(model: PreTrainedModel, new_tokens: int, **inputs: torch.Tensor) -> tuple[float, float]:
    """Time greedy generation of 2 or more tokens: seconds to the first, and tokens per second after it."""
    clock = Clock()
    start = time.perf_counter()
    model.generate(
        **inputs, streamer=clock, do_sample=False, num_beams=1, min_new_tokens=new_tokens, max_new_tokens=new_tokens
    )
    times = clock.times[1:]  # the first entry is the prompt
    return times[0] - start, (new_tokens - 1) / (times[-1] - times[0])


def speed_scores(model, processor, rows, batch_size: int = 16, repeats: int = 3) -> dict[str, float | int | str]:
    """Time one image, and batches with reading and decoding; medians of `repeats` rounds after a first one."""
    rows = rows.select(range(min(SPEED_IMAGES, len(rows))))
    image = decode_row(rows[0], processor.image_processor)[0]
    prompt = model.default_prompt(1)
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    first, rate, whole = [], [], []
    for _ in range(repeats + 1):
        # one image, alone
        start = time.perf_counter()
        pixel_values = processor.image_processor([image], return_tensors="pt")["pixel_values"].to(model.device)
        prepared = time.perf_counter() - start
        seconds, tokens = time_generate(model, NEW_TOKENS, **inputs, pixel_values=pixel_values)
        # all images, in batches
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


def size_scores(model, name: str, revision: str = "main") -> dict[str, float | int]:
    """Count parameters, bytes of the weights on disk and bits a parameter."""
    # a tied parameter counts once, a packed weight with all the parameters it stands for
    config = type(model.config).from_dict(model.config.to_dict())
    with torch.device("meta"):
        parameters = sum(p.numel() for p in type(model)(config).parameters())
    stored = sum(file.stat().st_size for file in weight_files(name, revision))
    return {"parameters": parameters, "weights_bytes": stored, "bits_per_parameter": 8 * stored / parameters}
