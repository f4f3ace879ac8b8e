"""Pack a checkpoint: ternary weights at 1.6 bits, embeddings and vision at 4 or 8."""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from .data.rows import load_rows, text_ids
from .evaluate.captions import caption_rows
from .evaluate.language import language_scores, teacher_forced
from .evaluate.memory import share_recalled
from .files import atomic_folder
from .hub import write_plain_card
from .metrics import score
from .model import (
    PackedConfig,
    PackedEmbedding,
    PackedQuantizer,
    PackedWeight,
    TernaryLinear,
    replace_with_packed,
    require,
)
from .recipes import check_types, read_recipe
from .tables import text_table

DTYPES = Literal["float32", "bfloat16", "float16"]
PACK_KEYS = {"modules": dict[str, dict], "dtype": DTYPES | None, "counts": str | list[str] | None}
PARTS = (
    ("vision", r"model\.vision_tower\."),
    ("adapter", r"model\.adapter\."),
    ("decoder layers", r"model\.language_model\.layers\."),
    ("vocabulary", r"model\.language_model\.embed_tokens\.|lm_head\."),
    ("memory", r"model\.(memory|memory_projection|memory_copy|scope)\."),
)


def load_pack_recipe(path: str | Path, overrides: list[str] = ()) -> dict[str, Any]:
    """Read a recipe and apply `key=value` overrides."""
    recipe = check_types(path, read_recipe(path, overrides), PACK_KEYS)
    require(recipe["modules"], f"{path} has no modules: what to pack.")
    return {"dtype": "bfloat16"} | recipe


def token_counts(processor, source: str, size: int) -> torch.Tensor:
    """Count each of `size` tokens in the captions of `source`, the end token once per caption; (size,)."""
    lines = text_ids(processor.tokenizer, load_rows(source)["caption"][:])
    ids = [token for line in lines for token in (*line, processor.tokenizer.eos_token_id)]
    return torch.bincount(torch.tensor(ids), minlength=size)


@torch.no_grad()
def pack(model, config, counts: torch.Tensor | None = None) -> None:
    """Replace the modules that a `PackedConfig` names by packed ones with the same weights, rounded.

    Ternary training layers are packed as they round. `counts` of the vocabulary's tokens (V,) are for `frequent_rows`;
    by default, the lower the id, the more frequent, as BPE numbers its merges.
    """
    plain = dict(model.named_modules())
    # give each packed module the rounded weights of the one it replaces
    for name, new in replace_with_packed(model, config).items():
        old = plain[name]
        if isinstance(new, PackedEmbedding):
            new.store(old.weight, torch.arange(len(old.weight), 0, -1) if counts is None else counts)
            continue
        trained = isinstance(old, TernaryLinear) and old.ternary_weights
        if trained:
            as_trained = (new.scheme.format, new.scheme.group_size) == ("ternary", old.group_size)
            trained_as = f"{name} was trained ternary with group_size {old.group_size!r}"
            require(as_trained, f"{trained_as}, {new.scheme} would round it otherwise.")
        new.store(old.weight, as_trained=trained)
        new.bias = old.bias
    # as if transformers had opened it packed
    model.hf_quantizer = PackedQuantizer(config)
    model.config.quantization_config = config
    model.is_quantized = True


def quality(model, processor, rows, facts: int) -> tuple[dict[str, float], list[str]]:
    """Measure a model on captioned images; returns the scores and its captions."""
    candidates, references = caption_rows(model, processor, rows)
    forced, scores = teacher_forced(model, processor, rows, align=False), score(candidates, references)
    scores |= language_scores(forced["loss"], forced["tokens"], references)
    out = {k: scores[k] for k in ("perplexity", "exact", "word_f1", "cider")}
    if model.config.use_memory and facts:
        out[f"recall of {facts} facts"] = share_recalled(model, processor, rows, facts)
    return out, candidates


