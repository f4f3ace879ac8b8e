"""Speed, memory and bytes of MicroVLM at full size beside llama.cpp and other captioners, and beside what the memory bus allows.

    python benchmarks/speed.py --json runs/speed.json --plot docs
    python benchmarks/speed.py --checkpoint "V packed=runs/v-packed" --checkpoint "M packed=runs/m-packed" --rounds 9
    python benchmarks/speed.py --write-v runs/v-random --write-standin runs/1024-random  # checkpoints to pack, then stops
    python benchmarks/speed.py --small --rounds 2

All weights are random: speed and bytes do not depend on their values. Two threads, batch 1, greedy, the end-of-text token never stops.
Notable:

- Every subject lives in a process of its own, which sleeps while another is asked. In a round every subject has one turn, in the same
  order; a turn before the rounds does not count. Numbers are medians over rounds. Ratios are medians of the rounds' ratios.
- A turn is one plain `generate()` with a streamer that reads the clock. It gives the time to the first token, to the 32nd, and the rate
  between the first token and the last. The clock starts at a decoded picture of 640 x 640 pixels, before the image processor. Token ids
  of the prompt are ready: no tokenizer runs.
- MicroVLM's prompt is one picture (25 positions in V) and 16 text tokens. SmolVLM's is 64 positions and 2 separators a tile, then 16 text
  tokens. BLIP, GIT and ViT-GPT2 get no text, as their users caption.
- llama.cpp runs V's language model alone, no picture: its first token is the pass over as many text tokens as V has positions. It is
  driven by its C functions, its own greedy sampler included: no tokens pass through llama-cpp-python's classes. GGUFs have no vocabulary.
- Quantised GGUFs are made by llama.cpp's own quantizer, with its choices: a tied head becomes Q6_K, or Q8_0 where 256 does not divide the
  width; TQ2_0 and TQ1_0 become Q4_0 where 256 does not divide a row. "+head" forces the type on the head too. The formats column says
  what a file holds. "1024" is V with a hidden size of 1024 and 16 heads, which llama.cpp can pack whole.
- NF4 is bitsandbytes as in the *_qlora recipes (vision tower and language model, double quantisation), opened from a folder that holds it.
  On processors with AVX512-BF16 its first pass repacks the weights, which the turn that does not count has done.
- Load: once, from a folder just written, so from the page cache, after torch and transformers are imported.
- Bytes on disk: *.safetensors, or the GGUF; no tokenizer, no code.
- Memory: resident size of the process less what it had before loading (Linux). `in memory` is after the turn that does not count, with free
  memory given back. It holds pages of mapped weight files as well. `peak` is the highest from loading to the last round.
- The limit: bytes of the weights that a decoding step reads, as they lie in memory, over the read bandwidth. Weights count that belong to
  modules which run in a step, each tensor once; an embedding, of which a step reads one row, does not; a GGUF counts whole, for its
  tied head. Keys and values do not count. Bandwidth is the highest seen in any round over three ways to read 512 MiB with two threads:
  sum and maximum as int64, and a float32 matrix-vector product.
- Where memory does not suffice for all subjects, they are measured in groups one after the other; a line says so.
- Run it on an idle machine.
"""

import argparse
import ctypes
import importlib.util
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from unittest import mock

import torch
import transformers
from overhead import MicroVLMImageProcessor, load, machine, prompt, seconds, write_random
from parameters import ROOT, MicroVLMConfig, MicroVLMForConditionalGeneration, markdown_table
from PIL import Image
from torch import nn
from train_throughput import peak_memory, reset_peak
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedConfig

from microvlm.evaluate.speed import Clock
from microvlm.train.setup import unquantized_modules

