"""Threads that use packed models in every way at once, while torch's defaults change under them.

Every thread loads checkpoints of several dtypes, changes the defaults of the process and its own number of threads,
captions with and without a memory, streams, cancels, forks, and drops models. Every answer is compared with the one
that a quiet process gave. The parent counts dead processes and hangs.

With `guarded`, all that kernels read and write lies between pages that nobody may touch: a byte too far ends the
process.
"""

import ctypes
import gc
import mmap
import multiprocessing
import os
import random
import signal
import threading
import time
import traceback
from collections import Counter
from pathlib import Path

import torch
from microvlm.llvm_microvlm import BUILDING
from transformers import AutoProcessor, StoppingCriteria, TextIteratorStreamer

from microvlm import cache_microvlm as cache, decoder_microvlm as decoder, kernels_microvlm as kernels
from microvlm.model import MicroVLMForConditionalGeneration, open_image

from .material import PROMPT, ROOT
from .soak import quiet

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FACT = "<image>This is Bimo the swan."
PAGE, LIBC = mmap.PAGESIZE, ctypes.CDLL(None, use_errno=True)


class GuardedMemory(mmap.mmap):
    """Pages between two that nobody may touch."""

    def __new__(cls, size: int):
        pages = -(-max(size, 1) // PAGE)
        self = super().__new__(cls, -1, (pages + 2) * PAGE)
        self.size = pages * PAGE
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self))
        for page in (self.start, self.start + PAGE + self.size):
            if LIBC.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), 0):
                raise OSError(ctypes.get_errno(), "mprotect")
        return self


