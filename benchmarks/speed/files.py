"""Write checkpoints of random weights: bf16, NF4, GGUF."""

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedConfig

from benchmarks.machine import seconds
from benchmarks.models import build_on_meta, v_config, write_random
from microvlm.model import MicroVLMConfig
from microvlm.train.setup import unquantized_modules

from .shapes import SHAPES, Shape

THREADS = 2


def write_peer(shape: Shape, small: bool, folder: Path) -> None:
    """Write a captioner in bf16."""
    torch.manual_seed(0)
    getattr(transformers, shape.model)(shape.config(small)).to(torch.bfloat16).save_pretrained(folder)


def write_nf4(source: Path, folder: Path) -> None:
    """Write vision tower and language model in NF4, before any pass repacks the weights."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=unquantized_modules(build_on_meta(MicroVLMConfig.from_pretrained(source)), []),
    )
    model = AutoModelForImageTextToText.from_pretrained(source, dtype="auto", quantization_config=quantization)
    model.save_pretrained(folder)


def write_gguf(config: PreTrainedConfig, path: Path) -> None:
    """Write a Qwen2 with a tied head, BF16 matrices, F32 vectors and no vocabulary."""
    import gguf

    D, inner = config.hidden_size, config.intermediate_size
    kv = config.num_key_value_heads * D // config.num_attention_heads
    # what llama.cpp reads before the tensors
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(D)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("none")
    # shapes of the matrices, biases and norms of a layer
    matrices = {"attn_q": (D, D), "attn_k": (kv, D), "attn_v": (kv, D), "attn_output": (D, D)}
    matrices |= {"ffn_gate": (inner, D), "ffn_up": (inner, D), "ffn_down": (D, inner)}
    vectors = {f"{name}.bias": torch.zeros(matrices[name][0]) for name in ("attn_q", "attn_k", "attn_v")}
    vectors |= {f"{name}.weight": torch.ones(D) for name in ("attn_norm", "ffn_norm")}
    g = torch.Generator().manual_seed(0)

    def add_matrix(name: str, rows: int, columns: int) -> None:
        weight = torch.empty(rows, columns, dtype=torch.bfloat16).normal_(std=config.initializer_range, generator=g)
        writer.add_tensor(f"{name}.weight", weight.view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)

    add_matrix("token_embd", config.vocab_size, D)
    writer.add_tensor("output_norm.weight", torch.ones(D).numpy())
    for i in range(config.num_hidden_layers):
        for name, (rows, columns) in matrices.items():
            add_matrix(f"blk.{i}.{name}", rows, columns)
        for name, vector in vectors.items():
            writer.add_tensor(f"blk.{i}.{name}", vector.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@cache  # C holds only the callback's address, so it must live on
def silent_callback(llama_cpp):
    return llama_cpp.llama_log_callback(lambda level, text, data: None)


def quiet_llama_cpp():
    """Import llama.cpp and silence it."""
    import llama_cpp

    llama_cpp.llama_log_set(silent_callback(llama_cpp), None)
    return llama_cpp


def quantize_gguf(source: Path, kind: str, head: bool, path: Path) -> None:
    """Quantise with llama.cpp's own quantizer.

    Args:
        source: a GGUF in BF16.
        kind: `Q4_0`, `TQ2_0`, ...
        head: use this type for the tied embedding too, instead of the quantizer's choice.
        path: of the new file.

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
        return self.make(name, partial(write_peer, SHAPES[name], self.small))

    def gguf(self, kind: str, head: bool) -> Path:
        source = self.make("v-BF16.gguf", partial(write_gguf, v_config(self.small).text_config))
        if kind == "BF16":
            return source
        return self.make(f"v-{kind}{'-head' if head else ''}.gguf", partial(quantize_gguf, source, kind, head))