THREADS = 2
PICTURE = (640, 640)  # pixels; square, so that SmolVLM cuts it into 4 x 4 tiles
CAPTION = 32  # tokens
MOST_TOKENS = 400  # BLIP has 512 positions
CONTEXT = 512  # positions of llama.cpp's cache
TEXT_TOKENS = 16  # of SmolVLM's prompt, behind the picture; overhead.py gives MicroVLM's as many
BUFFER, SMALL_BUFFER, READS = 2**29, 2**23, 3
PROCESS_BYTES = 2**30  # of a worker beside its weights, generously
ENVIRONMENT = {"OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
STANDIN = {
    "text_config": {"hidden_size": 1024, "num_attention_heads": 16},
    "adapter_config": {"num_attention_heads": 16},
}
SMALL = {
    "vision_config": {"model_args": {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 64, "num_heads": 2}},
    "text_config": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "adapter_config": {
        "vision_hidden_size": 64,
        "num_patches": 16,
        "num_prefix_tokens": 5,
        "mlp_hidden_size": 32,
        "num_attention_heads": 4,
    },
    "alignment_config": {"projection_size": 32},
}
SMALL_STANDIN = {"text_config": {"hidden_size": 256, "intermediate_size": 256}}


# ---------------------------------------------------------------------------------------------- shapes and weight files


def v_config(small: bool = False, standin: bool = False) -> MicroVLMConfig:
    """V without its memory module, or the 1024-wide stand-in; tiny with `small`."""
    config = json.loads((ROOT / "configs" / "microvlm-v.json").read_text(encoding="utf-8")) | {"use_memory": False}
    changes = [STANDIN] if standin else []
    if small:
        changes = [SMALL, SMALL_STANDIN] if standin else [SMALL]
        config["image_token_id"] = 1
    for change in changes:
        for section, values in change.items():
            config[section] |= values
    return MicroVLMConfig.from_dict(config)


def smolvlm_config(small: bool) -> PreTrainedConfig:
    """SmolVLM-256M-Instruct: SigLIP base at 512 x 512 with patches of 16, SmolLM2-135M, untied head."""
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    text = {
        "model_type": "llama",
        "vocab_size": 49280,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "tie_word_embeddings": False,
    }
    side, token = 512, 49190
    if small:
        small_text = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        text |= small_text | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
        vision |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        side, token = 64, 500
    return transformers.Idefics3Config(
        vision_config=vision | {"image_size": side, "patch_size": 16},
        text_config=text,
        scale_factor=4,
        image_token_id=token,
        pad_token_id=2,
        tie_word_embeddings=False,
    )


def blip_config(small: bool) -> PreTrainedConfig:
    """BLIP-base for captioning: ViT-B/16 at 384 x 384 and a 12-layer BERT with cross-attention and a tied head."""
    text, vision = {"num_attention_heads": 12}, {"image_size": 384}
    if small:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        text, vision = sizes, sizes | {"image_size": 32}
    return transformers.BlipConfig(text_config=text, vision_config=vision)


def git_config(small: bool) -> PreTrainedConfig:
    """GIT-base: CLIP ViT-B/16 at 224 x 224 and a 6-layer decoder."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes, vision = (sizes, sizes | {"image_size": 32}) if small else ({}, {})
    return transformers.GitConfig(vision_config=vision, **sizes)


def vit_gpt2_config(small: bool) -> PreTrainedConfig:
    """ViT-GPT2: ViT-B/16 at 224 x 224 and GPT-2 with cross-attention."""
    vision, text = {}, {}
    if small:
        vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        vision, text = vision | {"image_size": 32}, {"n_embd": 64, "n_layer": 2, "n_head": 4}
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(**vision), transformers.GPT2Config(**text)
    )
    config.decoder_start_token_id = config.pad_token_id = config.decoder.bos_token_id
    config.eos_token_id = config.decoder.eos_token_id
    return config


@dataclass(frozen=True)
class Shape:
    """A published captioner: its model class, its image processor and a function for its config."""

    model: str
    image_processor: str
    config: Callable[[bool], PreTrainedConfig]


SHAPES = {
    "SmolVLM-256M": Shape("Idefics3ForConditionalGeneration", "Idefics3ImageProcessor", smolvlm_config),
    "BLIP-base": Shape("BlipForConditionalGeneration", "BlipImageProcessor", blip_config),
    "GIT-base": Shape("GitForCausalLM", "CLIPImageProcessor", git_config),
    "ViT-GPT2": Shape("VisionEncoderDecoderModel", "ViTImageProcessor", vit_gpt2_config),
}


def write_peer(shape: Shape, small: bool, folder: Path) -> None:
    """A checkpoint of random weights in bf16."""
    torch.manual_seed(0)
    getattr(transformers, shape.model)(shape.config(small)).to(torch.bfloat16).save_pretrained(folder)


def write_nf4(source: Path, folder: Path) -> None:
    """The checkpoint in `source` with vision tower and language model in NF4, saved before any pass repacks its weights."""
    with torch.device("meta"):
        empty = MicroVLMForConditionalGeneration(MicroVLMConfig.from_pretrained(source))
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=unquantized_modules(empty, []),
    )
    AutoModelForImageTextToText.from_pretrained(
        source, trust_remote_code=True, dtype="auto", quantization_config=quantization
    ).save_pretrained(folder)


def write_gguf(config: PreTrainedConfig, path: Path) -> None:
    """A Qwen2 language model with a tied head and random weights, matrices in BF16, vectors in F32, without a vocabulary."""
    import gguf

    D, inner, heads, kv_heads = (
        getattr(config, f"{name}")
        for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    )
    kv = kv_heads * D // heads
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(D)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("none")
    g = torch.Generator().manual_seed(0)

    def matrix(name: str, rows: int, columns: int) -> None:
        weight = torch.empty(rows, columns, dtype=torch.bfloat16).normal_(std=config.initializer_range, generator=g)
        writer.add_tensor(f"{name}.weight", weight.view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)

    matrix("token_embd", config.vocab_size, D)
    writer.add_tensor("output_norm.weight", torch.ones(D).numpy())
    for i in range(config.num_hidden_layers):
        for name, rows, columns in (
            ("attn_q", D, D),
            ("attn_k", kv, D),
            ("attn_v", kv, D),
            ("attn_output", D, D),
            ("ffn_gate", inner, D),
            ("ffn_up", inner, D),
            ("ffn_down", D, inner),
        ):
            matrix(f"blk.{i}.{name}", rows, columns)
        for name, size in (("attn_q", D), ("attn_k", kv), ("attn_v", kv)):
            writer.add_tensor(f"blk.{i}.{name}.bias", torch.zeros(size).numpy())
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", torch.ones(D).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quiet_llama_cpp():
    """llama.cpp's module, which logs nothing from now on."""
    import llama_cpp

    llama_cpp.llama_log_set(_ignore(llama_cpp), None)
    return llama_cpp


def _ignore(llama_cpp, kept=[]):  # noqa: B006  C keeps the address only, so the callback must live on
    if not kept:
        kept.append(llama_cpp.llama_log_callback(lambda level, text, data: None))
    return kept[0]


def quantize_gguf(source: Path, kind: str, head: bool, path: Path) -> None:
    """By llama.cpp's own quantizer.

    Args:
        kind: `Q4_0`, `TQ2_0`, ...
        head: the tied embedding in this type too, instead of in what the quantizer would choose.

    Raises:
        RuntimeError: it failed.
    """
    import gguf

    llama_cpp = quiet_llama_cpp()
    options = llama_cpp.llama_model_quantize_default_params()
    options.nthread, options.ftype = THREADS, getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if head:
        options.output_tensor_type = options.token_embedding_type = gguf.GGMLQuantizationType[kind].value
    if llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(options)):
        raise RuntimeError(f"llama.cpp could not quantise {source.name} to {kind}.")


