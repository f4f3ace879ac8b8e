"""Subjects of the speed measurement: MicroVLM, other captioners and llama.cpp, each in a process of its own."""

import ctypes
import importlib.util
import logging
import multiprocessing
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText

from benchmarks.machine import peak_memory, reset_peak, resident_memory, seconds
from benchmarks.models import (
    SHAPES,
    TEXT_TOKENS,
    build_on_meta,
    load_weights,
    make_image_processor,
    make_prompt,
    nf4_config,
    v_config,
    write_random,
)
from microvlm.evaluate.speed import Clock
from microvlm.export.gguf import add_tensors, gguf_tensors, write_config
from microvlm.model import MicroVLMConfig
from microvlm.train.setup import unquantized_modules

THREADS = 2
IMAGE_SIZE = (640, 640)  # pixels; square, so that SmolVLM cuts it into 4 x 4 tiles
CAPTION = 32  # tokens
MOST_TOKENS = 400  # BLIP has 512 positions
CONTEXT = 512  # positions of llama.cpp's cache
ENVIRONMENT = {"OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


# --- weight files


def write_peer(name: str, small: bool, folder: Path) -> None:
    """Write a captioner of random weights in bf16."""
    torch.manual_seed(0)
    shape = SHAPES[name]
    getattr(transformers, shape.model)(shape.config(small)).to(torch.bfloat16).save_pretrained(folder)


def write_nf4(source: Path, folder: Path) -> None:
    """Write vision tower and language model in NF4, before any pass repacks the weights."""
    quantization = nf4_config(unquantized_modules(build_on_meta(MicroVLMConfig.from_pretrained(source)), []))
    model = AutoModelForImageTextToText.from_pretrained(source, dtype="auto", quantization_config=quantization)
    model.save_pretrained(folder)


def write_gguf(source: Path, path: Path) -> None:
    """Write the language model in BF16, without a vocabulary."""
    import gguf

    model = load_weights(source)
    writer = gguf.GGUFWriter(path, model.config.text_config.model_type)
    write_config(writer, model, "V", "bf16")
    writer.add_tokenizer_model("none")
    add_tensors(writer, gguf_tensors(model), "bf16")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quiet_llama_cpp():
    """Import llama.cpp and silence it."""
    import llama_cpp

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    return llama_cpp


def quantize_gguf(source: Path, kind: str, path: Path) -> None:
    """Quantise a GGUF in BF16 with llama.cpp's own quantizer; "+head": the tied embedding too, whatever it chooses."""
    import gguf

    llama_cpp = quiet_llama_cpp()
    options, layers = llama_cpp.llama_model_quantize_default_params(), kind.removesuffix("+head")
    options.nthread, options.ftype = THREADS, getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{layers}")
    if layers != kind:
        options.output_tensor_type = options.token_embedding_type = gguf.GGMLQuantizationType[layers].value
    failed = llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(options))
    assert not failed, f"llama.cpp could not quantise {source.name} to {kind}"


@dataclass
class Scratch:
    """Weight files of a run, each written when first used."""

    folder: Path
    small: bool

    def make(self, name: str, write: Callable[[Path], None]) -> Path:
        path = self.folder / name
        if not path.exists():
            duration, _ = seconds(lambda: write(path))
            print(f"{name} written in {duration:.1f} s", file=sys.stderr, flush=True)
        return path

    def v(self) -> Path:
        return self.make("v", partial(write_random, v_config(self.small)))

    def nf4(self) -> Path:
        return self.make("v-nf4", partial(write_nf4, self.v()))

    def peer(self, name: str) -> Path:
        return self.make(name, partial(write_peer, name, self.small))

    def gguf(self, kind: str) -> Path:
        source = self.make("v-BF16.gguf", partial(write_gguf, self.v()))
        return source if kind == "BF16" else self.make(f"v-{kind}.gguf", partial(quantize_gguf, source, kind))


# --- subjects


