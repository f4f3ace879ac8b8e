"""Pack a checkpoint: ternary weights at 1.6 bits, embeddings and vision at 4 or 8."""

import argparse
import json
import re
import shutil
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForImageTextToText, AutoProcessor

from .data.rows import load_rows, text_ids
from .evaluate.captions import caption_rows
from .evaluate.language import perplexity
from .evaluate.memory import share_recalled
from .files import atomic_file, put_folder
from .metrics import score
from .model import PackedConfig, PackedEmbedding, PackedQuantizer, PackedWeight, TernaryLinear, replace_with_packed

PACK_KEYS = {"modules", "dtype", "counts"}
PARTS = (
    ("vision", r"model\.vision_tower\."),
    ("adapter", r"model\.adapter\."),
    ("decoder layers", r"model\.language_model\.layers\."),
    ("vocabulary", r"model\.language_model\.embed_tokens\.|lm_head\."),
    ("memory", r"model\.(memory|memory_projection|scope)\."),
)


def load_pack_recipe(path: str, overrides: list[str] = ()) -> dict:
    """A recipe with `key=value` overrides applied.

    Raises:
        ValueError: unknown keys, no modules, or an override without `=`.
    """
    recipe = yaml.safe_load(Path(path).read_text())
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"--set takes key=value, got {override!r}.")
        recipe[name] = yaml.safe_load(value)
    if unknown := sorted(set(recipe) - PACK_KEYS):
        raise ValueError(f"unknown key in {path}: {', '.join(unknown)}. Known: {', '.join(sorted(PACK_KEYS))}.")
    if not recipe.get("modules"):
        raise ValueError(f"{path} has no modules: what to pack.")
    return recipe


def token_counts(processor, source: str, size: int) -> torch.Tensor:
    """How often each of `size` tokens occurs in the captions of `source`, the end token once per caption, (size,)."""
    rows = load_rows(source)
    ids = [
        i
        for line in text_ids(processor.tokenizer, rows["caption"][:])
        for i in (*line, processor.tokenizer.eos_token_id)
    ]
    return torch.bincount(torch.tensor(ids), minlength=size)


@torch.no_grad()
def pack(model, config, counts: torch.Tensor | None = None) -> None:
    """Replace what `config` names by packed modules with the model's own weights, rounded.

    Args:
        model: in floating point; ternary training layers are packed as they round.
        config: a `PackedConfig`.
        counts: of the vocabulary's tokens (V,), for `frequent_rows`; default: the lower the id, the more frequent, as BPE numbers its merges.
    """
    plain = dict(model.named_modules())
    for name, new in replace_with_packed(model, config).items():
        old = plain[name]
        if isinstance(new, PackedEmbedding):
            new.store(old.weight, torch.arange(len(old.weight), 0, -1) if counts is None else counts)
            continue
        trained = isinstance(old, TernaryLinear) and old.ternary_weights
        if trained and (new.scheme.format, new.scheme.group_size) != ("ternary", old.group_size):
            raise ValueError(
                f"{name} was trained ternary with group_size {old.group_size!r}, {new.scheme} would round it otherwise."
            )
        new.store(old.weight, as_trained=trained)
        new.bias = old.bias
    model.hf_quantizer = PackedQuantizer(config)
    model.config.quantization_config = config
    model.is_quantized = True


def quality(model, processor, rows, facts: int) -> dict[str, float]:
    """What `--data` measures; `captions` beside it."""
    candidates, references = caption_rows(model, processor, rows)
    scores = score(candidates, references)
    out = {"perplexity": perplexity(model, processor, rows)} | {k: scores[k] for k in ("exact", "word_f1", "cider")}
    if model.config.use_memory and facts:
        out[f"recall of {facts} facts"] = share_recalled(model, processor, rows, facts)
    return out | {"captions": candidates}