@dataclass
class Scratch:
    """Weight files of a run, each made when first asked for."""

    folder: Path
    small: bool

    def make(self, name: str, write: Callable[[Path], None]) -> Path:
        path = self.folder / name
        if not path.exists():
            took, _ = seconds(lambda: write(path))
            print(f"{name} written in {took:.1f} s", file=sys.stderr, flush=True)
        return path

    def v(self) -> Path:
        return self.make("v", partial(write_random, v_config(self.small)))

    def nf4(self) -> Path:
        return self.make("v-nf4", partial(write_nf4, self.v()))

    def peer(self, name: str) -> Path:
        return self.make(name, partial(write_peer, SHAPES[name], self.small))

    def gguf(self, standin: bool, kind: str, head: bool) -> Path:
        name = "1024" if standin else "v"
        config = v_config(self.small, standin).text_config
        source = self.make(f"{name}-BF16.gguf", partial(write_gguf, config))
        if kind == "BF16":
            return source
        return self.make(f"{name}-{kind}{'-head' if head else ''}.gguf", partial(quantize_gguf, source, kind, head))


# -------------------------------------------------------------------------------------------- what a decoding step reads


def own_tensors(module: nn.Module) -> list[torch.Tensor]:
    """Tensors that a module itself holds: parameters, buffers, plain attributes, the scales of bitsandbytes."""
    held = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    while state is not None:
        held.append(state.absmax)
        state = getattr(state, "state2", None)
    return [t for t in held if isinstance(t, torch.Tensor)]


def read_modules(module: nn.Module, ran: set[nn.Module]) -> list[nn.Module]:
    """Modules whose weights are read: those that ran, and all that lies in one which ran without calling any of its parts."""
    inside = [m for m in module.modules() if m is not module]
    if module in ran and not any(m in ran for m in inside):
        return [module, *inside]
    own = [module] if module in ran else []
    return own + [m for child in module.children() for m in read_modules(child, ran)]


