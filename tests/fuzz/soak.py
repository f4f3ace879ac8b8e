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
    """Read the resident memory of this process in MB.

    Args:
        field: `VmHWM` for its peak since `reset_peak`; `RssAnon` without the pages of files, which the kernel drops and
            reads again as it likes.
    """
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


class Soak:
    """A model that captions the example images, with a memory, and what it did.

    Args:
        checkpoint: of the model; None: this repo's, packed.
        seed: of the choices.
    """

    def __init__(self, checkpoint: Path | None, seed: int):
        self.rng = random.Random(seed)
        self.processor = AutoProcessor.from_pretrained(ROOT)
        self.paths = sorted((ROOT / "examples").glob("*.png"))
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = checkpoint or packed_nano(Path(folder))
            self.model = MicroVLMForConditionalGeneration.from_pretrained(checkpoint).eval()
        self.memory = self.model.new_memory()
        self.counts = {"captions": 0, "writes": 0, "forgets": 0, "questions": 0}

    @torch.inference_mode()
    def caption(self, paths: list[Path], memory=None) -> list[str]:
        images, texts = [[open_image(path)] for path in paths], [PROMPT] * len(paths)
        inputs = self.processor(images=images, text=texts, padding=True, return_tensors="pt")
        inputs = inputs.to(self.model.device, self.model.dtype)
        out = self.model.generate(**inputs, memory=memory, max_new_tokens=32, do_sample=False)
        return self.processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    @torch.inference_mode()
    def ask(self, text: str) -> None:
        question = self.processor(text=f"<|user|>{text}<|assistant|>", return_tensors="pt").to(self.model.device)
        self.model.generate(**question, memory=self.memory, max_new_tokens=16, do_sample=False)
        self.counts["questions"] += 1

    def write(self, sentence: str) -> None:
        image = open_image(self.rng.choice(self.paths))
        inputs = self.processor(images=image, text=f"<image>{sentence}", return_tensors="pt")
        self.memory = self.model.write_memory(self.memory, **inputs.to(self.model.device, self.model.dtype))
        self.counts["writes"] += 1

    def forget(self, number: int) -> None:
        self.memory = self.model.forget(self.memory, number)
        self.counts["forgets"] += 1

    @property
    def facts(self) -> int:
        return int(self.memory.counts[0])

    def step(self, size: int) -> None:
        """Caption a batch; every tenth caption writes a fact, every 25th asks, and never more than 32 are stored."""
        rng = self.rng
        self.caption([rng.choice(self.paths) for _ in range(size)], self.memory if rng.random() < 0.7 else None)
        for number in range(self.counts["captions"] + 1, self.counts["captions"] + size + 1):
            if number % 10 == 0:
                self.write(f"This is number {number} the thing.")
                if self.facts >= 32:
                    self.forget(rng.randrange(self.facts))
            if number % 25 == 0:
                self.ask(f"Who is number {rng.randrange(number)}?")
        self.counts["captions"] += size


def soak(captions: int, seed: int = 0, checkpoint: Path | None = None, every: int = 500) -> dict:
    """Caption the example images in batches of 1 to 4, with a memory that is written and forgotten.

    Returns:
        Counts; resident memory at the samples and its slope over the last 80 %, MB per 1,000 captions; whether the
        captions are the same at the end; how far the memory is from a fresh one with one fact left, and with none.
    """
    every = min(every, max(1, captions // 10))  # a slope needs more than one sample
    run = Soak(checkpoint, seed)
    before, samples, start = run.caption(run.paths), [], time.perf_counter()
    while (done := run.counts["captions"]) < captions:
        run.step(min(run.rng.randint(1, 4), captions - done))
        if run.counts["captions"] // every > done // every or run.counts["captions"] == captions:
            samples.append((run.counts["captions"], memory_now("RssAnon")))
    seconds = time.perf_counter() - start
    # one fact left, the last: as if the others had never been; then none
    fresh = run.model.new_memory()
    while run.facts > 1:
        run.forget(0)
    one = fresh.write(run.memory.addresses, run.memory.contents) if run.facts else fresh
    one_left = distance(run.memory, one)
    if run.facts:
        run.forget(0)
    # the slope of the memory of the process
    gc.collect()
    tail = [s for s in samples if s[0] > captions * 0.2]
    slope = float(np.polyfit(*zip(*tail), 1)[0] * 1000) if len(tail) > 1 else float("nan")
    return run.counts | {
        "kind": "soak",
        "seconds": seconds,
        "start_mb": samples[0][1],
        "end_mb": samples[-1][1],
        "slope_mb_per_1000": slope,
        "same_captions": run.caption(run.paths) == before,
        "one_left": one_left,
        "none_left": distance(run.memory, fresh),
        "samples": samples,
    }


def distance(a: MemoryState, b: MemoryState) -> float:
    """Find the largest difference of any number of two posteriors."""
    return max(float((getattr(a, n) - getattr(b, n)).abs().max()) for n in ("mean", "covariance", "log_det"))


def run_soak(connection, captions: int, seed: int) -> None:
    quiet()
    try:
        connection.send(soak(captions, seed))
    except Exception:
        connection.send(traceback.format_exc())