def size_table(model) -> str:
    """Write part, format, weights, bytes as stored and bits per weight as a table."""
    owners = {
        f"{name}.{key}": module
        for name, module in model.named_modules()
        if isinstance(module, PackedWeight)
        for key in module.state_dict()
    }
    # add up each tensor under its part and format
    parts = defaultdict(lambda: [0, 0])  # (part, format) -> weights, bytes
    for name, tensor in model.state_dict().items():
        part = next((p for p, pattern in PARTS if re.match(pattern, name)), "rest")
        owner, weights = owners.get(name), tensor.numel()
        kind = owner.scheme.format if owner is not None else str(tensor.dtype).removeprefix("torch.")
        # scales and tables take bytes, but are no weights
        if owner is not None:
            weights = owner.rows * owner.columns if name.endswith(".weight") else 0
        elif name.endswith("is_frequent"):
            weights = 0
        for key in ((part, kind), ("total", "")):
            parts[key][0] += weights
            parts[key][1] += tensor.numel() * tensor.element_size()
    # the parts in the order of a forward pass
    order = [p for p, _ in PARTS] + ["rest", "total"]
    lines = sorted(parts.items(), key=lambda x: (order.index(x[0][0]), x[0][1]))
    rows = [[*names, weights, size, 8 * size / max(1, weights)] for names, (weights, size) in lines]
    return text_table(["part", "format", "weights", "bytes", "bits per weight"], rows, left=2)


def open_plain(checkpoint: str, revision: str, needs_processor: bool) -> tuple[PreTrainedModel, object | None]:
    """Open a checkpoint in float32 with its processor, or None for a folder without one."""
    bare = Path(checkpoint).is_dir() and not (Path(checkpoint) / "processor_config.json").exists()
    require(not (bare and needs_processor), f"{checkpoint} has no processor: --data and counts need one.")
    processor = None if bare else AutoProcessor.from_pretrained(checkpoint, revision=revision)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32, revision=revision).eval()
    require(getattr(model.config, "quantization_config", None) is None, f"{checkpoint} is quantized already.")
    return model, processor


def save_packed(model, processor, out: Path, source: str) -> PreTrainedModel:
    """Write a packed model, its processor and a card as a new folder; returns it as opened again."""
    with atomic_folder(out) as folder:
        for part in (model, processor):
            if part is not None:
                part.save_pretrained(folder)
        write_plain_card(folder, source=source)
        opened = AutoModelForImageTextToText.from_pretrained(folder).eval()
        # what was written is what is in memory
        stored = model.state_dict()
        for name, tensor in opened.state_dict().items():
            require(torch.equal(tensor, stored[name]), f"{name} comes back from the disk changed.")
    return opened


def compare(data: str, count: int, before: tuple, after: tuple) -> None:
    """Print the scores of a checkpoint before and after packing."""
    (scores, captions), (packed_scores, packed_captions) = before, after
    same = sum(a == b for a, b in zip(captions, packed_captions)) / count
    rows = [[name, f"{value:.4f}", f"{packed_scores[name]:.4f}"] for name, value in scores.items()]
    print(f"\n{data}, {count} pictures")
    print(text_table(["", "before", "after"], [*rows, ["same caption", "", f"{same:.4f}"]]))


def main(checkpoint: str, out: Path, recipe: Path, assignments: list[str], revision: str, **measure) -> None:
    """Pack a checkpoint as a recipe says, and measure it before and after."""
    settings = load_pack_recipe(recipe, assignments)
    require(not out.exists(), f"{out} exists: choose another folder.")
    counts, data, facts = settings.get("counts"), measure["data"], measure["facts"]
    model, processor = open_plain(checkpoint, revision, bool(data or counts))
    # measure, pack, print the sizes
    rows = load_rows(data, limit=measure["limit"], split="validation") if data else None
    before = quality(model, processor, rows, facts) if data else None
    if counts:
        counts = token_counts(processor, counts, model.config.text_config.vocab_size)
    pack(model, PackedConfig(settings["modules"]), counts)
    model.to(getattr(torch, settings["dtype"]))
    print(size_table(model), flush=True)
    # write, open again, measure again
    opened = save_packed(model, processor, out, checkpoint)
    size = sum(f.stat().st_size for f in out.glob("*.safetensors"))
    print(f"\n{out}: {size:,} bytes of weights", flush=True)
    if data:
        compare(data, len(rows), before, quality(opened, processor, rows, facts))