def step_bytes(model: nn.Module, generate: Callable[[int], object]) -> dict[str, int]:
    """Bytes of the weights that one decoding step reads, by dtype.

    Args:
        generate: makes as many tokens as told. The modules of a step are those that run more often for three tokens than for two.
    """
    counts = Counter()
    hooks = [m.register_forward_pre_hook(lambda m, args: counts.update([m])) for m in model.modules()]
    generate(2)
    two = Counter(counts)
    counts.clear()
    generate(3)
    for hook in hooks:
        hook.remove()
    ran = {m for m, n in counts.items() if n > two[m]}
    tensors = [t for m in read_modules(model, ran) if "Embedding" not in type(m).__name__ for t in own_tensors(m)]
    decoder = model.model.packed_decoder() if hasattr(getattr(model, "model", None), "packed_decoder") else None
    if decoder is not None:  # its layers are no modules, and the head's matrix is the embedding's
        head = [part for part in model.get_input_embeddings().modules() if hasattr(part, "panels")]
        tensors = decoder.tensors() + [t for part in head for t in (part.panels, part.row_scales)]
    result, seen = Counter(), set()
    for tensor in tensors:
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            result[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    return dict(result)


def read_bandwidth(buffer: torch.Tensor) -> float:
    """Bytes per second of the fastest pass over a float32 buffer, whose size a multiple of 4,096 divides."""
    integers, matrix = buffer.view(torch.int64), buffer.view(-1, 4096)
    vector = matrix[0].clone()
    ways = (integers.sum, integers.max, lambda: matrix @ vector)
    return buffer.nbytes / min(seconds(way)[0] for way in ways for _ in range(READS))


# --------------------------------------------------------------------------------------------------------------- subjects


def resident() -> int | None:
    """Resident size of this process, bytes; None where the system does not tell."""
    if sys.platform != "linux":
        return None
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@dataclass
class Subject(ABC):
    """What is measured; lives in a worker of its own.

    Args:
        name: in the tables.
        path: of its weights, a folder or a GGUF.
    """

    name: str
    path: Path
    sees = True

    @abstractmethod
    def load(self) -> None:
        """Open the weights as their users do."""

    @abstractmethod
    def emit(self, new_tokens: int) -> list[float]:
        """Seconds from the picture to each new token."""

    @abstractmethod
    def read_bytes(self) -> dict[str, int]:
        """Bytes of the weights that a decoding step reads, by format."""

    def disk_bytes(self) -> int:
        files = self.path.glob("*.safetensors") if self.path.is_dir() else [self.path]
        return sum(file.stat().st_size for file in files)

    def turn(self, new_tokens: int) -> dict[str, float]:
        """Seconds to the first token and to the caption's last, tokens per second between the first and the last.

        Raises:
            RuntimeError: another number of tokens came.
        """
        times = self.emit(new_tokens)
        if len(times) != new_tokens:
            raise RuntimeError(f"{self.name} gave {len(times)} tokens, {new_tokens} were asked for.")
        return {
            "first": times[0],
            "caption": times[CAPTION - 1],
            "rate": (new_tokens - 1) / (times[-1] - times[0]),
        }

    def open(self, new_tokens: int) -> dict:
        """Load, one turn that does not count, then what does not change from turn to turn."""
        reset_peak()
        self.before = resident()
        load_seconds, _ = seconds(self.load)
        self.turn(new_tokens)
        self.peak = peak_memory()
        reset_peak()
        after = resident()
        return {
            "load": load_seconds,
            "memory": None if after is None else after - self.before,
            "disk": self.disk_bytes(),
            "read": self.read_bytes(),
            "positions": self.positions,
            "sees": self.sees,
        }

    def close(self) -> int | None:
        """Peak memory, bytes."""
        peak = peak_memory()
        return None if peak is None else max(self.peak, peak) - self.before


class TransformersSubject(Subject):
    """A model of transformers, which `generate()` runs."""

    @abstractmethod
    def inputs(self, picture: Image.Image) -> dict[str, torch.Tensor]:
        """What `generate()` is given for a picture."""

    def emit(self, new_tokens: int) -> list[float]:
        picture, clock = Image.effect_noise(PICTURE, 64).convert("RGB"), Clock()
        started = time.perf_counter()
        self.model.generate(
            **self.inputs(picture),
            streamer=clock,
            do_sample=False,
            num_beams=1,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
        )
        return [t - started for t in clock.times[1:]]  # the first entry is the prompt

    def read_bytes(self) -> dict[str, int]:
        return step_bytes(self.model, self.emit)


class MicroVLM(TransformersSubject):
    """A MicroVLM checkpoint: one picture, then text."""

    def load(self) -> None:
        self.model = load(self.path)
        size = self.model.model.vision_tower.timm_model.patch_embed.img_size
        self.image_processor = MicroVLMImageProcessor(size={"height": size[0], "width": size[1]})
        self.ids = prompt(self.model)
        self.positions = self.ids.shape[1]

    def inputs(self, picture: Image.Image) -> dict[str, torch.Tensor]:
        pixel_values = self.image_processor(picture, return_tensors="pt")["pixel_values"].to(self.model.dtype)
        return {"input_ids": self.ids, "attention_mask": torch.ones_like(self.ids), "pixel_values": pixel_values}


@dataclass
class Captioner(TransformersSubject):
    """A published shape that takes a picture and no text.

    Args:
        shape: a name in SHAPES.
    """

    shape: str
    positions = 1  # the start token; what the decoder sees of the picture has no token ids

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

    def inputs(self, picture: Image.Image) -> dict[str, torch.Tensor]:
        pixel_values = self.image_processor(picture, return_tensors="pt")["pixel_values"].to(self.model.dtype)
        return {"pixel_values": pixel_values}


@dataclass
class SmolVLM(Captioner):
    """SmolVLM's shape: a picture in tiles, then text.

    Args:
        tiles: 1, or 17: 4 x 4 and the whole picture.
    """

    tiles: int = 1

    def load(self) -> None:
        super().load()
        config = self.model.config
        per_tile = (config.vision_config.image_size // config.vision_config.patch_size // config.scale_factor) ** 2
        tile = [0, 0, *[config.image_token_id] * per_tile]  # separators are tokens like any other
        self.ids = torch.tensor([tile * self.tiles + list(range(3, 3 + TEXT_TOKENS))])
        self.positions = self.ids.shape[1]

    def processor_options(self) -> dict:
        side = self.model.config.vision_config.image_size
        split = self.tiles > 1
        longest = {"longest_edge": 4 * side if split else side}
        return {"do_image_splitting": split, "size": longest, "max_image_size": {"longest_edge": side}}

    def inputs(self, picture: Image.Image) -> dict[str, torch.Tensor]:
        batch = self.image_processor(picture, return_tensors="pt")
        if batch["pixel_values"].shape[1] != self.tiles:
            raise RuntimeError(f"the picture became {batch['pixel_values'].shape[1]} tiles, expected {self.tiles}.")
        return {
            "input_ids": self.ids,
            "attention_mask": torch.ones_like(self.ids),
            "pixel_values": batch["pixel_values"].to(self.model.dtype),
            "pixel_attention_mask": batch["pixel_attention_mask"],
        }


@dataclass
class LlamaCpp(Subject):
    """A language model in llama.cpp, driven by its C functions.

    Args:
        positions: text tokens of the prompt.
    """

    positions: int
    sees = False

    def load(self) -> None:
        self.lib = library = quiet_llama_cpp()
        library.llama_backend_init()
        self.model = library.llama_model_load_from_file(str(self.path).encode(), library.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot open {self.path.name}.")
        options = library.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = CONTEXT
        options.n_threads = options.n_threads_batch = THREADS
        self.context = library.llama_init_from_model(self.model, options)
        self.sampler = library.llama_sampler_init_greedy()

    def emit(self, new_tokens: int) -> list[float]:
        library = self.lib
        library.llama_memory_clear(library.llama_get_memory(self.context), True)
        tokens = (library.llama_token * self.positions)(*range(3, 3 + self.positions))
        times, started = [], time.perf_counter()
        for _ in range(new_tokens):
            if library.llama_decode(self.context, library.llama_batch_get_one(tokens, len(tokens))):
                raise RuntimeError(f"llama.cpp could not run {self.path.name}.")
            token = library.llama_sampler_sample(self.sampler, self.context, -1)
            times.append(time.perf_counter() - started)
            tokens = (library.llama_token * 1)(token)
        return times

    def read_bytes(self) -> dict[str, int]:
        import gguf

        result = Counter()
        for tensor in gguf.GGUFReader(self.path).tensors:
            result[tensor.tensor_type.name] += tensor.n_bytes
        return dict(result)


def _llama_cpp(standin: bool, kind: str, head: bool, name: str, scratch: Scratch) -> LlamaCpp:
    config = v_config(scratch.small)
    return LlamaCpp(name, scratch.gguf(standin, kind, head), config.num_prefix_tokens + TEXT_TOKENS)


LLAMA_CPP = {
    f"llama.cpp {'1024' if standin else 'V'} {kind}{'+head' if head else ''}": partial(_llama_cpp, standin, kind, head)
    for standin, kind, head in (
        *((False, kind, False) for kind in ("BF16", "Q8_0", "Q4_0", "TQ2_0", "TQ1_0")),
        (False, "Q4_0", True),
        *((True, kind, False) for kind in ("Q4_0", "TQ2_0", "TQ1_0")),
        (True, "TQ2_0", True),
    )
}
CATALOGUE: dict[str, Callable[[str, Scratch], Subject]] = {
    "V bf16": lambda name, scratch: MicroVLM(name, scratch.v()),
    "V NF4": lambda name, scratch: MicroVLM(name, scratch.nf4()),
    **LLAMA_CPP,
    "SmolVLM-256M x1": lambda name, scratch: SmolVLM(name, scratch.peer("SmolVLM-256M"), "SmolVLM-256M", 1),
    "SmolVLM-256M x17": lambda name, scratch: SmolVLM(name, scratch.peer("SmolVLM-256M"), "SmolVLM-256M", 17),
    **{
        peer: lambda name, scratch: Captioner(name, scratch.peer(name), name)
        for peer in ("BLIP-base", "GIT-base", "ViT-GPT2")
    },
}


# ---------------------------------------------------------------------------------------------------------- measurement


def serve(connection, subject: Subject) -> None:
    """A worker: call the methods it is told to, until it is told None."""
    torch.set_num_threads(THREADS)
    transformers.utils.logging.disable_progress_bar()
    for method, args in iter(connection.recv, None):
        try:
            connection.send((True, getattr(subject, method)(*args)))
        except Exception:
            connection.send((False, traceback.format_exc()))


class Worker:
    """A subject in a process of its own."""

    def __init__(self, subject: Subject):
        context = multiprocessing.get_context("spawn")
        self.name = subject.name
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, subject), daemon=True)
        with mock.patch.dict(os.environ, ENVIRONMENT):
            self.process.start()
        theirs.close()

    def ask(self, method: str, *args):
        """What the subject's method returns.

        Raises:
            RuntimeError: it failed, or the process is gone.
        """
        try:
            self.connection.send((method, args))
            fine, answer = self.connection.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError(f"{self.name}: its process ended (out of memory?).") from error
        if not fine:
            raise RuntimeError(f"{self.name}: {method} failed.\n{answer}")
        return answer

    def stop(self) -> None:
        if self.process.is_alive():
            try:
                self.connection.send(None)
                self.process.join(10)
            except OSError:
                pass
            self.process.terminate()
        self.process.join()


@dataclass
class Result:
    """Of a subject: what `Subject.open` returned, one entry per turn, peak memory in bytes."""

    opened: dict
    turns: list[dict[str, float]] = field(default_factory=list)
    peak: int | None = None

    def median(self, key: str) -> float:
        return median(turn[key] for turn in self.turns)

    @property
    def read(self) -> int:
        return sum(self.opened["read"].values())


def available_memory() -> int | None:
    """Bytes that new processes can have; None where the system does not tell."""
    if sys.platform != "linux":
        return None
    return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1])


