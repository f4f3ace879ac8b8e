"""Write checkpoints of random weights: bf16, NF4, GGUF."""

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedConfig

from benchmarks.overhead import seconds, write_random
from benchmarks.parameters import MicroVLMConfig, MicroVLMForConditionalGeneration
from microvlm.train.setup import unquantized_modules

from .shapes import SHAPES, THREADS, Shape, v_config

CONTEXT = 512  # positions of llama.cpp's cache


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
