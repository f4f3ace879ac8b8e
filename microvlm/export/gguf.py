"""Export the language model of a checkpoint as GGUF for llama.cpp."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..files import atomic_path
from ..model import TernaryLinear, quiet, require, ternary_quantize
from .checkpoint import head_size, load_checkpoint

GGUF_ARCHITECTURES = ("qwen2", "llama", "bitnet")
# Ways of cutting text before the merges, by llama.cpp's name: regular expression (None: GPT-2's, built into ByteLevel),
# whether digits are cut off one by one first, and whether a whole word in the vocabulary skips the merges.
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
PUNCTUATION = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {
    "gpt-2": (None, False, False),
    "smollm": (None, True, False),
    "qwen2": (CONTRACTIONS + r"\p{N}" + PUNCTUATION, False, False),
    "llama-bpe": (CONTRACTIONS + r"\p{N}{1,3}" + PUNCTUATION, False, True),
}
DIGITS = {"type": "Digits", "individual_digits": True}
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
# Microsoft's name for BitNet 2B-4T's graph, with squared ReLU. llama.cpp has none of that name and refuses the file;
# its "bitnet" would open it, apply SiLU and write other words.
RELU2_ARCHITECTURE = "bitnet-b1.58"


@dataclass
class GGUFTensor:
    """One tensor of the file, float32 as llama.cpp is to see it."""

    name: str
    data: np.ndarray
    kind: Literal["weight", "ternary", "embedding", "plain"]  # plain: a vector, always float32


def tokenizer_kind(tokenizer: PreTrainedTokenizerBase) -> str:
    """Name a byte-level BPE tokenizer's way of cutting text as llama.cpp does; by another one ids would differ."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    model, cutter = spec["model"], spec["pre_tokenizer"] or {}
    parts = cutter["pretokenizers"] if cutter.get("type") == "Sequence" else [cutter]
    kinds = f"{model['type']} after {parts[-1].get('type')}"
    is_byte_level = kinds == "BPE after ByteLevel" and not model.get("byte_fallback")
    require(is_byte_level, f"the tokenizer is {kinds}, expected byte-level BPE (GPT-2, Qwen2, Llama 3).")
    is_unchanged = (spec["normalizer"] or {}).get("type") in (None, "NFC") and not parts[-1]["add_prefix_space"]
    require(is_unchanged, "the tokenizer changes text before it cuts it, which llama.cpp would not do.")
    # the steps before the bytes; GPT-2's expression is built into the last one
    for name, (regex, digits, skips_merges) in PRE_TOKENIZERS.items():
        steps = [DIGITS] * digits + [SPLIT | {"pattern": {"Regex": regex}}] * (regex is not None)
        is_same = parts[:-1] == steps and parts[-1]["use_regex"] == (regex is None)
        if is_same and bool(model.get("ignore_merges")) == skips_merges:
            return name
    known = sorted(PRE_TOKENIZERS)
    raise ValueError(f"the tokenizer cuts text by {json.dumps(cutter)} and then merges; known are {known}.")


