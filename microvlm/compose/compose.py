"""Compose one checkpoint from a timm vision tower and a language model."""

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedConfig

from ..files import ROOT, atomic_folder, check_out
from ..model import MicroVLMConfig, MicroVLMForConditionalGeneration, quiet, require
from ..tables import text_table
from .prompt import build_generation_config, build_processor, default_prompt
from .text import IMAGE_TOKEN, TEXT_PREFIX, TextPart, add_image_token, load_text
from .verify import text_logits, verify
from .vision import VISION_PREFIX, VisionPart, load_vision


def fitting_sections(hidden_size: int) -> dict[str, Any]:
    """Make the sections of a config for a text model of any width."""
    heads = math.gcd(hidden_size, 8)
    return {
        "adapter_config": {"num_attention_heads": heads},
        "memory_config": {"code_size": hidden_size},
        "alignment_config": {"fusion_num_attention_heads": heads},
        "qat_config": {},
    }


def variant_sections(variant: str, vision: VisionPart, text_config: PreTrainedConfig) -> dict[str, Any]:
    """Read the sections of configs/microvlm-VARIANT.json, which is made for these parts."""
    path = ROOT / "configs" / f"microvlm-{variant}.json"
    known = ", ".join(sorted(p.stem.removeprefix("microvlm-") for p in path.parent.glob("microvlm-*.json")))
    require(path.is_file(), f"--variant {variant!r}: there is no configs/{path.name}. Variants: {known}.")
    sections = json.loads(path.read_text(encoding="utf-8"))
    vision_config, width = sections.pop("vision_config"), sections.pop("text_config")["hidden_size"]
    expected = f"a text model of width {width} and the vision tower {vision_config['architecture']}"
    parts = f"a text model of width {text_config.hidden_size} and the vision tower {vision.architecture}"
    hint = "Leave --variant out for sizes that fit."
    require(parts == expected, f"--variant {variant!r} is made for {expected}, got {parts}. {hint}")
    return sections | {"model_args": vision_config.get("model_args")}


def build_config(variant: str | None, vision: VisionPart, text: TextPart, image_token_id: int) -> MicroVLMConfig:
    """Make the configuration of the composed model, with the variant's default prompt."""
    source = text.model.config
    sections = variant_sections(variant, vision, source) if variant else fitting_sections(source.hidden_size)
    model_args = sections.pop("model_args", None) or vision.model_args
    sections["adapter_config"] |= {"vision_hidden_size": vision.width, "num_patches": vision.num_patches}
    dropped = ("architectures", "auto_map", "quantization_config", "transformers_version")
    text_config = {k: v for k, v in source.to_dict().items() if k[0] != "_" and k not in dropped}
    vision_config = {"model_type": "timm_wrapper", "architecture": vision.architecture, "do_pooling": False}
    sections |= {
        "text_config": text_config | {"vocab_size": text.vocab_size},
        "vision_config": vision_config | {"model_args": model_args},
        "qat_config": sections["qat_config"] | text.qat,
        "image_token_id": image_token_id,
        "tie_word_embeddings": source.tie_word_embeddings,
    }
    return MicroVLMConfig.from_dict(sections)


def table(folder: Path) -> str:
    """Write tensors, parameters and bytes of every part, as in the files."""
    parts: dict[str, Counter] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                tensor, part = file.get_tensor(name), name.removeprefix("model.").split(".")[0]
                for key in (part, "total"):
                    parts.setdefault(key, Counter()).update(n=1, p=tensor.numel(), b=tensor.nbytes)
    parts["total"] = parts.pop("total")  # as the last line
    return text_table(["part", "tensors", "parameters", "bytes"], [[part, *c.values()] for part, c in parts.items()])


def join(vision: VisionPart, text: TextPart, variant: str | None, seed: int):
    """Join both parts; returns model, processor, and the sources' weights and text logits."""
    # a row of the embedding for the image token
    source_rows = text.vocab_size
    image_token_id = add_image_token(text)
    config = build_config(variant, vision, text, image_token_id)
    has_chat = text.tokenizer.chat_template is not None
    processor = build_processor(vision, text.tokenizer, config.num_prefix_tokens)
    if config.default_prompt_ids is None:
        config.default_prompt_ids = default_prompt(processor, has_chat)
    # what the text model alone says, with a head of the new shape, so that sums have the same order
    head = text.weights.get("lm_head.weight", text.weights["model.embed_tokens.weight"])
    text.model.get_output_embeddings().weight = nn.Parameter(head.to(text.model.dtype))
    logits = text_logits(text.model, source_rows)[..., :source_rows]
    # both parts under the names of the composed model
    weights = {VISION_PREFIX + n: t.to(text.dtype) if t.is_floating_point() else t for n, t in vision.weights.items()}
    weights |= {re.sub("^model[.]", TEXT_PREFIX, n): t for n, t in text.weights.items()}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MicroVLMForConditionalGeneration.from_pretrained(
            None, config=config, state_dict=dict(weights), dtype=text.dtype
        )
    model.generation_config = build_generation_config(text, image_token_id)
    return model, processor, weights, logits


def compose(
    vision_source: str,
    text_source: str,
    out: str | Path,
    variant: str | None = None,
    vision_revision: str | None = None,
    text_revision: str | None = None,
    text_gguf: str | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    force: bool = False,
) -> Path:
    """Write a MicroVLM checkpoint; arguments as on the command line, `dtype=None` keeps the text model's."""
    out = Path(out)
    check_out(out, force, [vision_source, text_source])
    vision = load_vision(vision_source, vision_revision)
    text = load_text(text_source, text_revision, text_gguf, dtype)
    print(f"vision: {vision.architecture}, {vision.num_patches} patches of width {vision.width}")
    print(f"text: {text.layout}, width {text.model.config.hidden_size}, {text.dtype}")
    own = "the text model's own, which takes the roles it takes" if text.tokenizer.chat_template else "turns by name"
    print(f"chat template: {own}")
    exact, source_rows = text.qat["ternary_modules"] is None, text.vocab_size
    model, processor, weights, logits = join(vision, text, variant, seed)
    added = text.vocab_size - source_rows
    place = f"{added} added row(s)" if added else "a spare row"
    print(f"{IMAGE_TOKEN} is token {model.config.image_token_id}, {place} of the embedding of {source_rows} rows")
    if not model.config.use_memory:
        print("memory: none. --variant gives one to its parts, `config: {use_memory: true}` of a recipe to others")
    # write, and verify what was written
    with atomic_folder(out) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        model = text = None  # room for the model that `verify` opens
        checks = verify(folder, weights, logits, exact)
        print(table(folder))
        print("\n".join(f"ok: {line}" for line in checks))
    print(f"wrote {out}")
    return out


def main(vision: str, text: str, out: str, dtype: str | None, **options) -> None:
    """Compose a checkpoint from the command line."""
    quiet()
    compose(vision, text, out, dtype=getattr(torch, dtype) if dtype else None, **options)
