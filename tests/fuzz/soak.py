"""Caption for as long as one likes, with a memory that is written and forgotten."""

import gc
import random
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
import torch
from transformers import AutoProcessor
from transformers.utils import logging

from microvlm.model import MemoryState, MicroVLMForConditionalGeneration, open_image

from .material import PROMPT, ROOT, packed_nano


def memory_now(field: str = "VmRSS") -> float:
    """Resident memory of this process in MB; `VmHWM` for its peak since `reset_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {field}.")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def quiet() -> None:
    warnings.simplefilter("ignore")
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    torch.set_num_threads(1)


def soak(captions: int, seed: int = 0, checkpoint: Path | None = None, every: int = 500) -> dict:
    """Captions of the example pictures in batches of 1 to 4 with a memory that is written and forgotten on the way.

    Every tenth caption a fact is written, and one is forgotten as soon as 32 are stored; every 25th, a question in words.

    Returns:
        resident memory at the samples and its slope over the last 80 %, MB per 1,000 captions; whether the captions of the example
        pictures are the same at the end; how far the memory is from a fresh one when one fact is left, and when none is.
    """
    every = min(every, max(1, captions // 10))  # a slope needs more than one sample
    rng = random.Random(seed)
    processor = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)
    paths = sorted((ROOT / "examples").glob("*.png"))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = checkpoint or packed_nano(Path(folder))
        model = MicroVLMForConditionalGeneration.from_pretrained(checkpoint).eval()

    @torch.inference_mode()
    def caption(pictures: list, memory=None) -> list[str]:
        inputs = processor(
            images=[[p] for p in pictures], text=[PROMPT] * len(pictures), padding=True, return_tensors="pt"
        )
        out = model.generate(**inputs.to(model.device, model.dtype), memory=memory, max_new_tokens=32, do_sample=False)
        return processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def write(memory, path, sentence: str):
        inputs = processor(images=open_image(path), text=f"<image>{sentence}", return_tensors="pt")
        return model.write_memory(memory, **inputs.to(model.device, model.dtype))

    before = caption([open_image(path) for path in paths])
    memory, done, writes, forgets, questions, samples = model.new_memory(), 0, 0, 0, 0, []
    started = time.perf_counter()
    while done < captions:
        size = min(rng.randint(1, 4), captions - done)
        caption([open_image(rng.choice(paths)) for _ in range(size)], memory if rng.random() < 0.7 else None)
        for number in range(done + 1, done + size + 1):
            if number % 10 == 0:
                memory, writes = write(memory, rng.choice(paths), f"This is number {number} the thing."), writes + 1
                if int(memory.counts[0]) >= 32:
                    memory, forgets = model.forget(memory, rng.randrange(int(memory.counts[0]))), forgets + 1
            if number % 25 == 0:
                question = processor(
                    text=f"<|user|>Who is number {rng.randrange(number)}?<|assistant|>", return_tensors="pt"
                )
                with torch.inference_mode():
                    model.generate(**question.to(model.device), memory=memory, max_new_tokens=16, do_sample=False)
                questions += 1
            if number % every == 0 or number == captions:
                samples.append((number, memory_now()))
        done += size
    seconds = time.perf_counter() - started

    last = int(memory.counts[0]) - 1  # one fact left, the last written: as if the others had never been
    while int(memory.counts[0]) > 1:
        memory, forgets = model.forget(memory, 0), forgets + 1
    fresh = model.new_memory()
    one = fresh.write(memory.addresses, memory.contents) if last >= 0 else fresh
    one_left = distance(memory, one)
    if last >= 0:
        memory, forgets = model.forget(memory, 0), forgets + 1
    gc.collect()
    tail = [s for s in samples if s[0] > captions * 0.2]
    slope = float(np.polyfit(*zip(*tail), 1)[0] * 1000) if len(tail) > 1 else float("nan")
    return {
        "kind": "soak",
        "captions": done,
        "writes": writes,
        "forgets": forgets,
        "questions": questions,
        "seconds": seconds,
        "start_mb": samples[0][1],
        "end_mb": samples[-1][1],
        "slope_mb_per_1000": slope,
        "same_captions": caption([open_image(path) for path in paths]) == before,
        "one_left": one_left,
        "none_left": distance(memory, fresh),
        "samples": samples,
    }


def distance(a: MemoryState, b: MemoryState) -> float:
    """The largest difference of any number of two posteriors."""
    return max(float((getattr(a, n) - getattr(b, n)).abs().max()) for n in ("mean", "covariance", "log_det"))


def run_soak(connection, captions: int, seed: int) -> None:
    quiet()
    try:
        connection.send(soak(captions, seed))
    except Exception:
        connection.send(traceback.format_exc())
