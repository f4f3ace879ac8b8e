"""Measure what the memory gives back: stored facts, questions, forgetting."""

import random
from functools import cache

import torch

from ..data.episodes import caption_noun, make_names
from ..data.rows import row_caption, text_ids
from ..metrics import auroc, equal_error_rate, normalise, word_f1
from ..model import MemoryState
from .bench import TRAINING_NAMES, Bench, Lesson, any_name_share, name_share

MEMORY_POOL = 2000  # images whose features are held at once
TEMPLATE_WORDS = {"this", "is", "the"}


@cache
def longest_name(tokenizer) -> str:
    """Find the name with the most tokens among those that facts may have."""
    names = make_names(2 * TRAINING_NAMES)
    return max(zip(names, text_ids(tokenizer, [f" {name}" for name in names])), key=lambda pair: len(pair[1]))[0]


def fact_fits(model, tokenizer, caption: str) -> bool:
    """Check that a fact about this caption can be stored, whatever the name."""
    fact = text_ids(tokenizer, f"This is {longest_name(tokenizer)} the {caption_noun(caption)}.")
    return len(fact) < model.config.memory_config.max_content_tokens  # room for the end token


def count_facts(number: int) -> str:
    return "1 fact" if number == 1 else f"{number} facts"


def own_words(text: str) -> str:
    return " ".join(w for w in normalise(text, articles=True).split() if w not in TEMPLATE_WORDS)


