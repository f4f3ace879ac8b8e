"""Print the tables of docs/evaluation.md and docs/memory.md from docs/scores.json.

python tools/score_tables.py
"""

import json

from microvlm.files import ROOT
from microvlm.tables import markdown_table

# columns: header -> key in scores.json
CAPTIONS = {"exact": "exact", "word F1": "word_f1", "CIDEr": "cider", "distinct": "distinct"}
NANO = {"BLEU-4": "bleu_4", "ROUGE-L": "rouge_l", "perplexity": "perplexity", "bits a byte": "bits_per_byte"}
NANO |= {"image to text R@1": "image_to_text_recall_at_1", "image to text R@10": "image_to_text_recall_at_10"}
NANO |= {"text to image R@1": "text_to_image_recall_at_1", "text to image R@10": "text_to_image_recall_at_10"}
RECALL = {"same image": "same_image", "view": "view", "other style": "style"}
RECALL |= {"other style, gate open": "style_gate_open", "in words": "words", "word F1 (view)": "word_f1_view"}
RECALL |= {"nearest neighbour (view)": "nearest_view", "nearest neighbour (style)": "nearest_style"}
UNWRITTEN = {"images": "images", "false recall": "false_recall", "AUROC": "auroc", "EER": "eer", "accuracy": "accuracy"}
HALF = {"forgotten": "forgotten", "kept": "kept", "kept, before": "kept_before"}
BYTES = {"posterior": "posterior", "receipts": "receipts", "retrieval": "retrieval"}


def table(labels: list[str], columns: dict[str, str], rows: list[tuple[list[str], dict]]) -> str:
    """Write rows, each its labels and its values by key."""
    lines = [[*names, *(values.get(key) for key in columns.values())] for names, values in rows]
    return markdown_table([*labels, *columns], lines, left=len(labels))


def tables(scores: dict) -> list[str]:
    """Build the tables: captions, nano's other scores, recall, images not written, forgetting, bytes."""
    sets, facts = scores["captions"], scores["memory"]["facts"]
    captions = [([f"`{k}`", name], values) for k, v in sets.items() for name, values in v["captioners"].items()]
    nano = [([f"`{name}`", f"{entry['images']:,}"], entry["captioners"]["nano"]) for name, entry in sets.items()]

    def by_facts(kinds: dict[str, str]) -> list[tuple[list[str], dict]]:
        return [([size, kind], values[key]) for size, values in facts.items() for kind, key in kinds.items()]

    unwritten = by_facts({"unrelated": "unrelated", "look-alike": "look_alike"})
    half = [([size], values["after_forgetting_half"]) for size, values in facts.items() if int(size) > 1]
    return [
        table(["set", "captions"], CAPTIONS, captions),
        table(["set", "images"], NANO, nano),
        table(["facts", "names"], RECALL, by_facts({"seen": "names", "new": "new_names"})),
        table(["facts", "images that were not written"], UNWRITTEN, unwritten),
        table(["facts"], HALF, half),
        table(["facts"], BYTES, [([size], values["bytes"]) for size, values in facts.items()]),
    ]


if __name__ == "__main__":
    print("\n\n".join(tables(json.loads((ROOT / "docs" / "scores.json").read_text()))))
