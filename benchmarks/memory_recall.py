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
import time
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from microvlm.data.rows import decode_row, load_rows
from microvlm.evaluate.bench import BATCH, Bench
from microvlm.evaluate.memory import mean, measure
from microvlm.tables import markdown_table

ROOT = Path(__file__).resolve().parents[1]


def timings(bench: Bench, row, repeats: int = 7) -> dict[str, float]:
    """Median milliseconds to write, read and forget one fact, picture included, and of 20 LoRA steps on it.

    The picture is encoded once in each, in writing its grey copy too.
    """
    from peft import LoraConfig, get_peft_model

    model, processor = bench.model, bench.processor
    picture = decode_row(row, processor.image_processor)[0]
    inputs = processor(
        images=[picture], text=[processor.image_token + "This is Bimo the penguin."], return_tensors="pt"
    ).to(model.device, model.dtype)
    start, answer = model.default_prompt(1)[0].tolist(), bench.tokens("This is Bimo the penguin.")
    answer = [*answer, processor.tokenizer.eos_token_id]
    ids = torch.tensor([start + answer], device=model.device)
    labels = torch.tensor([[-100] * len(start) + answer], device=model.device)
    half = bench.teach([list(range(BATCH))], [["This is Bimo the penguin."] * BATCH])
    times: dict[str, list[float]] = {"write": [], "read": [], "forget": [], "20 LoRA steps": []}

    def clock(name, function, *args, **kwargs):
        start = time.perf_counter()
        value = function(*args, **kwargs)
        times[name].append(1000 * (time.perf_counter() - start))
        return value

    def steps(tuned, optimizer):
        with torch.no_grad():
            image = {"image": tuned.get_image_features(inputs["pixel_values"].float(), return_dict=True)}
        for _ in range(20):
            tuned(input_ids=ids, mm_encoder_outputs=image, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def read(memory):
        image = model.get_image_features(inputs["pixel_values"], return_dict=True)
        return model.model.read_memory(memory, model.model.get_memory_query(prompt, None, image.last_hidden_state))

    prompt = model.default_prompt(1)
    for _ in range(repeats):
        written = clock("write", model.write_memory, half, **inputs)
        with torch.inference_mode():
            clock("read", read, written)
        clock("forget", model.forget, written, BATCH)
        plain = copy.deepcopy(model)
        plain = plain.dequantize(torch.float32) if getattr(plain, "is_quantized", False) else plain.float()
        tuned = get_peft_model(plain, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
        optimizer = torch.optim.AdamW((p for p in tuned.parameters() if p.requires_grad), lr=1e-3)
        clock("20 LoRA steps", steps, tuned, optimizer)
    return {name: median(values) for name, values in times.items()}


def report(results: list[dict], times: dict[str, float]) -> str:
    get = lambda r, *path: (r.get(path[0]) or {}).get(path[1]) if len(path) > 1 else r.get(path[0])  # noqa: E731
    recall = [
        [r["facts"], kind, *(get(r, kind, k) for k in ("same", "view", "style", "style_open", "words", "word_f1")),
         get(r, kind, "no_memory"), get(r, kind, "view_nearest"), get(r, kind, "style_nearest"),
         r.get("in_prompt") if kind == "seen" else None]
        for r in results for kind in ("seen", "new") if kind in r
    ]  # fmt: skip
    header = "facts, names, same picture, augmented view, other style, the same with the gate open, in words, word F1 (view), no memory (same)"
    header += ", nearest (view), nearest (style), in the prompt (view)"
    scope = [
        [r["facts"], *(get(r, g, k) for g in ("unrelated", "lookalike")
                       for k in ("pictures", "false_recall", "unchanged", "auroc", "eer", "accuracy")),
         get(r, "unrelated", "words_false_recall")]
        for r in results
    ]  # fmt: skip
    questions = "unrelated, in words: false recall"
    columns = ["pictures", "false recall", "unchanged", "AUROC", "EER", "accuracy"]
    forget = [[r["facts"], *(get(r, "forget", k) for k in ("forgotten", "kept", "kept_before"))] for r in results]
    size = [[r["facts"], *(get(r, "bytes", k) for k in ("posterior", "receipts", "retrieval"))] for r in results]
    return "\n\n".join(
        [
            "Recall: share of answers that say the taught name.\n\n" + markdown_table(header.split(", "), recall),
            "Pictures that were not written.\n\n"
            + markdown_table(
                ["facts", *(f"{g}: {c}" for g in ("unrelated", "look-alike") for c in columns), questions], scope
            ),
            "After forgetting half, augmented views.\n\n"
            + markdown_table(["facts", "forgotten", "kept", "kept, before"], [f for f in forget if f[1] is not None]),
            "Bytes.\n\n" + markdown_table(["facts", "posterior", "receipts", "retrieval"], size),
            "Milliseconds for one fact (median); all but forgetting encode the picture, writing its grey copy too.\n\n"
            + markdown_table(list(times), [list(times.values())]),
        ]
    )


def plot(results: list[dict], slots: int, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), sharex=True)
    facts = [r["facts"] for r in results]
    curve = lambda axis, get, *args, **kwargs: axis.plot(facts, [get(r) for r in results], *args, **kwargs)  # noqa: E731
    for kind, line in (("seen", "-"), ("new", "--")):
        for key, name, color in (("same", "same picture", "C0"), ("view", "augmented view", "C1"),
                                 ("style", "other style", "C2"), ("words", "in words", "C3")):  # fmt: skip
            label = name if kind == "seen" else f"{name}, new names"
            curve(axes[0], lambda r, k=kind, q=key: r[k].get(q), line, color=color, marker="o", ms=3, label=label)
    curve(axes[0], lambda r: r["seen"]["view_nearest"], ":", color="grey", label="nearest neighbour, view")
    curve(axes[0], lambda r: r["in_prompt"], "x", color="black", label="facts in the prompt, view")
    axes[0].set_title("taught name said")
    for group, color in (("unrelated", "C0"), ("lookalike", "C1")):
        curve(axes[1], lambda r, g=group: r[g].get("false_recall"), color=color, marker="o", ms=3,
              label=f"false recall, {group}")  # fmt: skip
        curve(axes[1], lambda r, g=group: r[g].get("auroc"), "--", color=color, marker="o", ms=3,
              label=f"scope AUROC, {group}")  # fmt: skip
    curve(
        axes[1], lambda r: r.get("forget", {}).get("forgotten"), color="C3", marker="o", ms=3, label="forgotten, recall"
    )
    curve(axes[1], lambda r: r.get("forget", {}).get("kept"), color="C2", marker="o", ms=3, label="kept, recall")
    axes[1].set_title("not written, forgotten, kept")
    for key, label in (
        ("posterior", "memory: posterior"),
        ("receipts", "memory: receipts"),
        ("retrieval", "retrieval"),
    ):
        curve(axes[2], lambda r, k=key: r["bytes"][k], marker="o", ms=3, label=label)
    axes[2].set_yscale("log")
    axes[2].set_title("bytes")
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.axvline(slots, color="grey", lw=0.5)
        axis.set_xlabel(f"stored facts (line: K = {slots})")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT))
    parser.add_argument(
        "--data", default=str(ROOT / "data/mini/validation.parquet"), help="images of concepts outside training"
    )
    parser.add_argument("--sizes", type=int, nargs="*", help="numbers of facts; default 1, 4, 16, 64, K, 2K, 4K")
    parser.add_argument("--queries", type=int, default=128, help="questions of each sort per number of facts")
    parser.add_argument(
        "--draws", type=int, default=1, help="memories, names and questions drawn so often, figures are means"
    )
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--plot", default="runs/memory_recall.png", help="PNG file; default: %(default)s")
    parser.add_argument("--json", help="JSON file")
    options = parser.parse_args()
    model = AutoModelForImageTextToText.from_pretrained(
        options.model, trust_remote_code=True, dtype=getattr(torch, options.dtype)
    ).eval()
    processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True)
    rows = load_rows(options.data)
    bench = Bench(model, processor, rows)
    slots = model.config.memory_config.num_slots
    sizes = options.sizes or [1, 4, 16, 64, slots, 2 * slots, 4 * slots]
    results = []
    for size in [s for s in dict.fromkeys(sizes) if s <= len(rows)]:
        results.append(mean([measure(bench, size, options.queries) for _ in range(options.draws)]))
        print(f"{size} facts: {json.dumps(results[-1])}", file=sys.stderr, flush=True)
    times = timings(bench, rows[0])
    drawn = "" if options.draws == 1 else f", mean of {options.draws} draws"
    concepts = f"{len(rows)} pictures of {len(bench.by_concept)} concepts, K = {slots} slots"
    print(f"{concepts}, {options.queries} questions a figure{drawn}\n")
    print(report(results, times))
    Path(options.plot).parent.mkdir(parents=True, exist_ok=True)
    plot(results, slots, options.plot)
    if options.json:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        Path(options.json).write_text(json.dumps({"results": results, "milliseconds": times}, indent=1))


if __name__ == "__main__":
    main()
