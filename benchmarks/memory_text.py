"""Measure how much of any text a memory gives back, letter for letter.

    python -m benchmarks.memory_text --draws 3 --data data/pictures/validation.parquet

Facts are the sentences, names ("This is NAME.") and strings of 12 tokens in data/memory, which no training reads, about
images of concepts outside training. They are asked by free greedy generation with the stored image, a changed view of
it and in words, gate on auto. Right is an answer that has every letter; white space is folded. Wrong is one that is
neither a taught fact nor what the model says of the image without a memory.
"""

import argparse
import random
import re
import sys
from collections import Counter
from pathlib import Path

import torch

from microvlm.data.rows import load_rows, ordinary_tokens
from microvlm.evaluate.bench import Bench
from microvlm.files import ROOT
from microvlm.model import load
from microvlm.tables import markdown_table

FOLDER = ROOT / "data" / "memory"
WAYS = ("same image", "view", "in words")


def read_sets(tokenizer, suffix: str = "") -> dict[str, list[tuple[str, str]]]:
    """Read facts and their kinds: sentences, names, strings of tokens; `suffix`: `_dev` for the sets to choose by."""
    sentences = (FOLDER / f"sentences{suffix}.tsv").read_text().splitlines()
    names = (FOLDER / f"names{suffix}.txt").read_text().splitlines()
    # numbers stand for places in the list of ordinary tokens
    ordinary = ordinary_tokens(tokenizer)
    rows = [[ordinary[int(n) % len(ordinary)] for n in line.split()] for line in (FOLDER / "tokens.txt").open()]
    return {
        "sentences": [tuple(line.split("\t")) for line in sentences],
        "names": [("name", f"This is {name}.") for name in names],
        "strings": [("string", tokenizer.decode(ids)) for ids in rows],
    }


def fold(text: str) -> str:
    return " ".join(text.split())


def question(kind: str, text: str, draw: random.Random) -> str:
    """Ask for a name, or for a text by its two longest words."""
    if kind == "name":
        return f"Who is {text.removeprefix('This is ').removesuffix('.')}?"
    longest = sorted(re.findall(r"\w+", text), key=len)[-2:] or [text]
    return f"What about {' '.join(draw.sample(longest, len(longest)))}?"


def measure(bench: Bench, facts: list[tuple[str, str]], size: int, queries: int, draw: random.Random) -> Counter:
    """Teach memories of `size` facts until so many are asked; counts by way, and of kinds with the stored image."""
    counts, order = Counter(), draw.sample(facts, len(facts))
    start, ask = 0, min(queries, max(size, len(facts)))
    while counts["asked"] < ask:
        # one memory, and at most so many of its facts
        chosen = [order[(start + n) % len(order)] for n in range(size)]
        images, start = bench.choose(size), start + size
        memory = bench.teach([images], [[text for _, text in chosen]])
        places = draw.sample(range(size), min(size, ask - counts["asked"]))
        asked, texts = [images[n] for n in places], [chosen[n][1] for n in places]
        user, assistant = bench.model.config.default_prompt_ids[0], bench.model.config.default_prompt_ids[-1]
        prompts = [[user, *bench.tokens(question(*chosen[n], draw)), assistant] for n in places]
        answers = {
            "same image": bench.answers(0, asked, memory=memory),
            "view": bench.answers(1, asked, memory=memory),
            "in words": bench.answers(None, asked, prompts, memory=memory),
        }
        plain, taught = bench.without_memory(asked), {fold(text) for _, text in chosen}
        counts["asked"] += len(places)
        for way, said in answers.items():
            for n, answer, text, caption in zip(places, said, texts, plain):
                answer = fold(answer)
                right = answer == fold(text)
                counts[way] += right
                counts[f"wrong, {way}"] += answer not in taught and answer != fold(caption)
                if way == "same image":
                    counts[f"{chosen[n][0]}, asked"] += 1
                    counts[chosen[n][0]] += right
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=str(ROOT))
    add("--data", default=str(ROOT / "data/mini/validation.parquet"), help="images of concepts outside training")
    add("--sizes", type=int, nargs="*", help="numbers of facts; default 1, 16, 64, K")
    add("--queries", type=int, default=200, help="facts asked per set, number of facts and draw")
    add("--draws", type=int, default=3)
    add("--dev", action="store_true", help="the sets to choose by while a model is made")
    add("--dtype", default="float32")
    options = parser.parse_args()
    model, processor = load(options.model, dtype=options.dtype, device="cpu")
    bench = Bench(model, processor, load_rows(options.data, split="validation"))
    sets = read_sets(processor.tokenizer, "_dev" if options.dev else "")
    sizes = options.sizes or [1, 16, 64, model.config.memory_config.num_slots]
    rows, kinds = [], Counter()
    for name, facts in sets.items():
        for size in [s for s in dict.fromkeys(sizes) if s <= len(bench.captions)]:
            draws = [measure(bench, facts, size, options.queries, random.Random(d)) for d in range(options.draws)]
            total = sum(draws, Counter())
            shares = [total[way] / total["asked"] for way in WAYS]
            spread = [max(d[way] / d["asked"] for d in draws) - min(d[way] / d["asked"] for d in draws) for way in WAYS]
            wrong = max(total[f"wrong, {way}"] / total["asked"] for way in WAYS)
            rows.append([name, size, *(f"{s:.3f} ({w:.3f})" for s, w in zip(shares, spread)), f"{wrong:.3f}"])
            kinds.update({k: v for k, v in total.items() if size == sizes[0]})
            print(rows[-1], file=sys.stderr, flush=True)
    print(f"Share right in {options.draws} draws (most that two differ), {Path(options.data).name}\n")
    print(markdown_table(["facts are", "facts", *WAYS, "wrong, most of the three"], rows))
    asked = {k.removesuffix(", asked"): n for k, n in kinds.items() if k.endswith(", asked")}
    by_kind = [[k, n, kinds[k] / n] for k, n in asked.items()]
    print(f"\nBy kind, {sizes[0]} fact, same image\n")
    print(markdown_table(["kind", "asked", "right"], by_kind))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
