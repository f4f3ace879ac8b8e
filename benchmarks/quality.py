"""Measure what fewer bits cost a text model: perplexity and caption scores next to bytes.

    python -m benchmarks.quality runs/v-135m/stage2 --trained runs/v-135m/ternary \\
        --data data/pictures/validation_seen.parquet

Takes a checkpoint, and the same after quantisation-aware training. Every row is written to the disk and opened again.
Perplexity is over the captions' tokens after their images; "same" is the share of captions equal to bf16's. NF4 is
bitsandbytes', of all linear layers but the head; training with `quantization` also leaves adapter and memory.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

from benchmarks.models import load_weights, nf4_config
from microvlm.data.rows import load_rows
from microvlm.files import ROOT
from microvlm.model import MicroVLMConfig, PackedConfig
from microvlm.pack import load_pack_recipe, pack, quality, token_counts
from microvlm.tables import markdown_table

LAYERS, VOCABULARY = r"model\.language_model\.layers\.\d+\..*_proj", r"model\.language_model\.embed_tokens"
TERNARY = {LAYERS: {"format": "ternary", "group_size": "row"}}
PACK_RECIPE = ROOT / "recipes/v-135m/pack.yaml"
COUNTS = str(ROOT / "data/mini/train.parquet")  # captions that say which tokens are frequent
NF4 = nf4_config(["lm_head"])


def vocabulary(format: str, group_size: str | int = "row") -> dict[str, dict]:
    """Name a format for the vocabulary in the manner of a packing recipe."""
    return {VOCABULARY: {"format": format, "group_size": group_size, "scale_type": "float16"}}


def variants() -> dict[str, tuple[bool, dict | BitsAndBytesConfig | None]]:
    """List the rows: of the trained checkpoint or not; modules to pack, NF4, or None."""
    everything = load_pack_recipe(str(PACK_RECIPE))["modules"]
    return {
        "bf16": (False, None),
        "NF4": (False, NF4),
        "vocabulary int8": (False, vocabulary("int8")),
        "vocabulary int4": (False, vocabulary("int4")),
        "vocabulary int4, groups of 64": (False, vocabulary("int4", 64)),
        "vocabulary ternary": (False, vocabulary("ternary")),
        "decoder ternary by rounding": (False, TERNARY),
        "decoder ternary, trained": (True, TERNARY),
        "decoder ternary, trained; vocabulary int8": (True, TERNARY | vocabulary("int8")),
        "decoder ternary, trained; the rest as recipes/v-135m/pack.yaml": (True, everything),
    }


def write(source: Path, modules: dict | BitsAndBytesConfig | None, counts: torch.Tensor, folder: Path):
    """Write a variant of a checkpoint to `folder` and open it from there."""
    load = AutoModelForImageTextToText.from_pretrained
    if isinstance(modules, BitsAndBytesConfig):
        model = load(source, dtype=torch.bfloat16, quantization_config=modules)
    else:
        model = load(source, dtype=torch.float32)
        if modules is not None:
            pack(model, PackedConfig(modules), counts)
        model.to(torch.bfloat16)
    model.save_pretrained(folder)
    return load_weights(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="the full-precision checkpoint")
    parser.add_argument("--trained", type=Path, required=True, help="the same after quantisation-aware training")
    parser.add_argument("--data", required=True, help="images with captions that were not trained on")
    options = parser.parse_args()

    processor = AutoProcessor.from_pretrained(options.checkpoint)
    rows, results, reference = load_rows(options.data, split="validation"), {}, None
    vocab_size = MicroVLMConfig.from_pretrained(options.checkpoint).text_config.vocab_size
    counts = token_counts(processor, COUNTS, vocab_size)
    for name, (trained, modules) in variants().items():
        source = options.trained if trained else options.checkpoint
        # write, open, score
        with tempfile.TemporaryDirectory() as folder:
            model = write(source, modules, counts, Path(folder))
            size = sum(f.stat().st_size for f in Path(folder).glob("*.safetensors"))
            scores, captions = quality(model, processor, rows, facts=0)
        # compare with bf16, the first row
        reference = reference or captions
        same = sum(a == b for a, b in zip(reference, captions)) / len(captions)
        results[name] = {"bytes": size} | scores | {"same": same}
        print(f"{name}: {results[name]}", file=sys.stderr, flush=True)
    keys = ("perplexity", "exact", "word_f1", "cider", "same")
    lines = [[name, f"{r['bytes'] / 1e6:.1f}", *(f"{r[key]:.3f}" for key in keys)] for name, r in results.items()]
    print(f"{options.data}, {len(rows)} images\n")
    print(markdown_table(["", "MB", "perplexity", "exact", "word F1", "CIDEr", "same"], lines))


if __name__ == "__main__":
    main()