def measure(bench: Bench, size: int, queries: int, kinds=("seen", "new"), details: dict | None = None) -> dict:
    """Measure memories of `size` facts with at most so many `queries` of each sort.

    Args:
        kinds: names to teach; `seen` in training or `new`. Of the first also what was not written and forgetting.
        details: takes the `memory` and the scope probabilities `known`, `unrelated` and `lookalike`.
    """
    details = {} if details is None else details
    result: dict = {"facts": size}
    # small memories are many, so that there are enough questions
    rows = max(1, queries // size) if size <= 16 else max(1, min(4, queries // size))
    for kind in kinds:
        lesson = bench.lesson(rows, size, queries, kind)
        result[kind] = recalls(bench, lesson)
        if kind == kinds[0]:
            details["memory"] = lesson.memory
            result |= negatives(bench, lesson, queries, details)
            result |= forget_half(bench, lesson, queries)
            result |= in_prompt(bench, lesson)
            retrieval = sum(4 * bench.pooled[0].shape[1] + len(fact.encode()) for fact in lesson.facts[0])
            result["bytes"] = lesson.memory.select([0]).num_bytes | {"retrieval": retrieval}
    return result


def recalls(bench: Bench, lesson: Lesson) -> dict[str, float]:
    """Measure how many answers say the name, by memory, by nearest neighbour and without."""
    asking = lesson.asking(lesson.places)
    images, names, facts = map(lesson.at_places, (lesson.images, lesson.names, lesson.facts))
    # the same image, an augmented view, a question in words
    same, view = (bench.answers(view, images, **asking) for view in (0, 1))
    words = bench.answers(None, images, bench.questions(images), **asking)
    result = {"same": name_share(names, same), "view": name_share(names, view)}
    result["words"] = any_name_share(namesakes(bench, lesson), words)
    result["word_f1"] = sum(word_f1(own_words(a), own_words(b)) for a, b in zip(view, facts)) / len(view)
    result |= style_recalls(bench, lesson)
    # for comparison: the closest image, and the model alone
    hits = [bench.nearest(1, i, lesson.images[r]) == n for i, (r, n) in zip(images, lesson.places)]
    result["view_nearest"] = sum(hits) / len(hits)
    result["no_memory"] = name_share(names, bench.without_memory(images))
    return result


def namesakes(bench: Bench, lesson: Lesson) -> list[list[str]]:
    """List per place the names of all that its noun was taught of: asked in words, each of them is right."""
    nouns = [[caption_noun(bench.captions[i]) for i in images] for images in lesson.images]
    return [
        [name for name, noun in zip(lesson.names[r], nouns[r], strict=True) if noun == nouns[r][n]]
        for r, n in lesson.places
    ]


def style_recalls(bench: Bench, lesson: Lesson) -> dict[str, float]:
    """Measure recall by other images of the same concept; empty where there are none."""
    # for each question an image of its concept that its memory does not hold
    pairs = []
    for r, n in lesson.places:
        concept = bench.concepts[lesson.images[r][n]]
        if others := [i for i in bench.by_concept[concept] if i not in lesson.images[r]]:
            pairs.append((r, n, bench.draw.choice(others)))
    if not pairs:
        return {}
    images, names = [i for _, _, i in pairs], [lesson.names[r][n] for r, n, _ in pairs]
    asking = lesson.asking(pairs)
    hits = [bench.nearest(0, i, lesson.images[r]) == n for r, n, i in pairs]
    return {
        "style": name_share(names, bench.answers(0, images, **asking)),
        "style_open": name_share(names, bench.answers(0, images, **asking, gate="on")),
        "style_nearest": sum(hits) / len(hits),
    }


def negatives(bench: Bench, lesson: Lesson, queries: int, details: dict) -> dict:
    """Measure false recalls, unchanged captions and scope on images that were not written."""
    # images to ask for: row and index
    groups = {"unrelated": [], "lookalike": []}
    share = -(-2 * queries // len(lesson.images))
    for r, images in enumerate(lesson.images):
        for name, pool in zip(groups, bench.unwritten(images)):
            groups[name] += [(r, i) for i in bench.draw.sample(pool, min(len(pool), share))]

    positive = details["known"] = bench.scope(1, lesson.at_places(lesson.images), **lesson.asking(lesson.places))
    result = {}
    for name, pairs in groups.items():
        result[name] = {"pictures": len(pairs)}
        if not pairs:
            continue
        # what the answers say, with the memory and without
        images, stored, asking = [i for _, i in pairs], [lesson.names[r] for r, _ in pairs], lesson.asking(pairs)
        texts, plain = bench.answers(0, images, **asking), bench.without_memory(images)
        # what the memory knows
        negative = details[name] = bench.scope(0, images, **asking)
        threshold = float(bench.model.model.scope_threshold(lesson.memory)[0])  # all rows hold N facts
        accuracy = ((positive >= threshold).float().mean() + (negative < threshold).float().mean()) / 2
        result[name] |= {
            "false_recall": any_name_share(stored, texts),
            "unchanged": sum(a == b for a, b in zip(texts, plain)) / len(texts),
            "auroc": auroc(positive, negative),
            "eer": equal_error_rate(positive, negative),
            "accuracy": float(accuracy),
        }
        if name == "unrelated":
            texts = bench.answers(None, images, bench.questions(images), **asking)
            result[name]["words_false_recall"] = any_name_share(stored, texts)
    return result


def forget_half(bench: Bench, lesson: Lesson, queries: int) -> dict:
    """Forget every second fact; measure recall of both halves, and of the other half before."""
    size = len(lesson.images[0])
    if size == 1:
        return {}
    half = lesson.memory
    for r in range(len(lesson.images)):
        for number in reversed(range(0, size, 2)):
            half = bench.model.forget(half, number, row=r)

    def recall(memory: MemoryState, first: int) -> float:
        places = [(r, n) for r in range(len(lesson.images)) for n in range(first, size, 2)]
        places = random.Random(0).sample(places, min(len(places), queries))
        images, names = ([table[r][n] for r, n in places] for table in (lesson.images, lesson.names))
        return name_share(names, bench.answers(1, images, **lesson.asking(places) | {"memory": memory}))

    recalls = {"forgotten": recall(half, 0), "kept": recall(half, 1), "kept_before": recall(lesson.memory, 1)}
    return {"forget": recalls}


def in_prompt(bench: Bench, lesson: Lesson) -> dict:
    """Measure recall with the facts in the prompt, without memory; None where they do not fit."""
    prompt = bench.model.default_prompt(1)[0].tolist()
    lines = [[prompt[0], *bench.tokens(" ".join(lesson.facts[r])), *prompt[1:]] for r, _ in lesson.places]
    if max(map(len, lines)) + 32 > bench.model.config.text_config.max_position_embeddings:
        return {"in_prompt": None}
    texts = bench.answers(1, lesson.at_places(lesson.images), lines)
    return {"in_prompt": name_share(lesson.at_places(lesson.names), texts)}


def mean(draws: list):
    """Average results of `measure` over the draws that have a figure; counts are rounded."""
    if isinstance(draws[0], dict):
        names = dict.fromkeys(name for draw in draws for name in draw)
        return {name: mean([draw[name] for draw in draws if name in draw]) for name in names}
    values = [value for value in draws if value is not None]
    if not values:
        return None
    return round(sum(values) / len(values)) if isinstance(values[0], int) else sum(values) / len(values)


def share_recalled(model, processor, rows, facts: int) -> float:
    """Teach one memory and measure the share of names it says of augmented views."""
    bench = Bench(model, processor, rows)
    images, names = bench.choose(facts), bench.draw.sample(bench.names["new"], facts)
    memory = bench.teach([images], [bench.facts(names, images)])
    return name_share(names, bench.answers(1, images, memory=memory))


@torch.no_grad()
def memory_scores(model, processor, rows, sizes: list[int], queries: int) -> tuple[list[dict], dict[int, dict], dict]:
    """Score memories of several sizes with `measure`, and the KL terms.

    Returns:
        A dictionary per size; per size the scope probabilities `known` and `unrelated`; and what was not measured.
    """
    if getattr(model.model, "memory", None) is None:
        return [], {}, {"memory": "the checkpoint has no memory (config.use_memory is false)"}
    if model.config.default_prompt_ids is None:
        return [], {}, {"memory": "the checkpoint has no default prompt to ask with (config.default_prompt_ids)"}
    missing, entries, scopes = {}, [], {}
    # images whose fact fits; equal captions are one concept where the data does not say
    rows = rows.select(range(min(len(rows), MEMORY_POOL)))
    fits = [i for i, row in enumerate(rows) if fact_fits(model, processor.tokenizer, row_caption(row))]
    if len(fits) < len(rows):
        missing[f"memory of {len(rows) - len(fits)} pictures"] = "their caption is too long for a fact"
        rows = rows.select(fits)
    if "concept" not in rows.column_names:
        rows = rows.add_column("concept", [normalise(caption) for caption in rows["caption"]])
    bench, capacity = Bench(model, processor, rows), model.config.memory_config.max_items
    for size in dict.fromkeys(sizes):
        if size > min(len(rows), capacity):
            limit = f"a memory holds {capacity}" if size > capacity else f"there are only {len(rows)} pictures"
            missing[f"memory of {count_facts(size)}"] = limit
            continue
        details: dict = {}
        try:
            entry, reasons = memory_entry(bench, measure(bench, size, queries, ("new",), details), details)
        except (ValueError, torch.linalg.LinAlgError) as error:  # its numbers are not finite
            missing[f"memory of {count_facts(size)}"] = str(error)
            continue
        entries.append(entry)
        missing |= reasons
        scopes[size] = {name: details[name] for name in ("known", "unrelated") if name in details}
    return entries, scopes, missing


def memory_entry(bench: Bench, result: dict, details: dict) -> tuple[dict, dict[str, str]]:
    """Name the figures of `measure` as a report does, and add the KL terms; returns also what was not measured."""
    model, size = bench.model, result["facts"]
    recall, scope, forget = result["new"], result["unrelated"], result.get("forget", {})
    # one read-out of the first memory
    query = model.model.get_memory_query(model.default_prompt(1), None, bench.views[0][0][:1])
    readout = model.model.read_memory(details["memory"].select([0]), query)
    entry = {
        "facts": size,
        "questions": len(details["known"]),
        "memory_kl": float(details["memory"].kl().mean()),
        "address_kl": float(readout.address_kl),
        **{f"recall_{name}": recall.get(name) for name in ("same", "view", "words", "style")},
        "word_f1": recall["word_f1"],
        "recall_no_memory": recall["no_memory"],
        "recall_nearest": recall["view_nearest"],
        **{f"scope_{name}": scope.get(name) for name in ("auroc", "eer", "accuracy")},
        **{name: scope.get(name) for name in ("false_recall", "unchanged")},
        **{name: forget.get(name) for name in ("forgotten", "kept", "kept_before")},
    }
    # what was not measured
    reasons = {}
    if "auroc" not in scope:
        reasons[f"scope of {count_facts(size)}"] = "every picture shares a word of its caption with a stored one"
    if size == 1:
        reasons["forgetting of 1 fact"] = "half of one fact is none"
    if entry["recall_style"] is None:
        reasons[f"other style, {count_facts(size)}"] = "no concept has a second picture that is not stored"
    return entry, reasons
