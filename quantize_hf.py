"""Pack a checkpoint: ternary weights at 1.6 bits, embeddings and vision in few bits, and say what it costs.

    python quantize_hf.py IN OUT --recipe recipes/pack_v.yaml --data data/mini/validation.parquet
    python quantize_hf.py IN OUT --recipe recipes/pack_nano.yaml --set dtype=float32

OUT opens with `from_pretrained(OUT, trust_remote_code=True)`. Printed: bytes and bits per weight of every part, and with `--data` perplexity,
caption scores and memory recall of IN and of OUT, opened again from the disk. Rounding a decoder that was not trained for it to three values ruins it: train it
first (`config: {qat_config.ternary_modules: [...]}` and `distillation` in train_hf.py).

Keys of a recipe: `modules` (regular expression on module names -> format, group_size, activation_bits, scale_type, frequent_rows,
frequent_format; see `Scheme` in quantization_microvlm.py), `dtype` of what stays in floating point, `counts` (pictures with captions whose tokens
say which rows of the vocabulary are frequent; without it those of the lowest ids, as BPE numbers them).
"""

import argparse
import json
import math
import re
import shutil
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForImageTextToText, AutoProcessor

from caption import replacing
from compose_hf import publish
from data_microvlm import CaptionCollator, load_rows, text_ids
from evaluate_hf import caption_rows, score

RECIPE_KEYS = {"modules", "dtype", "counts"}


def load_recipe(path: str, overrides: list[str] = ()) -> dict:
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
    if unknown := sorted(set(recipe) - RECIPE_KEYS):
        raise ValueError(f"unknown key in {path}: {', '.join(unknown)}. Known: {', '.join(sorted(RECIPE_KEYS))}.")
    if not recipe.get("modules"):
        raise ValueError(f"{path} has no modules: what to pack.")
    return recipe


def quantization_of(model):
    """The checkpoint's own quantization_microvlm module."""
    return sys.modules[type(model).__module__.rpartition(".")[0] + ".quantization_microvlm"]


def load_plain(folder: str | Path):
    """The model of a checkpoint in float32, packed weights unpacked."""
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    packed = getattr(model.config, "quantization_config", None) is not None
    return model.dequantize(torch.float32) if packed else model


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
    quantization = quantization_of(model)
    plain = dict(model.named_modules())
    for name, new in quantization.replace_with_packed(model, config).items():
        old = plain[name]
        if isinstance(new, quantization.PackedEmbedding):
            new.store(old.weight, torch.arange(len(old.weight), 0, -1) if counts is None else counts)
            continue
        trained = isinstance(old, quantization.TernaryLinear) and old.ternary_weights
        if trained and (new.scheme.format, new.scheme.group_size) != ("ternary", old.group_size):
            raise ValueError(
                f"{name} was trained ternary with group_size {old.group_size!r}, {new.scheme} would round it otherwise."
            )
        new.store(old.weight, as_trained=trained)
        new.bias = old.bias
    model.hf_quantizer = quantization.PackedQuantizer(config)
    model.config.quantization_config = config
    model.is_quantized = True


@torch.no_grad()
def perplexity(model, processor, rows, batch_size: int = 16) -> float:
    """Of the captions, per token."""
    collator = CaptionCollator(processor, model.default_prompt(1)[0].tolist())
    total, tokens = 0.0, 0
    for start in range(0, len(rows), batch_size):
        batch = collator(list(rows.select(range(start, min(start + batch_size, len(rows))))))
        count = int((batch["labels"] != -100).sum())
        batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
        total += float(model(**batch).loss) * count
        tokens += count
    return math.exp(total / tokens)


def memory_recall(model, processor, rows, facts: int) -> float:
    """Share of so many taught names that are said of an augmented view of their picture, as benchmarks/memory_recall.py counts."""
    sys.path.append(str(Path(__file__).resolve().parent / "benchmarks"))
    from memory_recall import Bench, said

    bench = Bench(model, processor, rows)
    pictures, names = bench.choose(facts), bench.draw.sample(bench.names["new"], facts)
    memory = bench.teach([pictures], [bench.facts(names, pictures)])
    return sum(map(said, names, bench.answers(1, pictures, memory=memory))) / facts


def quality(model, processor, rows, facts: int) -> dict[str, float]:
    """What `--data` measures; `captions` beside it."""
    candidates, references = caption_rows(model, processor, rows)
    scores = score(candidates, references)
    out = {"perplexity": perplexity(model, processor, rows)} | {k: scores[k] for k in ("exact", "word_f1", "cider")}
    if model.config.use_memory and facts:
        out[f"recall of {facts} facts"] = memory_recall(model, processor, rows, facts)
    return out | {"captions": candidates}


PARTS = (
    ("vision", r"model\.vision_tower\."),
    ("adapter", r"model\.adapter\."),
    ("decoder layers", r"model\.language_model\.layers\."),
    ("vocabulary", r"model\.language_model\.embed_tokens\.|lm_head\."),
    ("memory", r"model\.(memory|memory_projection|scope)\."),
)


def size_table(model) -> str:
    """Part, formats, bytes as stored and bits per weight."""
    quantization = quantization_of(model)
    owners = {}
    for name, module in model.named_modules():
        for key in module.state_dict() if isinstance(module, quantization.PackedWeight) else ():
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
    recipe, output = load_recipe(options.recipe, options.set), Path(options.output)
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
    pack(model, quantization_of(model).PackedConfig(recipe["modules"]), counts)
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
        publish(temporary, output)
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
        with replacing(options.json, "w") as file:
            file.write(json.dumps(results | {"bytes": files}, indent=1))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"quantize_hf.py: {error}")
