"""What fewer bits cost a text model: perplexity and caption scores beside bytes, for one checkpoint and for the same after quantisation-aware training.

    python -m benchmarks.quality runs/v-135m/stage2 --trained runs/v-135m/ternary --data data/pictures/validation_seen.parquet

Every row is written to the disk and opened again. Perplexity is of the captions' tokens behind their pictures. "same" is the share of captions equal to
bf16's. Numbers: greedy captions, `score` of microvlm evaluate. NF4 is bitsandbytes, of vision tower and decoder, as in recipes/v/stage1.yaml.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

from benchmarks.parameters import markdown_table
from microvlm.data.rows import load_rows
from microvlm.files import atomic_file
from microvlm.model import PackedConfig
from microvlm.pack import pack, quality, token_counts

ROOT = Path(__file__).resolve().parents[1]

LAYERS, VOCABULARY = r"model\.language_model\.layers\.\d+\..*_proj", r"model\.language_model\.embed_tokens"
ROWS = {"group_size": "row", "scale_type": "float16"}
TERNARY = {LAYERS: {"format": "ternary", "group_size": "row"}}
INT8 = {VOCABULARY: {"format": "int8", **ROWS}}


def variants(trained: bool) -> dict[str, tuple[bool, dict | str | None]]:
    """Name -> of the trained checkpoint or not, and the modules of a packing recipe, "nf4", or None for bf16."""
    out = {
        "bf16": (False, None),
        "NF4": (False, "nf4"),
        "vocabulary int8": (False, INT8),
        "vocabulary int4": (False, {VOCABULARY: {"format": "int4", **ROWS}}),
        "vocabulary int4, groups of 64": (
            False,
            {VOCABULARY: {"format": "int4", "group_size": 64, "scale_type": "float16"}},
        ),
        "vocabulary ternary": (False, {VOCABULARY: {"format": "ternary", **ROWS}}),
        "decoder ternary by rounding": (False, TERNARY),
    }
    if trained:
        everything = yaml.safe_load((ROOT / "recipes" / "pack_v-135m.yaml").read_text())["modules"]
        out |= {
            "decoder ternary, trained": (True, TERNARY),
            "decoder ternary, trained; vocabulary int8": (True, TERNARY | INT8),
            "decoder ternary, trained; the rest as recipes/v/pack.yaml": (True, everything),
        }
    return out


def load(source: Path, **kwargs):
    return AutoModelForImageTextToText.from_pretrained(source, trust_remote_code=True, **kwargs).eval()


def write(source: Path, modules: dict | str | None, counts: torch.Tensor, folder: Path):
    """A variant of a checkpoint, stored in `folder` and opened from there."""
    if modules == "nf4":
        skip = ["adapter", "alignment", "memory", "memory_projection", "scope", "lm_head"]
        options = {
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16,
        }
        config = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skip, **options)
        model = load(source, dtype=torch.bfloat16, quantization_config=config)
    else:
        model = load(source, dtype=torch.float32)
        if modules is not None:
            pack(model, PackedConfig(modules), counts)
        model.to(torch.bfloat16)
    model.save_pretrained(folder)
    return load(folder, dtype="auto")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="the full-precision checkpoint")
    parser.add_argument("--trained", type=Path, help="the same after quantisation-aware training")
    parser.add_argument("--data", required=True, help="pictures with captions that were not trained on")
    parser.add_argument(
        "--counts", default=str(ROOT / "data/mini/train.parquet"), help="captions that say which tokens are frequent"
    )
    parser.add_argument("--limit", type=int, help="only the first so many")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file, after every row")
    options = parser.parse_args()

    processor = AutoProcessor.from_pretrained(options.checkpoint, trust_remote_code=True)
    rows, results, captions = load_rows(options.data, limit=options.limit), {}, None
    config = json.loads((options.checkpoint / "config.json").read_text())
    counts = token_counts(processor, options.counts, config["text_config"]["vocab_size"])
    for name, (trained, modules) in variants(options.trained is not None).items():
        source = options.trained if trained else options.checkpoint
        with tempfile.TemporaryDirectory() as folder:
            model = write(source, modules, counts, Path(folder))
            size = sum(f.stat().st_size for f in Path(folder).glob("*.safetensors"))
            scores = quality(model, processor, rows, facts=0)
        said = scores.pop("captions")
        captions = captions or said
        same = sum(a == b for a, b in zip(captions, said)) / len(said)
        results[name] = {"bytes": size} | scores | {"same": same}
        print(f"{name}: {results[name]}", file=sys.stderr, flush=True)
        if options.json:
            with atomic_file(str(options.json), "w") as file:
                file.write(json.dumps(results, indent=1))
    head = ["", "MB", "perplexity", "exact", "word F1", "CIDEr", "same"]
    keys = ("perplexity", "exact", "word_f1", "cider", "same")
    lines = [[name, f"{r['bytes'] / 1e6:.1f}", *(f"{r[key]:.3f}" for key in keys)] for name, r in results.items()]
    print(f"{options.data}, {len(rows)} pictures\n")
    print(markdown_table(head, lines))


if __name__ == "__main__":
    main()
