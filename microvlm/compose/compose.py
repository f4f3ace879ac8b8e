"""Compose one checkpoint from a timm vision tower and a language model."""

import json
import math
import re
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    PreTrainedConfig,
)
from transformers.utils import logging

from ..files import ROOT, check_out, put_folder
from ..model import MicroVLMConfig, MicroVLMForConditionalGeneration
from .parts import IMAGE_TOKEN, TEXT_PREFIX, VISION_PREFIX
from .prompt import build_generation_config, build_processor, default_prompt
from .text import TextPart, grow_vocabulary, load_text, prepare_tokenizer
from .verify import text_logits, verify
from .vision import VisionPart, load_vision


def load_sections(variant: str | None, vision: VisionPart, text_config: PreTrainedConfig) -> dict:
    """Sections of the config beside `text_config`: of the variant's file, or as they fit the text model.

    Raises:
        ValueError: no such variant, or one made for other parts.
    """
    hidden_size = text_config.hidden_size
    if variant is None:
        heads = math.gcd(hidden_size, 8)
        sections = {
            "adapter_config": {"num_attention_heads": heads},
            "memory_config": {"code_size": hidden_size},
            "alignment_config": {"fusion_num_attention_heads": heads},
            "qat_config": {},
        }
    else:
        path = ROOT / "configs" / f"microvlm-{variant}.json"
        if not path.is_file():
            known = ", ".join(sorted(p.stem.removeprefix("microvlm-") for p in path.parent.glob("microvlm-*.json")))
            raise ValueError(f"--variant {variant!r}: there is no configs/{path.name}. Variants: {known}.")
        sections = json.loads(path.read_text(encoding="utf-8"))
        vision_args = sections.pop("vision_config")
        wanted = sections.pop("text_config")["hidden_size"], vision_args["architecture"]
        sections["model_args"] = vision_args.get("model_args")
        given = hidden_size, vision.architecture
        for what, want, have in zip(("a text model of width", "the vision tower"), wanted, given):
            if want != have:
                raise ValueError(
                    f"--variant {variant!r} is made for {what} {want}, got {have}. "
                    "Leave --variant out for sizes that fit."
                )
    sections["adapter_config"] |= {"vision_hidden_size": vision.width, "num_patches": vision.num_patches}
    return sections


def build_config(variant: str | None, vision: VisionPart, text: TextPart, image_token_id: int, rows: int):
    """The configuration of the composed model; its default prompt is the variant's, if that has one."""
    sections = load_sections(variant, vision, text.model.config)
    model_args = sections.pop("model_args", None) or vision.model_args
    dropped = ("architectures", "auto_map", "quantization_config", "transformers_version")
    text_config = {k: v for k, v in text.model.config.to_dict().items() if k[0] != "_" and k not in dropped}
    return MicroVLMConfig.from_dict(
        sections
        | {
            "text_config": text_config | {"vocab_size": rows},
            "vision_config": {
                "model_type": "timm_wrapper",
                "architecture": vision.architecture,
                "model_args": model_args,
                "do_pooling": False,
            },
            "qat_config": sections["qat_config"] | text.qat,
            "image_token_id": image_token_id,
            "tie_word_embeddings": text.model.config.tie_word_embeddings,
        }
    )


def table(folder: Path) -> str:
    """Tensors, parameters and bytes of every part, as written."""
    parts: dict[str, list[int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                tensor = file.get_tensor(name)
                part = name.removeprefix("model.").split(".")[0]
                size = (1, tensor.numel(), tensor.nbytes)
                parts[part] = [a + b for a, b in zip(parts.get(part, (0, 0, 0)), size)]
    parts["total"] = [sum(column) for column in zip(*parts.values())]
    rows = [f"{'part':<16}{'tensors':>9}{'parameters':>16}{'bytes':>16}"]
    return "\n".join(rows + [f"{part:<16}{n:>9,}{p:>16,}{b:>16,}" for part, (n, p, b) in parts.items()])


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
    """Write a MicroVLM checkpoint; arguments as on the command line, `dtype=None` keeps the text model's.

    Raises:
        ValueError: something given is not what is expected, or the result does not verify; nothing is written then.
    """
    out = Path(out)
    check_out(out, force, [vision_source, text_source])
    vision = load_vision(vision_source, vision_revision)
    text = load_text(text_source, text_revision, text_gguf, dtype)
    print(f"vision: {vision.architecture}, {vision.num_patches} patches of width {vision.width}")
    print(f"text: {text.layout}, width {text.model.config.hidden_size}, {text.dtype}")

    source_rows = len(text.weights["model.embed_tokens.weight"])
    image_token_id = prepare_tokenizer(text.tokenizer)
    rows = max(source_rows, image_token_id + 1)
    place = "a spare row" if rows == source_rows else f"{rows - source_rows} added row(s)"
    print(f"{IMAGE_TOKEN} is token {image_token_id}, {place} of the embedding of {source_rows} rows")
    config = build_config(variant, vision, text, image_token_id, rows)
    has_chat = text.tokenizer.chat_template is not None
    processor = build_processor(vision, text.tokenizer, config.num_prefix_tokens)
    if config.default_prompt_ids is None:
        config.default_prompt_ids = default_prompt(processor, has_chat)

    grow_vocabulary(text.weights, rows)
    head = text.weights.get("lm_head.weight", text.weights["model.embed_tokens.weight"])
    text.model.get_output_embeddings().weight = nn.Parameter(
        head.to(text.model.dtype)
    )  # of the same shape, so that sums have the same order
    logits = text_logits(text.model, source_rows)[..., :source_rows]
    weights = {VISION_PREFIX + n: t.to(text.dtype) if t.is_floating_point() else t for n, t in vision.weights.items()}
    weights |= {re.sub("^model[.]", TEXT_PREFIX, n): t for n, t in text.weights.items()}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, info = MicroVLMForConditionalGeneration.from_pretrained(
            None, config=config, state_dict=dict(weights), dtype=text.dtype, output_loading_info=True
        )
    unfilled = [n for n in info["missing_keys"] if n.startswith((VISION_PREFIX, TEXT_PREFIX, "lm_head"))]
    if unfilled or info["unexpected_keys"] or info["mismatched_keys"]:
        raise ValueError(f"the parts do not fit the composed model: not filled {unfilled}, {info}")
    model.generation_config = build_generation_config(text, image_token_id)

    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        exact = text.qat["ternary_modules"] is None
        del model, text
        checks = verify(temporary, weights, logits, exact)
        print(table(temporary))
        print("\n".join(f"ok: {line}" for line in checks))
        put_folder(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"wrote {out}")
    return out


def main(vision: str, text: str, out: str, dtype: str | None, **options) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    compose(vision, text, out, dtype=getattr(torch, dtype) if dtype else None, **options)
