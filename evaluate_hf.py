"""Score captions by free greedy generation: exact match, word F1, CIDEr, and whether the model looks at the picture.

    python evaluate_hf.py --data data/mini/validation.parquet [--model .] [--json FILE] [--yardstick TRAIN.parquet]

A caption is normalised first: lower case, no punctuation, and for exact match and word F1, means over the pictures, no articles;
CIDEr is pycocoevalcap's, articles kept as is usual, on the set's own document frequencies. `distinct` is the share of different captions among all;
`shuffled` scores the same captions against the references of other pictures: a model that ignores the picture keeps its score.
`--yardstick` also scores the nearest-neighbour caption: that of the closest training picture in EfficientNet-Lite0 feature space.
"""

import argparse
import json
import re
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from data_microvlm import decode_row, load_rows

ARTICLES = {"a", "an", "the"}


def normalise(caption: str, articles: bool = False) -> str:
    """Lower case, letters and digits only, without articles or with them."""
    words = re.sub(r"[^\w\s]", " ", caption.lower()).split()
    return " ".join(w for w in words if articles or w not in ARTICLES)


def word_f1(candidate: str, reference: str) -> float:
    """F1 of the two normalised captions' words, as multisets."""
    a, b = candidate.split(), reference.split()
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b)) if common else 0.0


def cider(candidates: list[str], references: list[str]) -> float:
    """CIDEr-D of normalised captions, one reference each; pycocoevalcap's scorer."""
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    scorer = CiderScorer(n=4, sigma=6.0)
    for candidate, reference in zip(candidates, references):
        scorer += (candidate, [reference])
    return float(scorer.compute_score()[0])


def score(candidates: list[str], references: list[str]) -> dict[str, float]:
    """exact, word_f1, cider and the share of distinct captions of raw captions."""
    whole = [[normalise(c, articles=True) for c in captions] for captions in (candidates, references)]
    candidates, references = [normalise(c) for c in candidates], [normalise(r) for r in references]
    n = len(references)
    return {
        "exact": sum(c == r for c, r in zip(candidates, references)) / n,
        "word_f1": sum(map(word_f1, candidates, references)) / n,
        "cider": cider(*whole),
        "distinct": len(set(candidates)) / n,
    }


@torch.inference_mode()
def caption_rows(model, processor, rows, batch_size: int = 16, max_new_tokens: int = 32) -> tuple[list[str], list[str]]:
    """Greedy captions and reference captions of rows of `load_rows`."""
    candidates, references = [], []
    for start in range(0, len(rows), batch_size):
        pairs = [
            decode_row(row, processor.image_processor)
            for row in rows.select(range(start, min(start + batch_size, len(rows))))
        ]
        pixel_values = processor.image_processor([p for p, _ in pairs], return_tensors="pt")["pixel_values"]
        prompt = model.default_prompt(len(pairs))
        out = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            pixel_values=pixel_values.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
        )
        candidates += processor.batch_decode(out[:, prompt.shape[1] :], skip_special_tokens=True)
        references += [caption for _, caption in pairs]
    return [c.strip() for c in candidates], references


@torch.inference_mode()
def teacher_features(rows, image_processor) -> torch.Tensor:
    """Pooled EfficientNet-Lite0 features (N, 1280) of rows of `load_rows`."""
    from scripts.distill_vision import load_teacher

    teacher = load_teacher()
    out = []
    for start in range(0, len(rows), 32):
        batch = rows.select(range(start, min(start + 32, len(rows))))
        pictures = [decode_row(row, image_processor)[0] for row in batch]
        x = image_processor(pictures, return_tensors="pt")["pixel_values"].to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            out.append(teacher.forward_head(teacher.forward_features(x), pre_logits=True).float())
    return torch.cat(out)


def nearest_neighbours(train: torch.Tensor, queries: torch.Tensor) -> list[int]:
    """For each query (M, C) the index of the closest of (N, C), by cosine."""
    train, queries = (torch.nn.functional.normalize(x, dim=-1) for x in (train, queries))
    return (queries @ train.mT).argmax(1).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path(__file__).resolve().parent), help="checkpoint folder or Hub id")
    parser.add_argument("--revision", help="revision on the Hub")
    parser.add_argument(
        "--data", nargs="+", required=True, help="parquet, webdataset tar or image folder; each is scored"
    )
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--limit", type=int, help="only the first so many rows")
    parser.add_argument("--show", type=int, default=0, help="print so many captions beside their references")
    parser.add_argument("--yardstick", metavar="TRAIN", help="training data for the nearest-neighbour caption")
    parser.add_argument("--yardstick-exclude-copyleft", action="store_true")
    parser.add_argument("--json", help="also write the scores to this file")
    options = parser.parse_args()

    processor = AutoProcessor.from_pretrained(options.model, revision=options.revision, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(
        options.model, revision=options.revision, trust_remote_code=True, dtype=torch.float32
    ).eval()
    if options.yardstick:
        train = load_rows(options.yardstick, exclude_copyleft=options.yardstick_exclude_copyleft)
        train_features = teacher_features(train, processor.image_processor)
    results = {}
    for path in options.data:
        rows = load_rows(path, limit=options.limit)
        candidates, references = caption_rows(model, processor, rows, options.batch_size)
        results[path] = {"pictures": len(rows), "model": score(candidates, references)}
        shift = len(references) // 2
        shuffled = references[shift:] + references[:shift]
        results[path]["shuffled"] = score(candidates, shuffled)
        if options.yardstick:
            nearest = nearest_neighbours(train_features, teacher_features(rows, processor.image_processor))
            results[path]["nearest_neighbour"] = score([train[i]["caption"] for i in nearest], references)
        for candidate, reference in list(zip(candidates, references))[: options.show]:
            print(f"  {candidate!r}  <- {reference!r}")
        print(f"{path} ({len(rows)} pictures)")
        print(f"  {'':<18}{'exact':>8}{'word F1':>9}{'CIDEr':>8}{'distinct':>10}")
        for name, s in results[path].items():
            if isinstance(s, dict):
                print(f"  {name:<18}{s['exact']:>8.3f}{s['word_f1']:>9.3f}{s['cider']:>8.3f}{s['distinct']:>10.3f}")
    if options.json:
        temporary = Path(options.json).with_suffix(".tmp")
        temporary.write_text(json.dumps(results, indent=1))
        temporary.replace(options.json)


if __name__ == "__main__":
    main()
