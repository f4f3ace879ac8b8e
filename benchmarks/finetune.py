"""Measure what fine-tuning on images of new things learns, and what it forgets.

    python -m benchmarks.finetune --data data/pictures/validation.parquet --old data/pictures/validation_seen.parquet

60 concepts that nano never saw, called "A <concept>.", are learned in all styles but one, which judges. What was known
before is judged by captions of old concepts, and by 12 facts that were taught before and are asked afterwards.
Further words go to `microvlm train`: `--set training.max_steps=100`.
"""

import argparse
import random
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoProcessor

from microvlm.data.rows import load_rows
from microvlm.evaluate.bench import Bench, name_share
from microvlm.evaluate.captions import caption_rows
from microvlm.files import ROOT
from microvlm.metrics import score
from microvlm.model import load_plain
from microvlm.tables import markdown_table

CONCEPTS, FACTS, OLD = 60, 12, 80
HELD_OUT = "emoji-noto"  # the style that judges


def new_things(rows: Dataset, seed: int) -> tuple[Dataset, Dataset]:
    """Choose concepts with an image in the style that judges and others; returns images to learn and to judge by."""
    styles = defaultdict(list)
    for concept, style in zip(rows["concept"], rows["style"]):
        styles[concept].append(style)
    several = sorted(c for c, found in styles.items() if HELD_OUT in found and len(set(found)) > 2)
    chosen = set(random.Random(seed).sample(several, CONCEPTS))
    rows = rows.select([i for i, concept in enumerate(rows["concept"]) if concept in chosen])
    names = [f"{'An' if concept[0] in 'aeiou' else 'A'} {concept}." for concept in rows["concept"]]
    rows = rows.remove_columns("caption").add_column("caption", names)
    judges = {c: i for i, (c, style) in enumerate(zip(rows["concept"], rows["style"])) if style == HELD_OUT}
    learned = [i for i, style in enumerate(rows["style"]) if style != HELD_OUT]
    return rows.select(learned), rows.select(sorted(judges.values()))


def exact(model, processor, rows: Dataset) -> float:
    return score(*caption_rows(model, processor, rows))["exact"]


def figures(checkpoint: str, new: Dataset, old: Dataset, taught: Path) -> list:
    """Measure a checkpoint: captions of new and old things, names it says, and whether it reads the file of facts."""
    model, processor = load_plain(checkpoint).eval(), AutoProcessor.from_pretrained(checkpoint)
    bench = Bench(model, processor, old.select(range(FACTS)))
    images, names = list(range(FACTS)), bench.names["new"][:FACTS]
    try:
        memory, read = model.load_memory(taught), "read"
    except (FileNotFoundError, ValueError) as error:
        memory, read = bench.teach([images], [bench.facts(names, images)]), f"refused: {error}"
    if not taught.exists():
        memory.save(taught)
        read = "written"
    said = name_share(names, bench.answers(1, images, memory=memory))
    return [exact(model, processor, new), exact(model, processor, old), f"{said * FACTS:.0f} of {FACTS}", read]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=str(ROOT))
    add("--data", required=True, help="images of concepts that were never learned, with concept and style")
    add("--old", required=True, help="images of concepts that were")
    add("--recipe", default=str(ROOT / "recipes/finetune.yaml"))
    add("--out", type=Path, default=Path("runs/finetune_benchmark"), help="a folder that does not exist")
    add("--seed", type=int, default=0, help="of the choice of concepts")
    options, changes = parser.parse_known_args()
    options.out.mkdir(parents=True)
    learned, new = new_things(load_rows(options.data, split="validation"), options.seed)
    old = load_rows(options.old, split="validation").shuffle(seed=0).select(range(OLD))
    learned.to_parquet(options.out / "learned.parquet")
    taught, tuned = options.out / "facts.safetensors", options.out / "tuned"
    before = figures(options.model, new, old, taught)
    # the command that a user types
    command = [sys.executable, "-m", "microvlm", "train", options.recipe, *changes]
    command += ["--set", f"data.train={options.out / 'learned.parquet'}", "--set", f"training.output_dir={tuned}"]
    started = time.time()
    subprocess.run([*command, "--set", f"model={options.model}"], check=True, stdout=sys.stderr)
    minutes = (time.time() - started) / 60
    after = figures(str(tuned), new, old, taught)
    print(f"{len(learned)} images of {CONCEPTS} new things, {minutes:.1f} minutes\n")
    header = ["run", f"exact, {len(new)} new", f"exact, {OLD} old", "taught names said", "file of facts"]
    print(markdown_table(header, [["before", *before], ["after", *after]]))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
