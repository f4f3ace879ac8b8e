"""Put figures into the pages: tables that commands printed, and scores into the card.

    python tools/figures.py runs/nano/*.md

In README.md and docs/, a table whose columns a printed table has takes that table's rows, and keeps its columns.
The card takes its results from docs/scores.json, which `microvlm evaluate --json` wrote.
"""

import json
import re
import sys
from pathlib import Path

from huggingface_hub import ModelCard

from microvlm.evaluate.card import card_results
from microvlm.files import ROOT, write_text

TABLE = re.compile(r"(?:^\|.*\|\n)+", re.MULTILINE)
SEEN, UNSEEN = "data/pictures/validation_seen.parquet", "data/pictures/validation.parquet"
# what the card says of captions, by group, and of the largest memory
CAPTIONS = {
    "model": ["exact", "word_f1", "cider"],
    "language": ["perplexity"],
    "retrieval": ["image_to_text_recall_at_1"],
}
MEMORY = ["facts", "questions", "recall_same", "recall_view", "recall_words", "scope_auroc"]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def with_figures(page: str, printed: list[str]) -> str:
    """Fill the tables of a page from printed ones."""

    def fill(match: re.Match) -> str:
        header = cells(match[0].splitlines()[0])
        for table in printed:
            names, *rows = map(cells, table.splitlines())
            if set(header) <= set(names):
                places = [names.index(name) for name in header]
                lines = [header, *([row[i] for i in places] for row in rows)]
                return "".join(f"| {' | '.join(line)} |\n" for line in lines)
        return match[0]

    return TABLE.sub(fill, page)


def card_scores(scores: dict) -> dict[str, dict]:
    """Choose from docs/scores.json what the card says."""
    seen, unseen = ({"pictures": scores[data]["pictures"]} for data in (SEEN, UNSEEN))
    seen |= {group: {key: scores[SEEN][group][key] for key in keys} for group, keys in CAPTIONS.items()}
    largest = scores[UNSEEN]["memory"][-1]
    return {SEEN: seen, UNSEEN: unseen | {"memory": [{key: largest[key] for key in MEMORY}]}}


def main(files: list[str]) -> None:
    printed = [table for file in files for table in TABLE.findall(Path(file).read_text())]
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        write_text(page, with_figures(page.read_text(), printed))
    scores = json.loads((ROOT / "docs/scores.json").read_text())
    card = ModelCard.load(ROOT / "README.md")
    card.data.eval_results = card_results(card_scores(scores))
    for result in card.data.eval_results:
        result.metric_args = None  # sample sizes stand in the pages
    write_text(ROOT / "README.md", str(card))


if __name__ == "__main__":
    main(sys.argv[1:])
