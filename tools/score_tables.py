"""Print the tables of docs/evaluation.md and docs/memory.md from docs/scores.json.

python tools/score_tables.py
"""

import json
from pathlib import Path

SCORES = Path(__file__).resolve().parent.parent / "docs" / "scores.json"
CAPTIONS = {"exact": "exact", "word F1": "word_f1", "CIDEr": "cider", "distinct": "distinct"}
NANO = {
    "BLEU-4": "bleu_4",
    "ROUGE-L": "rouge_l",
    "perplexity": "perplexity",
    "bits a byte": "bits_per_byte",
    "image to text R@1": "image_to_text_recall_at_1",
    "R@10": "image_to_text_recall_at_10",
    "text to image R@1": "text_to_image_recall_at_1",
    "R@10 ": "text_to_image_recall_at_10",
}
RECALL = {
    "same image": "same_image",
    "view": "view",
    "other style": "style",
    "other style, gate open": "style_gate_open",
    "in words": "words",
    "word F1 (view)": "word_f1_view",
    "nearest neighbour (view)": "nearest_view",
    "nearest neighbour (style)": "nearest_style",
}
UNWRITTEN = {"images": "images", "false recall": "false_recall", "AUROC": "auroc", "EER": "eer", "accuracy": "accuracy"}
HALF = {"forgotten": "forgotten", "kept": "kept", "kept, before": "kept_before"}
BYTES = {"posterior": "posterior", "receipts": "receipts", "retrieval": "retrieval"}


def cell(value) -> str:
    """Format a number: shares with three digits, counts with commas."""
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def table(labels: list[str], columns: dict[str, str], rows: list[tuple[list[str], dict]]) -> str:
    """Format rows, each its labels and its values by key, as a markdown table."""
    lines = [[*labels, *columns], [*["---"] * len(labels), *["---:"] * len(columns)]]
    lines += [[*names, *(cell(values.get(key)) for key in columns.values())] for names, values in rows]
    return "\n".join("| " + " | ".join(part.strip() for part in line) + " |" for line in lines)


def tables(scores: dict) -> list[str]:
    """Build the tables: captions, nano's other scores, recall, images not written, forgetting, bytes."""
    sets, facts = scores["captions"], scores["memory"]["facts"]
    captions = [
        ([f"`{name}`", captioner], values)
        for name, entry in sets.items()
        for captioner, values in entry["captioners"].items()
    ]
    nano = [([f"`{name}`", f"{entry['images']:,}"], entry["captioners"]["nano"]) for name, entry in sets.items()]
    recall = [
        ([size, kind], values[key])
        for size, values in facts.items()
        for kind, key in (("seen", "names"), ("new", "new_names"))
    ]
    unwritten = [
        ([size, kind], values[key])
        for size, values in facts.items()
        for kind, key in (("unrelated", "unrelated"), ("look-alike", "look_alike"))
    ]
    half = [([size], values["after_forgetting_half"]) for size, values in facts.items() if int(size) > 1]
    stored = [([size], values["bytes"]) for size, values in facts.items()]
    return [
        table(["set", "captions"], CAPTIONS, captions),
        table(["set", "images"], NANO, nano),
        table(["facts", "names"], RECALL, recall),
        table(["facts", "images that were not written"], UNWRITTEN, unwritten),
        table(["facts"], HALF, half),
        table(["facts"], BYTES, stored),
    ]


if __name__ == "__main__":
    print("\n\n".join(tables(json.loads(SCORES.read_text()))))