def in_groups(needs: dict[str, int], available: int | None) -> list[list[str]]:
    """Names in their order, cut into groups that each need no more than is available; one alone may need more."""
    groups, used = [[]], 0
    for name, need in needs.items():
        if groups[-1] and available is not None and used + need > available:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += need
    return groups


def measure_group(subjects: list[Subject], rounds: int, new_tokens: int, read: Callable[[], float]) -> tuple:
    """Open all subjects, then give each a turn in every round.

    Args:
        read: measures the bandwidth, once a round.

    Returns:
        Results by name, and the bandwidths, bytes per second.
    """
    workers, rates = [], []
    try:
        for subject in subjects:
            workers.append(Worker(subject))
        results = {}
        for worker in workers:
            results[worker.name] = Result(worker.ask("open", new_tokens))
            print(f"{worker.name}: open", file=sys.stderr, flush=True)
        for i in range(rounds):
            rates.append(read())
            for worker in workers:
                turn = worker.ask("turn", new_tokens)
                results[worker.name].turns.append(turn)
                text = f"round {i + 1} of {rounds}, {worker.name}: {turn['rate']:.3g} tokens/s"
                print(text, file=sys.stderr, flush=True)
        for worker in workers:
            results[worker.name].peak = worker.ask("close")
    finally:
        for worker in workers:
            worker.stop()
    return results, rates