def size_table(model) -> str:
    """Part, formats, bytes as stored and bits per weight."""
    owners = {}
    for name, module in model.named_modules():
        for key in module.state_dict() if isinstance(module, PackedWeight) else ():
            owners[f"{name}.{key}"] = module
    parts = defaultdict(lambda: [set(), 0, 0])
    for name, tensor in model.state_dict().items():
        part = next((p for p, pattern in PARTS if re.match(pattern, name)), "rest")
        own = owners.get(name)
        kind = own.scheme.format if own is not None else str(tensor.dtype).removeprefix("torch.")
        weights = tensor.numel()
        if own is not None:
            weights = own.rows * own.columns if name.endswith(".weight") else 0
        elif name.endswith("is_frequent"):
            weights = 0
        for key in ((part, kind), ("total", "")):
            parts[key][1] += tensor.numel() * tensor.element_size()
            parts[key][2] += weights
    lines = [f"{'part':<18}{'format':<12}{'weights':>16}{'bytes':>16}{'bits per weight':>18}"]
    order = [p for p, _ in PARTS] + ["rest", "total"]
    for (part, kind), (_, size, weights) in sorted(parts.items(), key=lambda x: (order.index(x[0][0]), x[0][1])):
        lines.append(f"{part:<18}{kind:<12}{weights:>16,}{size:>16,}{8 * size / max(1, weights):>18.3f}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="IN", help="folder or Hub id")
    parser.add_argument("output", metavar="OUT", help="a folder that does not exist")
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    parser.add_argument("--revision", help="of IN on the Hub")
    parser.add_argument("--data", help="pictures with captions to measure the quality on")
    parser.add_argument("--limit", type=int, help="only the first so many")
    parser.add_argument("--facts", type=int, default=16, help="to teach the memory, 0: none; default %(default)s")
    parser.add_argument("--json", help="also write sizes and scores to this file")
    options = parser.parse_args(argv)
    recipe, output = load_pack_recipe(options.recipe, options.set), Path(options.output)
    if output.exists():
        raise FileExistsError(f"{output} exists: choose another folder.")
    where = {"revision": options.revision, "trust_remote_code": True}
    bare = Path(options.checkpoint).is_dir() and not (Path(options.checkpoint) / "processor_config.json").exists()
    if bare and (options.data or recipe.get("counts")):
        raise ValueError(f"{options.checkpoint} has no processor: --data and counts need one.")
    processor = None if bare else AutoProcessor.from_pretrained(options.checkpoint, **where)
    model = AutoModelForImageTextToText.from_pretrained(options.checkpoint, dtype=torch.float32, **where).eval()
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(f"{options.checkpoint} is quantized already.")
    rows = load_rows(options.data, limit=options.limit) if options.data else None
    results = {"before": quality(model, processor, rows, options.facts)} if rows is not None else {}

    counts = None
    if recipe.get("counts"):
        counts = token_counts(processor, recipe["counts"], model.config.text_config.vocab_size)
    pack(model, PackedConfig(recipe["modules"]), counts)
    model.to(getattr(torch, recipe.get("dtype", "bfloat16")))
    print(size_table(model), flush=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        model.save_pretrained(temporary)
        if processor is not None:
            processor.save_pretrained(temporary)
        opened = AutoModelForImageTextToText.from_pretrained(temporary, trust_remote_code=True).eval()
        stored = model.state_dict()
        for name, tensor in opened.state_dict().items():
            if not torch.equal(tensor, stored[name]):
                raise RuntimeError(f"{name} comes back from the disk changed.")
        put_folder(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    files = sum(f.stat().st_size for f in output.glob("*.safetensors"))
    print(f"\n{output}: {files:,} bytes of weights", flush=True)
    if rows is not None:
        results["after"] = quality(opened, processor, rows, options.facts)
        same = [a == b for a, b in zip(*(results[k].pop("captions") for k in ("before", "after")))]
        print(f"\n{options.data}, {len(rows)} pictures\n{'':<24}{'before':>12}{'after':>12}")
        for name, value in results["before"].items():
            print(f"{name:<24}{value:>12.4f}{results['after'][name]:>12.4f}")
        print(f"{'same caption':<24}{'':>12}{sum(same) / len(same):>12.4f}")
        results["same captions"] = sum(same) / len(same)
    if options.json:
        with atomic_file(options.json, "w") as file:
            file.write(json.dumps(results | {"bytes": files}, indent=1))
