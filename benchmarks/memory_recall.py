"""Measure what the memory gives back: facts about unseen images, stored, asked and forgotten.

    python -m benchmarks.memory_recall --draws 4 --data data/pictures/validation.parquet --plot docs/memory_recall.png

Facts are stored without a gradient step and asked by free greedy generation: with the stored image, a changed view of
it, another artist's drawing of the concept, or a question in words. Names come from training or are new. Peers in the
same run: no memory, the nearest stored image's sentence, all facts in the prompt, and 20 steps of LoRA.
"""

import argparse
import copy
import json
import sys
from collections import defaultdict
from functools import reduce
from pathlib import Path
from statistics import median

import torch

from benchmarks.machine import seconds
from microvlm.data.rows import decode_row, load_rows
from microvlm.evaluate.bench import BATCH, Bench
from microvlm.evaluate.memory import mean, measure
from microvlm.files import ROOT
from microvlm.model import load
from microvlm.tables import markdown_table

FACT = "This is Bimo the penguin."
# tables: title, and columns: header -> figure of `measure`, by the path of its keys
RECALL = {
    "same image": "same",
    "augmented view": "view",
    "other style": "style",
    "the same with the gate open": "style_open",
    "in words": "words",
    "word F1 (view)": "word_f1",
    "no memory (same)": "no_memory",
    "nearest (view)": "view_nearest",
    "nearest (style)": "style_nearest",
}
SUMMARY = {
    "same image": "seen.same",
    "augmented view": "seen.view",
    "other style": "seen.style",
    "in words": "seen.words",
    "word F1": "seen.word_f1",
    "false recalls, unrelated": "unrelated.false_recall",
    "... look-alikes": "lookalike.false_recall",
    "AUROC": "unrelated.auroc",
    "nearest neighbour, view": "seen.view_nearest",
}
UNWRITTEN = {"false recall": "false_recall", "unchanged": "unchanged", "AUROC": "auroc", "EER": "eer"}
UNWRITTEN |= {"accuracy": "accuracy"}
HALF = {"forgotten": "forget.forgotten", "kept": "forget.kept", "kept, before": "forget.kept_before"}
BY_FACTS = {
    "Summary.": SUMMARY,
    "All facts in the prompt, augmented views.": {"recall": "in_prompt"},
    "Images of other things.": {"unrelated images": "unrelated.pictures"}
    | {column: f"unrelated.{key}" for column, key in UNWRITTEN.items()}
    | {"false recall, in words": "unrelated.words_false_recall"},
    "Images that share a word.": {"look-alikes": "lookalike.pictures"}
    | {column: f"lookalike.{key}" for column, key in UNWRITTEN.items()},
    "After forgetting half, augmented views.": HALF,
    "Bytes.": {name: f"bytes.{name}" for name in ("posterior", "receipts", "retrieval")},
}
NAMES = ["facts", "asked with", "positive (= recall)", "negative", "mean", "precision", "F1"]
# three plots: title, and curves: label -> (figure, format of matplotlib)
PLOTS = {
    "taught name said": {
        "same image": ("seen.same", "C0o-"),
        "augmented view": ("seen.view", "C1o-"),
        "other style": ("seen.style", "C2o-"),
        "in words": ("seen.words", "C3o-"),
        "same image, new names": ("new.same", "C0o--"),
        "augmented view, new names": ("new.view", "C1o--"),
        "other style, new names": ("new.style", "C2o--"),
        "in words, new names": ("new.words", "C3o--"),
        "nearest neighbour, view": ("seen.view_nearest", "k:"),
        "facts in the prompt, view": ("in_prompt", "kx"),
    },
    "not written, forgotten, kept": {
        "false recall, unrelated": ("unrelated.false_recall", "C0o-"),
        "false recall, look-alike": ("lookalike.false_recall", "C1o-"),
        "scope AUROC, unrelated": ("unrelated.auroc", "C0o--"),
        "scope AUROC, look-alike": ("lookalike.auroc", "C1o--"),
        "forgotten, recall": ("forget.forgotten", "C3o-"),
        "kept, recall": ("forget.kept", "C2o-"),
    },
    "bytes": {
        "memory: posterior": ("bytes.posterior", "C0o-"),
        "memory: receipts": ("bytes.receipts", "C1o-"),
        "retrieval": ("bytes.retrieval", "C2o-"),
    },
}