# --------------------------------------------------------------------------------------------------------------- report


def megabytes(value: int | None) -> str:
    return "not measured" if value is None else f"{value / 1e6:,.1f}"


def speed_table(results: dict[str, Result]) -> str:
    """Medians; tokens per second with their range."""
    rows = []
    for name, r in results.items():
        rates = [turn["rate"] for turn in r.turns]
        o = r.opened
        rows.append(
            [
                name,
                f"{'picture, ' if o['sees'] else 'no picture, '}{o['positions']:,} positions",
                f"{r.median('first') * 1e3:.1f}",
                f"{r.median('rate'):.1f} ({min(rates):.1f} to {max(rates):.1f})",
                f"{r.median('caption') * 1e3:,.0f}",
                f"{o['load']:.2f}",
                megabytes(o["disk"]),
                megabytes(o["memory"]),
                megabytes(r.peak),
            ]
        )
    header = [
        "",
        "prompt",
        "first token, ms",
        "tokens/s",
        f"{CAPTION} tokens from the picture, ms",
        "load, s",
        "on disk, MB",
        "in memory, MB",
        "peak, MB",
    ]
    return markdown_table(header, rows, left=2)


def limit_table(results: dict[str, Result], bandwidth: float) -> str:
    """Tokens per second if a decoding step only read its weights, and the share of it that is reached."""
    rows = []
    for name, r in results.items():
        formats = sorted(r.opened["read"].items(), key=lambda item: -item[1])
        text = ", ".join(f"{kind} {size / 1e6:.1f}" for kind, size in formats if size / r.read > 1e-3)
        limit = bandwidth / r.read
        rows.append([name, text, megabytes(r.read), f"{limit:.1f}", f"{r.median('rate') / limit:.1%}"])
    return markdown_table(["", "formats, MB", "read a token, MB", "limit, tokens/s", "reached"], rows, left=2)