def guarded_tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Allocate a tensor whose last byte lies before a page that nobody may touch."""
    size = torch.Size(shape).numel() * dtype.itemsize
    memory = GuardedMemory(size)
    # kernels need the alignment of their elements only
    offset = PAGE + memory.size - size
    flat = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=offset) if size else torch.empty(0)
    return flat.view(dtype).view(shape) if size else torch.empty(shape, dtype=dtype, device="cpu")


def guarded_copy(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return tensor if tensor is None else guarded_tensor(*tensor.shape, dtype=tensor.dtype).copy_(tensor)


def guard() -> None:
    """Put all tensors that kernels read and write between guard pages."""
    # what they write
    kernels.new = decoder.new = guarded_tensor

    # what they read: copies, alive during a call or as long as their owner
    def copying(function):
        return lambda *args, **kwargs: function(
            *(guarded_copy(x) if isinstance(x, torch.Tensor) else x for x in args),
            **{k: guarded_copy(x) if isinstance(x, torch.Tensor) else x for k, x in kwargs.items()},
        )

    kernels.quantize = copying(kernels.quantize)
    kernels.Eager.quantize = staticmethod(kernels.quantize)
    kernels.low_bit_linear_quantized = copying(kernels.low_bit_linear_quantized)
    check_matrix, look, reserve = kernels.Matrix.__post_init__, decoder.CacheView.__init__, cache.GrowingLayer.reserve

    def post_init(self):
        for name in ("panels", "scale"):
            object.__setattr__(self, name, guarded_copy(getattr(self, name)))
        check_matrix(self)

    def init(self, *args):
        look(self, *args)
        self.memory = [pair and tuple(map(guarded_copy, pair)) for pair in self.memory]

    def reserve_guarded(self, count):
        reserve(self, count)
        for name in ("kept_keys", "kept_values"):
            kept = getattr(self, name)
            if kept.numel() and not hasattr(kept, "guarded"):
                setattr(self, name, guarded_copy(kept))
                getattr(self, name).guarded = True

    kernels.Matrix.__post_init__, decoder.CacheView.__init__ = post_init, init
    cache.GrowingLayer.reserve = reserve_guarded


class Cancelled(StoppingCriteria):
    """Stop after a few tokens."""

    def __init__(self, after: int):
        self.left = after

    def __call__(self, input_ids, scores, **kwargs):
        self.left -= 1
        return torch.full((len(input_ids),), self.left < 0, dtype=torch.bool, device=input_ids.device)


class Asker:
    """Questions to a model: each takes a model and an image, and returns what is said."""

    def __init__(self):
        self.processor = AutoProcessor.from_pretrained(ROOT)
        self.paths = sorted((ROOT / "examples").glob("*.png"))[:4]
        self.device = "cpu"  # torch's default one during a call

    def inputs(self, model, path: Path, text: str = PROMPT):
        return self.processor(images=open_image(path), text=text, return_tensors="pt").to(model.device, model.dtype)

    def say(self, model, path: Path, **options) -> str:
        inputs = self.inputs(model, path)
        with torch.device(self.device):
            ids = model.generate(**inputs, max_new_tokens=16, do_sample=False, **options)
        return self.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

    def caption(self, model, path: Path) -> str:
        return self.say(model, path)

    def remember(self, model, path: Path) -> str:
        memory = model.write_memory(**self.inputs(model, path, FACT))
        return self.say(model, path, memory=memory, memory_gate="on")

    def stream(self, model, path: Path) -> str:
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        options = {"max_new_tokens": 16, "do_sample": False, "streamer": streamer}
        thread = threading.Thread(target=model.generate, kwargs={**self.inputs(model, path), **options})
        thread.start()
        said = "".join(streamer).strip()
        thread.join()
        return said


QUESTIONS = (Asker.caption, Asker.remember, Asker.stream)


def load(folder: str, dtype: torch.dtype):
    return MicroVLMForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()


def ask_all(folder: str) -> dict[tuple, str]:
    """Ask every model everything, in one thread."""
    asker, answers = Asker(), {}
    for dtype in DTYPES:
        model = load(folder, dtype)
        for question in QUESTIONS:
            answers |= {(dtype, question, path): question(asker, model, path) for path in asker.paths}
    return answers


class User:
    """One thread: its models, and what the answers have to be."""

    def __init__(self, seed: str, folder: str, answers: dict[tuple, str], forks: bool):
        self.rng, self.folder, self.answers, self.forks = random.Random(seed), folder, answers, forks
        self.models, self.asker = {}, Asker()

    def model(self):
        """Take one of this thread's models, or load one."""
        dtype = self.rng.choice(DTYPES)
        if dtype not in self.models:
            self.models[dtype] = load(self.folder, dtype)
        return dtype, self.models[dtype]

    def ask(self) -> None:
        (dtype, model), question = self.model(), self.rng.choice(QUESTIONS)
        path = self.rng.choice(self.asker.paths)
        said, expected = question(self.asker, model, path), self.answers[dtype, question, path]
        if said != expected:
            raise AssertionError(f"{dtype}, {question.__name__}, {path.name}: {said!r}, expected {expected!r}")

    def set_device(self) -> None:
        self.asker.device = self.rng.choice(("cpu", "meta"))

    def cancel(self) -> None:
        _, model = self.model()
        inputs = self.asker.inputs(model, self.rng.choice(self.asker.paths))
        model.generate(**inputs, max_new_tokens=16, stopping_criteria=[Cancelled(self.rng.randrange(4))])

    def set_dtype(self) -> None:
        dtype = self.rng.choice((*DTYPES, torch.float64))
        with BUILDING:  # transformers itself needs the default dtype while it loads
            torch.set_default_dtype(dtype)

    def set_threads(self) -> None:
        torch.set_num_threads(self.rng.choice((1, 2, 3, 5)))

    def drop(self) -> None:
        self.models.pop(self.rng.choice(DTYPES), None)
        gc.collect()

    def fork(self) -> None:
        """Let a child of this moment ask; it must end."""
        if not self.forks:
            return
        if (child := os.fork()) == 0:
            try:
                torch.set_num_threads(1)
                self.ask()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        deadline = time.monotonic() + 60
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                raise TimeoutError("a forked child hangs")
            time.sleep(0.01)
        if ended[1]:
            raise AssertionError(f"a forked child ended with {ended[1]}")

    def step(self) -> str:
        names = ("ask", "set_device", "cancel", "set_dtype", "set_threads", "drop", "fork")
        (name,) = self.rng.choices(names, (12, 2, 2, 3, 3, 2, 1))
        getattr(self, name)()
        return name


def run_stress(connection, folder: str, seconds: float, threads: int, seed: int, guarded: bool) -> None:
    """Run the threads in this process and send what they did."""
    quiet()
    if guarded:
        guard()
    answers, counts, errors = ask_all(folder), Counter(), []
    end = time.monotonic() + seconds

    def work(number: int) -> None:
        user = User(f"{seed}-{number}", folder, answers, forks=number == 0)
        while time.monotonic() < end and not errors:
            try:
                counts[user.step()] += 1
            except Exception:
                errors.append(traceback.format_exc(limit=-6))

    workers = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    connection.send({"counts": dict(counts), "errors": errors})


def stress(
    seconds: float, threads: int = 8, seed: int = 0, guarded: bool = False, folder: Path = ROOT, patience: float = 300
) -> dict:
    """Stress the models of a folder in a process of its own.

    Returns counts of what was done, and what went wrong: errors, a dead process, a hang.
    """
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=run_stress, args=(theirs, str(folder), seconds, threads, seed, guarded))
    os.environ["MALLOC_PERTURB_"] = "165"
    process.start()
    del os.environ["MALLOC_PERTURB_"]
    theirs.close()
    try:
        result = ours.recv() if ours.poll(seconds + patience) else {"counts": {}, "errors": ["hang"]}
    except EOFError:
        process.join()
        result = {"counts": {}, "errors": [f"the process died with {process.exitcode}"]}
    process.kill()
    process.join()
    return {"kind": "stress", "guarded": guarded, "threads": threads, "seconds": seconds} | result