def write_tokenizer(writer, tokenizer: PreTrainedTokenizerBase, rows: int, suppressed: list[int]) -> None:
    """Add vocabulary, merges, special tokens and chat template to a `gguf.GGUFWriter`.

    Ids beyond the tokenizer's, up to the `rows` of the embedding, become unused tokens; those `suppressed` are never
    to be generated.
    """
    from gguf import TokenType

    # every row of the embedding is a token
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {token["id"]: token for token in spec["added_tokens"]}
    names = {i: text for text, i in spec["model"]["vocab"].items()} | {i: t["content"] for i, t in added.items()}
    require(max(names) < rows, f"the tokenizer has the id {max(names)}, the embedding {rows} rows only.")
    types = dict.fromkeys(names, TokenType.NORMAL)
    types |= {i: TokenType.CONTROL if t["special"] else TokenType.USER_DEFINED for i, t in added.items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(tokenizer_kind(tokenizer))
    writer.add_token_list([names.get(i, f"[PAD{i}]") for i in range(rows)])
    writer.add_token_types([types.get(i, TokenType.UNUSED) for i in range(rows)])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]])
    for name in ("bos", "eos", "pad", "unk"):
        value = getattr(tokenizer, f"{name}_token_id")
        if value is not None:
            getattr(writer, f"add_{name}_token_id")(value)
    # what the tokenizer adds around a text
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(len(ids) > 1 and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(len(ids) > 1 and ids[-1] == tokenizer.eos_token_id)
    writer.add_add_space_prefix(False)
    if suppressed:
        writer.add_array("tokenizer.ggml.suppress_tokens", sorted(suppressed))
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def check_architecture(model, text) -> None:
    """Raise ValueError where llama.cpp's graph would compute something else, except for BitNet's activation."""
    kind, known = text.model_type, list(GGUF_ARCHITECTURES)
    require(kind in known, f"text_config.model_type {kind!r} has no GGUF architecture here, expected one of {known}.")
    act, rope = text.hidden_act, text.rope_parameters["rope_type"]
    acts = ("silu", "relu2") if kind == "bitnet" else ("silu",)
    ropes = ("default", "linear", "llama3") if kind == "llama" else ("default",)
    sliding = len(model.config.full_attention_layers) < text.num_hidden_layers
    layers = model.model.language_model.layers
    narrow = layers[0].self_attn.q_proj.out_features != text.hidden_size
    # biases that llama.cpp does not add
    biases = {n.split(".", 1)[1] for n, _ in layers.named_parameters() if n.endswith("_proj.bias")}
    biases -= {"qwen2": {f"self_attn.{n}_proj.bias" for n in "qkv"}, "bitnet": set()}.get(kind, biases)
    problems = {
        f"text_config.hidden_act is {act!r}, expected {' or '.join(acts)} of {kind}.": act not in acts,
        f"the text model has sliding windows, which llama.cpp's {kind} does not.": sliding,
        f"text_config.rope_parameters has rope_type {rope!r}, which is not exported for {kind}.": rope not in ropes,
        "llama.cpp's bitnet has tied embeddings only, this checkpoint has a head of its own.": (
            kind == "bitnet" and not model.config.tie_word_embeddings
        ),
        "llama.cpp's bitnet needs num_attention_heads x head_dim = hidden_size.": kind == "bitnet" and narrow,
        f"llama.cpp's {kind} has no {min(biases, default='')}.": bool(biases),
    }
    for message, is_problem in problems.items():
        require(not is_problem, message)


def ternary_parts(layer: nn.Linear, groups: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Split a `TernaryLinear` into values in {-1, 0, 1} (out, in) and scale () or (out, 1); None for another layer."""
    if not isinstance(layer, TernaryLinear):
        return None
    known, group = " or ".join(groups), layer.group_size
    require(group in groups, f"this GGUF has scales of a {known}, qat_config.group_size is {group!r}.")
    if layer.ternary_weights:
        return ternary_quantize(layer.weight, layer.group_size)
    scale = layer.weight.abs().max()
    values = (layer.weight / scale.clamp(min=torch.finfo(torch.float32).tiny)).round()
    is_ternary = torch.allclose(values * scale, layer.weight, rtol=1e-2, atol=0)  # bfloat16 keeps three digits
    require(is_ternary, "qat_config.ternary_weights is 'none', but a ternary layer has more than three values.")
    return values, scale


def permute_heads(x: np.ndarray, heads: int) -> np.ndarray:
    """Reorder rows of a query or key projection, per head, from halves (transformers) to pairs (llama.cpp's llama)."""
    return x.reshape(heads, 2, len(x) // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


@torch.no_grad()
def gguf_tensors(model) -> list[GGUFTensor]:
    """List the language model's tensors under llama.cpp's names."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    text, decoder = model.config.text_config, model.model.language_model
    kind = text.model_type
    table = get_tensor_name_map(MODEL_ARCH[kind.upper()], text.num_hidden_layers)
    sub_norms = {"self_attn.attn_sub_norm": "attn_sub_norm", "mlp.ffn_sub_norm": "ffn_sub_norm"}
    modules = dict(decoder.named_modules())
    tensors = []
    for name, parameter in decoder.named_parameters():
        module, suffix = name.rsplit(".", 1)
        data, scale, role = parameter.float(), None, "plain" if parameter.ndim == 1 else "weight"
        if name == "embed_tokens.weight":
            role = "embedding"
        # ternary layers: llama.cpp's bitnet multiplies by the scale itself
        groups = ("tensor",) if kind == "bitnet" else ("tensor", "row")
        parts = ternary_parts(modules[module], groups) if suffix == "weight" else None
        if parts is not None:
            values, scale = parts
            role = "ternary"
            data = values if kind == "bitnet" else values * scale  # qwen2 and llama do not read scales everywhere
        # llama.cpp's name and order of rows
        _, _, rest = module.split(".", 2) if module.startswith("layers.") else ("", "", module)
        if rest in sub_norms:
            target = f"blk.{module.split('.')[1]}.{sub_norms[rest]}"
        else:
            target = table.get_name(f"model.{module}")
        require(target is not None, f"{name} has no name in GGUF's architecture {kind}.")
        array = data.numpy()
        if kind == "llama" and rest in ("self_attn.q_proj", "self_attn.k_proj"):
            array = permute_heads(array, text.num_attention_heads if "q_proj" in rest else text.num_key_value_heads)
        tensors.append(GGUFTensor(f"{target}.{suffix}", np.ascontiguousarray(array), role))
        if role == "ternary" and kind == "bitnet":
            tensors.append(GGUFTensor(f"{target}.scale", scale.reshape(1).numpy(), "plain"))
    if not model.config.tie_word_embeddings:
        tensors.append(GGUFTensor("output.weight", model.lm_head.weight.float().numpy(), "embedding"))
    if text.rope_parameters["rope_type"] != "default":
        frequencies = decoder.rotary_emb.inv_freq.double()
        plain = text.rope_parameters["rope_theta"] ** (-torch.arange(len(frequencies)).double() / len(frequencies))
        tensors.append(GGUFTensor("rope_freqs.weight", (plain / frequencies).float().numpy(), "plain"))
    return tensors


def choose_type(tensor: GGUFTensor, wanted: str) -> tuple[str, str | None]:
    """Choose the type of a tensor; returns it, and why it is not `wanted`.

    Vectors are float32; the ternary types hold ternary layers, other matrices are float16 then.
    """
    if tensor.kind == "plain":
        return "f32", None
    if wanted.startswith("tq") and tensor.kind != "ternary":
        return "f16", "not ternary"
    block = {"q8_0": 32, "tq2_0": 256, "tq1_0": 256}.get(wanted, 1)
    if tensor.data.shape[-1] % block:
        return "f16", f"rows of {tensor.data.shape[-1]}, not divisible by {block}"
    return wanted, None


def write_config(writer, model, name: str, dtype: str) -> None:
    """Add name, sizes and rotary parameters of the language model to a `gguf.GGUFWriter`."""
    import gguf

    text = model.config.text_config
    head_dim = head_size(text)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(f"{name or 'MicroVLM'} language model")
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if dtype == "f32" else f"MOSTLY_{dtype.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(text.vocab_size)
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(text.rope_parameters["rope_theta"])
    if text.model_type != "bitnet":
        return
    writer.add_string(f"{writer.arch}.hidden_activation", text.hidden_act)
    if text.hidden_act == "relu2":
        note = (
            f"relu2 in the feed-forward, architecture {writer.arch}: "
            "llama.cpp's bitnet graph applies silu and gives other tokens"
        )
        writer.add_description(note)
        print(f"note: {note} (docs/export.md)")


def add_tensors(writer, tensors: list[GGUFTensor], dtype: str) -> Counter[str]:
    """Add the tensors to a `gguf.GGUFWriter` and print the exceptions; returns how many have each type."""
    import gguf

    types: Counter[str] = Counter()
    fallbacks: dict[str, list[str]] = {}
    for tensor in tensors:
        used, reason = choose_type(tensor, dtype)
        qtype = gguf.GGMLQuantizationType[used.upper()]
        writer.add_tensor(tensor.name, gguf.quants.quantize(tensor.data, qtype), raw_dtype=qtype)
        types[used] += 1
        if reason:
            fallbacks.setdefault(reason, []).append(tensor.name)
    for reason, names in fallbacks.items():
        print(f"note: {len(names)} tensors are f16 instead of {dtype} ({reason}), such as {names[0]}")
    return types


def export_gguf(
    source: str,
    out: str | Path,
    dtype: str = "f16",
    revision: str | None = None,
    force: bool = False,
    architecture: str | None = None,
) -> Path:
    """Write the language model of a checkpoint as one GGUF file; arguments as on the command line.

    The default architecture is the model type, for a BitNet with squared ReLU `RELU2_ARCHITECTURE`.
    """
    # refuse before the work
    out = Path(out)
    is_file_name = out.suffix == ".gguf" and not out.is_dir()
    require(is_file_name, f"OUT {out} is no file name that ends in .gguf; export onnx writes a folder.")
    require(force or not out.exists(), f"OUT {out} exists: choose another name, or replace it with --force.")
    import gguf  # after the checks, which need no package

    # what to write, as llama.cpp sees it
    model, tokenizer = load_checkpoint(source, revision)
    text = model.config.text_config
    check_architecture(model, text)
    tokenizer_kind(tokenizer)
    tensors = gguf_tensors(model)
    is_possible = not dtype.startswith("tq") or any(tensor.kind == "ternary" for tensor in tensors)
    needed = f"--type {dtype} needs ternary layers, the checkpoint has none (qat_config.ternary_modules)."
    require(is_possible, needed)
    is_relu2 = text.model_type == "bitnet" and text.hidden_act == "relu2"

    # write under another name, read back, rename
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(out) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture or (RELU2_ARCHITECTURE if is_relu2 else text.model_type))
        write_config(writer, model, source.rstrip("/").split("/")[-1].strip("."), dtype)
        write_tokenizer(writer, tokenizer, text.vocab_size, model.generation_config.suppress_tokens or [])
        types = add_tensors(writer, tensors, dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        error = verify_gguf(temporary, tensors)
    counts = ", ".join(f"{n} tensors {name}" for name, n in types.items())
    print(f"{text.model_type}: {counts}; rounding at most {error:.1e} of a tensor's norm")
    print(f"wrote {out}, {out.stat().st_size:,} bytes")
    return out


def verify_gguf(path: Path, tensors: list[GGUFTensor]) -> float:
    """Read a file back; returns the largest distance of a tensor from its source, over its norm."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    worst = 0.0
    for tensor in tensors:
        written = stored[tensor.name]
        data = dequantize(written.data, written.tensor_type).reshape(tensor.data.shape)
        error = float(np.linalg.norm(data - tensor.data) / max(np.linalg.norm(tensor.data), 1e-30))
        # further off than 8 bits would put it
        require(error <= 0.02, f"verification: {tensor.name} in the file is {error:.1e} of its norm off.")
        worst = max(worst, error)
    return worst


def main(**options) -> None:
    quiet()
    export_gguf(**options)