def ratios(base: Result, other: Result) -> dict[str, float]:
    """How many times faster `base` is: medians over the rounds' ratios."""
    pairs = list(zip(base.turns, other.turns))
    return {
        "rate": median(b["rate"] / o["rate"] for b, o in pairs),
        **{key: median(o[key] / b[key] for b, o in pairs) for key in ("first", "caption")},
    }


def ratio_table(name: str, results: dict[str, Result]) -> str:
    rows = []
    for other, result in results.items():
        if other != name:
            r = ratios(results[name], result)
            rows.append([other, *(f"x {r[key]:.2f}" for key in ("rate", "first", "caption"))])
    return markdown_table([f"{name} is faster than", "tokens/s", "first token", f"{CAPTION} tokens"], rows)


def plot(results: dict[str, Result], bandwidth: float, folder: Path) -> None:
    """`speed_tokens.png`: tokens per second with range and limit. `speed_disk.png`: tokens per second over bytes on disk."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def colour(name: str) -> str:
        return "tab:orange" if name in LLAMA_CPP else "tab:gray" if name.startswith(tuple(SHAPES)) else "tab:blue"

    folder.mkdir(parents=True, exist_ok=True)
    names = list(results)
    colours = [colour(name) for name in names]
    rates = [results[name].median("rate") for name in names]
    lowest = [rate - min(t["rate"] for t in results[name].turns) for name, rate in zip(names, rates)]
    highest = [max(t["rate"] for t in results[name].turns) - rate for name, rate in zip(names, rates)]
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.34 * len(names)), layout="constrained")
    axes.barh(names, rates, xerr=[lowest, highest], color=colours, error_kw={"elinewidth": 1})
    limits = [bandwidth / results[name].read for name in names]
    axes.plot(limits, names, "k|", markersize=12, label="limit: bandwidth / bytes read a token")
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="tokens per second, median and range")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3, axis="x")
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(folder / "speed_tokens.png", dpi=120)
    plt.close(figure)

    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    sizes = [results[name].opened["disk"] / 1e6 for name in names]
    axes.scatter(sizes, rates, c=colours)
    for name, size, rate in zip(names, sizes, rates):
        axes.annotate(name, (size, rate), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.set(xscale="log", yscale="log", xlabel="weights on disk, MB", ylabel="tokens per second, median")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(folder / "speed_disk.png", dpi=120)
    plt.close(figure)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="turns of every subject that count, default %(default)s")
    parser.add_argument(
        "--tokens", type=int, default=64, help=f"a turn makes, {CAPTION} to {MOST_TOKENS}, default %(default)s"
    )
    parser.add_argument("--checkpoint", action="append", default=[], metavar="NAME=FOLDER", help="of MicroVLM; repeat")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"of {', '.join(CATALOGUE)} and the checkpoints")
    parser.add_argument(
        "--small", action="store_true", help="tiny shapes: shows that this runs, its numbers say nothing"
    )
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.add_argument("--plot", type=Path, help="folder for speed_tokens.png and speed_disk.png")
    parser.add_argument("--scratch", type=Path, default=ROOT / "runs", help="where weights lie meanwhile, default runs")
    parser.add_argument("--write-v", type=Path, metavar="FOLDER", help="write V with random weights in bf16, and stop")
    parser.add_argument("--write-standin", type=Path, metavar="FOLDER", help="the same for the 1024-wide stand-in")
    options = parser.parse_args(argv)
    if options.rounds < 1 or not CAPTION <= options.tokens <= MOST_TOKENS:
        parser.error(f"--rounds must be 1 or more, --tokens {CAPTION} to {MOST_TOKENS}.")
    checkpoints = {}
    for text in options.checkpoint:
        name, _, folder = text.partition("=")
        if not name or not folder:
            parser.error(f"--checkpoint {text!r} is not NAME=FOLDER.")
        if name in CATALOGUE or name in checkpoints:
            parser.error(f"--checkpoint {name!r}: the name is taken.")
        if not (Path(folder) / "config.json").is_file():
            parser.error(f"--checkpoint {name!r}: {folder} has no config.json.")
        checkpoints[name] = Path(folder)
    options.checkpoint = checkpoints
    known = [*CATALOGUE, *checkpoints]
    for name in options.only or ():
        if name not in known:
            parser.error(f"--only {name!r}: known are {', '.join(known)}.")
    return options


def chosen(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Names to measure, checkpoints first, and those left out because llama.cpp or gguf is not installed."""
    names = [name for name in (*options.checkpoint, *CATALOGUE) if not options.only or name in options.only]
    if all(importlib.util.find_spec(module) for module in ("llama_cpp", "gguf")):
        return names, []
    return [name for name in names if name not in LLAMA_CPP], [name for name in names if name in LLAMA_CPP]