def timings(bench: Bench, row: dict, repeats: int = 7) -> dict[str, float]:
    """Time writing, reading and forgetting one fact, and 20 LoRA steps on it; median milliseconds."""
    from peft import LoraConfig, get_peft_model

    model, processor = bench.model, bench.processor
    image = decode_row(row, processor.image_processor)[0]
    inputs = processor(images=[image], text=[processor.image_token + FACT], return_tensors="pt")
    inputs = inputs.to(model.device, model.dtype)
    # prompt and answer as a row to train on
    prompt = model.default_prompt(1)
    start, answer = prompt[0].tolist(), [*bench.tokens(FACT), processor.tokenizer.eos_token_id]
    ids = torch.tensor([start + answer], device=model.device)
    labels = torch.tensor([[-100] * len(start) + answer], device=model.device)
    half = bench.teach([list(range(BATCH))], [[FACT] * BATCH])

    def read(memory):
        image = model.get_image_features(inputs["pixel_values"], return_dict=True)
        return model.model.read_memory(memory, model.model.get_memory_query(prompt, None, image.last_hidden_state))

    def lora_steps(tuned, optimizer):
        with torch.no_grad():
            image = {"image": tuned.get_image_features(inputs["pixel_values"].float(), return_dict=True)}
        for _ in range(20):
            tuned(input_ids=ids, mm_encoder_outputs=image, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    times = defaultdict(list)
    for _ in range(repeats):
        # the memory
        duration, written = seconds(lambda: model.write_memory(half, **inputs))
        times["write"].append(duration)
        with torch.inference_mode():
            times["read"].append(seconds(lambda w=written: read(w))[0])
        times["forget"].append(seconds(lambda w=written: model.forget(w, BATCH))[0])
        # a fresh copy of the model with LoRA branches
        plain = copy.deepcopy(model)
        plain = plain.dequantize(torch.float32) if getattr(plain, "is_quantized", False) else plain.float()
        tuned = get_peft_model(plain, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
        optimizer = torch.optim.AdamW((p for p in tuned.parameters() if p.requires_grad), lr=1e-3)
        times["20 LoRA steps"].append(seconds(lambda t=tuned, o=optimizer: lora_steps(t, o))[0])
    return {name: 1000 * median(values) for name, values in times.items()}


def figure(result: dict, path: str) -> float | None:
    """Look up a figure by its path, "forget.kept"; None where it was not measured."""
    return reduce(lambda value, key: (value or {}).get(key), path.split("."), result)


def name_scores(recall: float, false_recall: float) -> list[float]:
    """Score names as one-shot personalisation does.

    There are as many images of the subject as of others. Another stored name counts as not recalled.

    Returns:
        positive and negative accuracy, their mean (Yo'LLaVA, arXiv 2406.09400); precision and F1, with the recall that
        positive accuracy is (RAP, arXiv 2410.13360).
    """
    precision = recall / (recall + false_recall) if recall else 0.0
    f1 = 2 * precision * recall / (precision + recall) if recall else 0.0
    return [recall, 1 - false_recall, (recall + 1 - false_recall) / 2, precision, f1]


def report(results: list[dict], times: dict[str, float]) -> str:
    """Write all results as Markdown tables."""
    recall = [
        [r["facts"], kind, *(figure(r, f"{kind}.{key}") for key in RECALL.values())]
        for r in results
        for kind in ("seen", "new")
        if kind in r
    ]
    tables = {"Recall: share of answers that say the taught name.": (["facts", "names", *RECALL], recall)}
    for title, columns in BY_FACTS.items():
        rows = [[r["facts"], *(figure(r, path) for path in columns.values())] for r in results]
        tables[title] = ["facts", *columns], rows
    scores = [
        [r["facts"], image, *name_scores(r["seen"][key], r["unrelated"]["false_recall"])]
        for r in results
        for image, key in (("augmented view", "view"), ("other style", "style"))
        if key in r["seen"] and "false_recall" in r["unrelated"]
    ]
    tables["Names, as personalisation work counts them; others are unrelated images."] = NAMES, scores
    title = "Milliseconds for one fact (median); all but forgetting encode the image, writing its grey copy too."
    tables[title] = list(times), [list(times.values())]
    return "\n\n".join(f"{title}\n\n{markdown_table(*table)}" for title, table in tables.items())


def plot(results: list[dict], slots: int, path: str) -> None:
    """Plot recall, what was not written, and bytes over the number of facts."""
    from matplotlib.figure import Figure

    canvas, facts = Figure(figsize=(14, 4.2), layout="tight"), [r["facts"] for r in results]
    for axis, (title, curves) in zip(canvas.subplots(1, 3, sharex=True), PLOTS.items()):
        for label, (key, style) in curves.items():
            axis.plot(facts, [figure(r, key) for r in results], style, ms=3, label=label)
        axis.set(title=title, xlabel=f"stored facts (line: K = {slots})")
        axis.set_yscale("log" if title == "bytes" else "linear")
        axis.set_xscale("log", base=2)
        axis.axvline(slots, color="grey", lw=0.5)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=6)
    canvas.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, data = parser.add_argument, str(ROOT / "data/mini/validation.parquet")
    add("--model", default=str(ROOT))
    add("--data", default=data, help="images of concepts outside training")
    add("--sizes", type=int, nargs="*", help="numbers of facts; default 1, 4, 16, 64, K, 2K, 4K")
    add("--queries", type=int, default=128, help="questions of each sort per number of facts")
    add("--draws", type=int, default=1, help="draws of memories, names and questions; figures are means")
    add("--dtype", default="float32")
    add("--plot", default="runs/memory_recall.png", help="PNG file; default: %(default)s")
    options = parser.parse_args()
    model, processor = load(options.model, dtype=options.dtype, device="cpu")
    rows = load_rows(options.data, split="validation")
    bench = Bench(model, processor, rows)
    slots = model.config.memory_config.num_slots
    # one memory size after the other
    sizes, results = options.sizes or [1, 4, 16, 64, slots, 2 * slots, 4 * slots], []
    for size in [s for s in dict.fromkeys(sizes) if s <= len(rows)]:
        results.append(mean([measure(bench, size, options.queries) for _ in range(options.draws)]))
        print(f"{size} facts: {json.dumps(results[-1])}", file=sys.stderr, flush=True)
    # tables and plot
    concepts = f"{len(rows)} images of {len(bench.by_concept)} concepts, K = {slots} slots"
    print(f"{concepts}, {options.queries} questions a figure, mean of {options.draws} draws\n")
    print(report(results, timings(bench, rows[0])))
    Path(options.plot).parent.mkdir(parents=True, exist_ok=True)
    plot(results, slots, options.plot)


if __name__ == "__main__":
    main()