@dataclass
class Subject(ABC):
    """What is measured: its name in the tables, and its weights, a folder or a GGUF."""

    name: str
    path: Path
    sees = True

    @abstractmethod
    def load(self) -> None:
        """Open the weights as their users do."""

    @abstractmethod
    def emit(self, new_tokens: int) -> list[float]:
        """Generate; returns the seconds from the image to each new token."""

    def disk_bytes(self) -> int:
        files = self.path.glob("*.safetensors") if self.path.is_dir() else [self.path]
        return sum(file.stat().st_size for file in files)

    def turn(self, new_tokens: int) -> dict[str, float]:
        """Time the first token, the caption's last, and tokens per second after the first."""
        times = self.emit(new_tokens)
        assert len(times) == new_tokens, f"{self.name} gave {len(times)} tokens instead of {new_tokens}"
        rate = (new_tokens - 1) / (times[-1] - times[0])
        return {"first": times[0], "caption": times[CAPTION - 1], "rate": rate}

    def open(self, new_tokens: int) -> dict:
        """Load, take a turn that does not count, and measure what never changes."""
        reset_peak()
        self.before = resident_memory()
        load_seconds, _ = seconds(self.load)
        self.turn(new_tokens)
        measured = {"load": load_seconds, "disk": self.disk_bytes()}
        return measured | {"positions": self.positions, "sees": self.sees}

    def close(self) -> int | None:
        """Read the peak memory since before loading, bytes."""
        peak = peak_memory()
        return None if peak is None else peak - self.before


class TransformersSubject(Subject):
    """A model of transformers, which `generate()` runs on an image and, with `ids`, on text."""

    ids = None

    @property
    def positions(self) -> int:
        """Count the prompt's tokens; without text it is the start token."""
        return 1 if self.ids is None else self.ids.shape[1]

    def inputs(self, image: Image.Image) -> dict[str, torch.Tensor]:
        """Make the inputs of `generate()` from an image."""
        pixels = self.image_processor(image, return_tensors="pt")
        text = {} if self.ids is None else {"input_ids": self.ids, "attention_mask": torch.ones_like(self.ids)}
        return {**pixels, "pixel_values": pixels["pixel_values"].to(self.model.dtype), **text}

    def emit(self, new_tokens: int) -> list[float]:
        image, clock = Image.effect_noise(IMAGE_SIZE, 64).convert("RGB"), Clock()
        start = time.perf_counter()
        length = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
        self.model.generate(**self.inputs(image), streamer=clock, do_sample=False, num_beams=1, **length)
        return [t - start for t in clock.times[1:]]  # the first entry is the prompt


class MicroVLM(TransformersSubject):
    """A MicroVLM checkpoint: one image, then text."""

    def load(self) -> None:
        self.model = load_weights(self.path)
        self.image_processor = make_image_processor(self.model)
        self.ids = make_prompt(self.model)


@dataclass
class Captioner(TransformersSubject):
    """A published shape, by its name in SHAPES, that takes an image and no text."""

    shape: str

    def load(self) -> None:
        shape = SHAPES[self.shape]
        self.model = getattr(transformers, shape.model).from_pretrained(self.path, dtype="auto").eval()
        self.image_processor = getattr(transformers, shape.image_processor)(**self.processor_options())

    def processor_options(self) -> dict:
        config = self.model.config
        side = (config.encoder if self.shape == "ViT-GPT2" else config.vision_config).image_size
        square = {"height": side, "width": side}
        if self.shape == "GIT-base":
            return {"size": {"shortest_edge": side}, "crop_size": square}
        return {"size": square}