def main(argv: list[str] | None = None) -> dict | None:
    options = parse(argv)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(THREADS)
    for folder, standin in ((options.write_v, False), (options.write_standin, True)):
        if folder:
            write_random(v_config(options.small, standin), folder)
            print(f"{folder}: {'the stand-in' if standin else 'V'} with random weights in bf16")
    if options.write_v or options.write_standin:
        return None
    where = machine()
    print(f"{where}\n", flush=True)
    names, left_out = chosen(options)
    if left_out:
        print(f"Left out, llama-cpp-python or gguf is not installed: {', '.join(left_out)}.\n", flush=True)
    if not names:
        return None
    buffer = torch.ones((SMALL_BUFFER if options.small else BUFFER) // 4)
    options.scratch.mkdir(parents=True, exist_ok=True)
    results, rates = {}, []
    with tempfile.TemporaryDirectory(prefix="speed-", dir=options.scratch) as folder:
        scratch = Scratch(Path(folder), options.small)
        subjects = {}
        for name in names:
            if name in options.checkpoint:
                subjects[name] = MicroVLM(name, options.checkpoint[name])
            else:
                subjects[name] = CATALOGUE[name](name, scratch)
        needs = {name: 2 * subject.disk_bytes() + PROCESS_BYTES for name, subject in subjects.items()}
        groups = in_groups(needs, available_memory())
        for group in groups:
            members = [subjects[name] for name in group]
            found, read = measure_group(members, options.rounds, options.tokens, partial(read_bandwidth, buffer))
            results |= found
            rates += read
    bandwidth = max(rates)
    shape = "tiny models" if options.small else "full size"
    print(f"## {shape}, {THREADS} threads, {options.rounds} rounds of {options.tokens} tokens, random weights\n")
    print(f"{speed_table(results)}\n")
    if len(groups) > 1:
        print(f"Memory did not suffice for all at once; interleaved inside: {'; '.join(map(', '.join, groups))}.\n")
    text = f"Read bandwidth, {THREADS} threads: {bandwidth / 1e9:.1f} GB/s, the highest of {len(rates)} rounds"
    print(f"{text} (median {median(rates) / 1e9:.1f}).\n\n{limit_table(results, bandwidth)}\n")
    bases = [name for name in options.checkpoint if name in results] or names[:1]
    for name in bases if len(names) > 1 else ():
        print(f"{ratio_table(name, results)}\n")
    if options.plot:
        plot(results, bandwidth, options.plot)
    values = {
        "machine": where,
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
        | {"checkpoint": {name: str(path) for name, path in options.checkpoint.items()}},
        "groups": groups,
        "bandwidth_bytes_per_second": {"highest": bandwidth, "rounds": rates},
        "results": {name: {**r.opened, "peak": r.peak, "turns": r.turns} for name, r in results.items()},
        "left_out": left_out,
    }
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(values, indent=1))
    return values


if __name__ == "__main__":
    main()