@dataclass
class SmolVLM(Captioner):
    """SmolVLM's shape: an image in tiles (1, or 17: 4 x 4 and the whole), then text."""

    tiles: int = 1

    def load(self) -> None:
        super().load()
        config = self.model.config
        per_tile = (config.vision_config.image_size // config.vision_config.patch_size // config.scale_factor) ** 2
        tile = [0, 0, *[config.image_token_id] * per_tile]  # separators are tokens like any other
        self.ids = torch.tensor([tile * self.tiles + list(range(3, 3 + TEXT_TOKENS))])

    def processor_options(self) -> dict:
        side = self.model.config.vision_config.image_size
        split = self.tiles > 1
        longest = {"longest_edge": 4 * side if split else side}
        return {"do_image_splitting": split, "size": longest, "max_image_size": {"longest_edge": side}}


@dataclass
class LlamaCpp(Subject):
    """A language model in llama.cpp with a prompt of `positions` text tokens, driven by its C functions."""

    positions: int
    sees = False

    def load(self) -> None:
        self.lib = library = quiet_llama_cpp()
        library.llama_backend_init()
        self.model = library.llama_model_load_from_file(str(self.path).encode(), library.llama_model_default_params())
        assert self.model, f"llama.cpp cannot open {self.path.name}"
        options = library.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = CONTEXT
        options.n_threads = options.n_threads_batch = THREADS
        self.context = library.llama_init_from_model(self.model, options)
        self.sampler = library.llama_sampler_init_greedy()

    def emit(self, new_tokens: int) -> list[float]:
        library = self.lib
        library.llama_memory_clear(library.llama_get_memory(self.context), True)
        tokens = (library.llama_token * self.positions)(*range(3, 3 + self.positions))
        times, start = [], time.perf_counter()
        for _ in range(new_tokens):
            failed = library.llama_decode(self.context, library.llama_batch_get_one(tokens, len(tokens)))
            assert not failed, f"llama.cpp could not run {self.path.name}"
            token = library.llama_sampler_sample(self.sampler, self.context, -1)
            times.append(time.perf_counter() - start)
            tokens = (library.llama_token * 1)(token)
        return times


def make_llama_cpp(name: str, scratch: Scratch) -> LlamaCpp:
    """Prepare V's language model in llama.cpp; as many text tokens as MicroVLM has positions."""
    kind = name.split()[-1]
    return LlamaCpp(name, scratch.gguf(kind), v_config(scratch.small).num_prefix_tokens + TEXT_TOKENS)


KINDS = ("BF16", "Q8_0", "Q4_0", "TQ2_0", "TQ1_0", "Q4_0+head")
LLAMA_CPP = {f"llama.cpp V {kind}": make_llama_cpp for kind in KINDS}
CATALOGUE: dict[str, Callable[[str, Scratch], Subject]] = {
    "V bf16": lambda name, scratch: MicroVLM(name, scratch.v()),
    "V NF4": lambda name, scratch: MicroVLM(name, scratch.nf4()),
    **LLAMA_CPP,
    "SmolVLM-256M x1": lambda name, scratch: SmolVLM(name, scratch.peer("SmolVLM-256M"), "SmolVLM-256M"),
    "SmolVLM-256M x17": lambda name, scratch: SmolVLM(name, scratch.peer("SmolVLM-256M"), "SmolVLM-256M", 17),
    **dict.fromkeys(
        ("BLIP-base", "GIT-base", "ViT-GPT2"), lambda name, scratch: Captioner(name, scratch.peer(name), name)
    ),
}


def has_llama_cpp() -> bool:
    return all(importlib.util.find_spec(module) for module in ("llama_cpp", "gguf"))


# --- processes


def start(subject: Subject) -> None:
    """Prepare a process for its subject."""
    global SUBJECT
    torch.set_num_threads(THREADS)
    transformers.utils.logging.disable_progress_bar()
    SUBJECT = subject


def call(method: str, args: tuple):
    return getattr(SUBJECT, method)(*args)


class Worker:
    """A subject in a process of its own."""

    def __init__(self, subject: Subject):
        self.name = subject.name
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), start, (subject,))

    def ask(self, method: str, *args):
        """Call a method of the subject; returns its result, or raises its error."""
        with mock.patch.dict(os.environ, ENVIRONMENT):  # of the process, which starts with the first call
            return self.pool.submit(call, method, args).result()

    def stop(self) -> None:
        self.pool.shutdown()
