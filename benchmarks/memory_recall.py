"""Does the memory work? Facts are taught about pictures the model has never seen, and asked for by free greedy generation.

    python benchmarks/memory_recall.py --data data/pictures/validation.parquet --plot docs/memory_recall.png --json runs/recall.json
    python benchmarks/memory_recall.py                              the 305 pictures that ship, fewer facts
    python benchmarks/memory_recall.py --draws 8                    means over eight draws of memories, names and questions

For N = 1, 4, 16, 64, K, 2K, 4K a memory is taught "This is Bimo the penguin." for N pictures, one per concept while the concepts last,
without a gradient step. Then, with ScopeNet deciding row by row whether memory applies (unless it says that the gate is open):

- recall: the share of answers that say the taught name (made up, of several tokens, no word of any caption), for the same picture, an
  augmented view (the default `picture_augmentation`, seed 1), another style of the concept, and a question in words. `seen` names occur
  in training with other pictures, `new` ones never do.
- words: F1 of the answer's words with the taught sentence's, without "this", "is", "the".
- unrelated pictures: those that share no word of their caption with any stored caption. A false recall says a stored name; unchanged is
  the same caption, letter for letter, as without memory; in words, a question about them is asked. Look-alikes share a word with a
  stored caption, but not the concept.
- scope: AUROC, equal error rate and accuracy at the threshold, augmented views against unrelated pictures.
- beside it: the same model without memory; the stored sentence of the picture with the nearest vision features (the features the key is
  made of, standardised, by cosine); and the facts written into the prompt while they fit.
- forget half: recall of the forgotten and of the kept, augmented views, beside that of the kept before.
- time per fact, by turns in one run, beside 20 LoRA steps on the same fact; bytes beside those of retrieval.

A question in words ("Who is the penguin?") has no picture: it reads where its words are stored.
"""

import argparse
import copy
import json
import random
import re
import sys
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data_microvlm import (  # noqa: E402
    FACTS,
    QUESTIONS,
    caption_noun,
    decode_row,
    gray_copy,
    load_rows,
    make_names,
    picture_augmentation,
    text_ids,
)
from evaluate_hf import normalise, word_f1  # noqa: E402

STOPWORDS = set("a an the of with and in on to for from at by is 3d model picture".split())
TEMPLATE_WORDS = {"this", "is", "the"}
TRAINING_NAMES = 4000  # recipes/nano_memory.yaml
BATCH = 64


def caption_words(caption: str) -> set[str]:
    return set(re.findall(r"[a-z]+", caption.lower())) - STOPWORDS


def said(name: str, text: str) -> bool:
    return re.search(rf"\b{name}\b", text, re.IGNORECASE) is not None


def own_words(text: str) -> str:
    return " ".join(w for w in normalise(text, articles=True).split() if w not in TEMPLATE_WORDS)


def auroc(positive: torch.Tensor, negative: torch.Tensor) -> float:
    difference = positive.unsqueeze(1) - negative.unsqueeze(0)
    return float(((difference > 0).float() + 0.5 * (difference == 0).float()).mean())


def equal_error_rate(positive: torch.Tensor, negative: torch.Tensor) -> float:
    scores = torch.cat([positive, negative])
    misses = torch.stack([(positive < t).float().mean() for t in scores])
    alarms = torch.stack([(negative >= t).float().mean() for t in scores])
    best = (misses - alarms).abs().argmin()
    return float((misses[best] + alarms[best]) / 2)


class Bench:
    """A model, pictures encoded once, and what is asked of them."""

    def __init__(self, model, processor, rows, seed: int = 0):
        self.model, self.processor = model, processor
        self.captions, self.concepts = rows["caption"][:], rows["concept"][:]
        self.words = [caption_words(c) for c in self.captions]
        self.by_concept: dict[str, list[int]] = {}
        for i, concept in enumerate(self.concepts):
            self.by_concept.setdefault(concept, []).append(i)
        self.draw = random.Random(seed)
        if model.config.default_prompt_ids is None:
            raise ValueError("the benchmark asks with the model's default prompt, which this config does not have.")
        names = make_names(2 * TRAINING_NAMES)
        spoken = set().union(STOPWORDS, *(caption_words(text) for text in (*self.captions, *FACTS, *QUESTIONS)))
        rare = lambda name: name.lower() not in spoken and len(self.tokens(f" {name}")) > 1  # noqa: E731
        self.names = {
            "seen": [name for name in names[:TRAINING_NAMES] if rare(name)],
            "new": [name for name in names[TRAINING_NAMES:] if rare(name)],
        }
        self.views = [self.encode(rows, augment) for augment in (None, picture_augmentation(), gray_copy)]
        self.pooled = [self.model.model.memory.key_encoder.pool(view[0], self.skip) for view in self.views]
        self.plain: dict[int, str] = {}

    @property
    def skip(self) -> int:
        return self.model.model.vision_tower.timm_model.num_prefix_tokens

    @torch.inference_mode()
    def encode(self, rows, augment) -> tuple[torch.Tensor, torch.Tensor]:
        """Vision features (M, tokens, W) and prefix tokens (M, P, D) of all pictures."""
        features, prefixes = [], []
        image_processor = self.processor.image_processor
        torch.manual_seed(1)
        for start in range(0, len(rows), BATCH):
            batch = rows.select(range(start, min(start + BATCH, len(rows))))
            pictures = [decode_row(row, image_processor)[0] for row in batch]
            x = image_processor(pictures, return_tensors="pt", do_normalize=False)["pixel_values"]
            x = x if augment is None else augment(x)
            x = image_processor.normalize(x, image_processor.image_mean, image_processor.image_std)
            image = self.model.get_image_features(x.to(self.model.device, self.model.dtype), return_dict=True)
            self.features_class = type(image)
            features.append(image.last_hidden_state)
            prefixes.append(torch.stack(image.pooler_output))
        return torch.cat(features), torch.cat(prefixes)

    def image(self, view: int, indices: list[int]) -> dict:
        features, prefix = (t[indices] for t in self.views[view])
        return {"image": self.features_class(last_hidden_state=features, pooler_output=tuple(prefix))}

    def to_write(self, indices: list[int]) -> dict:
        return self.image(0, indices) | {"gray": self.image(2, indices)["image"]}

    def tokens(self, text: str) -> list[int]:
        return text_ids(self.processor.tokenizer, text)

    def pad(self, lines: list[list[int]]) -> dict[str, torch.Tensor]:
        return self.processor.tokenizer.pad({"input_ids": lines}, return_tensors="pt").to(self.model.device)

    def facts(self, names: list[str], pictures: list[int]) -> list[str]:
        """What is taught about pictures."""
        return [f"This is {name} the {caption_noun(self.captions[i])}." for name, i in zip(names, pictures)]

    def questions(self, indices: list[int]) -> list[list[int]]:
        """Prompts that ask in words who the thing in a picture is."""
        user, assistant = self.model.config.default_prompt_ids[0], self.model.config.default_prompt_ids[-1]
        nouns = [caption_noun(self.captions[i]) for i in indices]
        return [[user, *self.tokens(self.draw.choice(QUESTIONS).format(noun=noun)), assistant] for noun in nouns]

    @torch.inference_mode()
    def answers(
        self, view: int | None, indices: list[int], prompts=None, memory=None, rows=None, gate="auto"
    ) -> list[str]:
        """Greedy answers to pictures, or with view None to questions about them; `rows`: which memory each one asks."""
        out = []
        for start in range(0, len(indices), BATCH):
            part = indices[start : start + BATCH]
            kwargs = {}
            if view is not None:
                kwargs["mm_encoder_outputs"] = self.image(view, part)
                lines = self.model.default_prompt(len(part)).tolist()
            if prompts is not None:
                lines = prompts[start : start + BATCH]
            inputs = self.pad(lines)
            if memory is not None:
                kwargs["memory"] = memory if rows is None else memory.select(rows[start : start + BATCH])
                kwargs["memory_gate"] = gate
            ids = self.model.generate(**inputs, **kwargs, max_new_tokens=32, do_sample=False, num_beams=1)
            out += self.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in out]

    def without_memory(self, indices: list[int]) -> list[str]:
        missing = [i for i in dict.fromkeys(indices) if i not in self.plain]
        self.plain.update(zip(missing, self.answers(0, missing)))
        return [self.plain[i] for i in indices]

    def choose(self, number: int) -> list[int]:
        """Pictures, of different concepts while they last."""
        concepts = self.draw.sample(sorted(self.by_concept), len(self.by_concept))
        chosen = [self.draw.choice(self.by_concept[c]) for c in concepts[:number]]
        rest = sorted(set(range(len(self.captions))) - set(chosen))
        return chosen + self.draw.sample(rest, number - len(chosen))

    def unwritten(self, stored: list[int]) -> tuple[list[int], list[int]]:
        """Pictures that share no word with the stored ones, and look-alikes: they share one and are of other concepts."""
        words = set().union(*(self.words[i] for i in stored))
        concepts = {self.concepts[i] for i in stored}
        everything = range(len(self.captions))
        unrelated = [i for i in everything if not self.words[i] & words]
        return unrelated, [i for i in everything if self.words[i] & words and self.concepts[i] not in concepts]

    def teach(self, pictures: list[list[int]], facts: list[list[str]]):
        """A memory with a row per list of pictures, taught their facts."""
        memory, prefix = self.model.new_memory(len(pictures)), [self.model.config.image_token_id]
        prefix = prefix * self.model.config.num_prefix_tokens
        if len(pictures) == 1:
            steps = [(pictures[0][s : s + BATCH], facts[0][s : s + BATCH]) for s in range(0, len(pictures[0]), BATCH)]
        else:
            steps = list(zip(zip(*pictures), zip(*facts)))
        for indices, texts in steps:
            inputs = self.pad([prefix + self.tokens(text) for text in texts])
            memory = self.model.write_memory(
                memory, **inputs, mm_encoder_outputs=self.to_write(list(indices)), labels=list(texts)
            )
        return memory

    @torch.inference_mode()
    def scope(self, view: int | None, indices: list[int], memory, rows=None) -> torch.Tensor:
        """Probability that the memory knows the pictures, or with view None questions in words about them, (M,)."""
        out = []
        for start in range(0, len(indices), BATCH):
            part = indices[start : start + BATCH]
            if view is None:
                inputs, features = self.pad(self.questions(part)), None
            else:
                inputs = {"input_ids": self.model.default_prompt(len(part)), "attention_mask": None}
                features = self.views[view][0][part]
            query = self.model.model.get_memory_query(inputs["input_ids"], inputs["attention_mask"], features)
            state = memory if rows is None else memory.select(rows[start : start + BATCH])
            out.append(self.model.model.read_memory(state, query).scope_logits.sigmoid().cpu())
        return torch.cat(out)

    def nearest(self, view: int, index: int, stored: list[int]) -> int:
        encoder = self.model.model.memory.key_encoder
        x, y = (((t - encoder.feature_mean.float()) / encoder.feature_std.float()) for t in
                (self.pooled[view][index], self.pooled[0][stored]))  # fmt: skip
        return int(F.cosine_similarity(x.unsqueeze(0), y).argmax())


def measure(bench: Bench, size: int, queries: int, kinds=("seen", "new"), kept: dict | None = None) -> dict:
    """All figures for memories of `size` facts; `kept` takes what they were made of: the memory, and scope probabilities of the pictures
    it knows (`known`) and of those it does not (`unrelated`, `lookalike`).
    """
    result: dict = {"facts": size}
    # while the number of queries is small, many memories side by side
    R = max(1, queries // size) if size <= 16 else max(1, min(4, queries // size))
    for kind in kinds:
        pictures = [bench.choose(size) for _ in range(R)]
        names = [bench.draw.sample(bench.names[kind], size) for _ in range(R)]
        facts = [bench.facts(*pair) for pair in zip(names, pictures)]
        memory = bench.teach(pictures, facts)
        places = [(r, n) for r in range(R) for n in range(size)]
        places = bench.draw.sample(places, min(len(places), queries))
        rows = None if R == 1 else [r for r, _ in places]
        asked, wanted = [pictures[r][n] for r, n in places], [names[r][n] for r, n in places]
        sentences = [facts[r][n] for r, n in places]

        def recall(texts, wanted=wanted):
            return sum(map(said, wanted, texts)) / max(1, len(texts))

        same = bench.answers(0, asked, memory=memory, rows=rows)
        view = bench.answers(1, asked, memory=memory, rows=rows)
        words = bench.answers(None, asked, bench.questions(asked), memory=memory, rows=rows)
        styles = [
            (k, bench.draw.choice(others))
            for k, (r, n) in enumerate(places)
            if (others := [j for j in bench.by_concept[bench.concepts[pictures[r][n]]] if j not in pictures[r]])
        ]
        result[kind] = {
            "same": recall(same),
            "view": recall(view),
            "words": recall(words),
            "word_f1": sum(word_f1(own_words(a), own_words(b)) for a, b in zip(view, sentences)) / len(view),
        }
        if styles:
            order = [k for k, _ in styles]
            style_rows = None if R == 1 else [rows[k] for k in order]
            style = bench.answers(0, [j for _, j in styles], memory=memory, rows=style_rows)
            result[kind]["style"] = recall(style, [wanted[k] for k in order])
            style = bench.answers(0, [j for _, j in styles], memory=memory, rows=style_rows, gate="on")
            result[kind]["style_open"] = recall(style, [wanted[k] for k in order])
            found = [bench.nearest(0, j, pictures[places[k][0]]) == places[k][1] for k, j in styles]
            result[kind]["style_nearest"] = sum(found) / len(found)
        found = [bench.nearest(1, i, pictures[r]) == n for i, (r, n) in zip(asked, places)]
        result[kind]["view_nearest"] = sum(found) / len(found)
        result[kind]["no_memory"] = recall(bench.without_memory(asked))

        if kind == kinds[0]:
            if kept is not None:
                kept["memory"] = memory
            result |= negatives(bench, memory, pictures, names, rows, asked, queries, kept)
            result |= forget_half(bench, memory, pictures, names, queries)
            result |= in_prompt(bench, pictures, facts, places, wanted)
            result["bytes"] = memory.select([0]).num_bytes | {"retrieval": retrieval_bytes(bench, facts[0])}
    return result


def mean(draws: list):
    """Results of `measure` for several draws -> the mean of every figure over the draws that have it; counts are rounded."""
    if isinstance(draws[0], dict):
        names = dict.fromkeys(name for draw in draws for name in draw)
        return {name: mean([draw[name] for draw in draws if name in draw]) for name in names}
    values = [value for value in draws if value is not None]
    if not values:
        return None
    return round(sum(values) / len(values)) if isinstance(values[0], int) else sum(values) / len(values)


def retrieval_bytes(bench: Bench, facts: list[str]) -> int:
    """What nearest-neighbour retrieval keeps: float32 features and the sentence."""
    return sum(4 * bench.pooled[0].shape[1] + len(fact.encode()) for fact in facts)


def negatives(bench: Bench, memory, pictures, names, rows, asked, queries, kept: dict | None = None) -> dict:
    """False recalls, unchanged captions and scope on pictures that were not written."""
    R, result = len(pictures), {}
    groups = {"unrelated": [], "lookalike": []}
    for r in range(R):
        share = -(-2 * queries // R)
        for name, pool in zip(groups, bench.unwritten(pictures[r])):
            groups[name] += [(r, i) for i in bench.draw.sample(pool, min(len(pool), share))]

    def false_recalls(pairs, texts) -> float:
        return sum(any(said(name, t) for name in names[r]) for (r, _), t in zip(pairs, texts)) / len(pairs)

    positive = bench.scope(1, asked, memory, rows)
    if kept is not None:
        kept["known"] = positive
    for name, pairs in groups.items():
        result[name] = {"pictures": len(pairs)}
        if not pairs:
            continue
        indices, its_rows = [i for _, i in pairs], None if R == 1 else [r for r, _ in pairs]
        texts, plain = bench.answers(0, indices, memory=memory, rows=its_rows), bench.without_memory(indices)
        false = false_recalls(pairs, texts)
        negative = bench.scope(0, indices, memory, its_rows)
        if kept is not None:
            kept[name] = negative
        threshold = float(bench.model.model.scope_threshold(memory)[0])  # all rows hold the same number of facts
        right = torch.cat([positive >= threshold, negative < threshold]).float()
        result[name] |= {
            "false_recall": false,
            "unchanged": sum(a == b for a, b in zip(texts, plain)) / len(texts),
            "auroc": auroc(positive, negative),
            "eer": equal_error_rate(positive, negative),
            "accuracy": float((right[: len(positive)].mean() + right[len(positive) :].mean()) / 2),
        }
        if name == "unrelated":
            texts = bench.answers(None, indices, bench.questions(indices), memory=memory, rows=its_rows)
            result[name]["words_false_recall"] = false_recalls(pairs, texts)
    return result


def forget_half(bench: Bench, memory, pictures, names, queries) -> dict:
    """Every second fact of every row is forgotten; recall of both halves afterwards, and of the kept before."""
    size = len(pictures[0])
    if size == 1:
        return {}
    less = memory
    for r in range(len(pictures)):
        for number in reversed(range(0, size, 2)):
            less = bench.model.forget(less, number, row=r)

    def recall(state, first: int) -> float:
        places = [(r, n) for r in range(len(pictures)) for n in range(first, size, 2)]
        places = random.Random(0).sample(places, min(len(places), queries))
        rows = None if len(pictures) == 1 else [r for r, _ in places]
        texts = bench.answers(1, [pictures[r][n] for r, n in places], memory=state, rows=rows)
        return sum(said(names[r][n], t) for (r, n), t in zip(places, texts)) / len(texts)

    return {"forget": {"forgotten": recall(less, 0), "kept": recall(less, 1), "kept_before": recall(memory, 1)}}


def in_prompt(bench: Bench, pictures, facts, places, wanted) -> dict:
    """The facts as text before the picture, without memory."""
    prompt, room = bench.model.default_prompt(1)[0].tolist(), bench.model.config.text_config.max_position_embeddings
    lines = []
    for r, _ in places:
        text = bench.tokens(" ".join(facts[r]))
        lines.append([prompt[0], *text, *prompt[1:]])
    if max(map(len, lines)) + 32 > room:
        return {"in_prompt": None}
    texts = bench.answers(1, [pictures[r][n] for r, n in places], lines)
    return {"in_prompt": sum(map(said, wanted, texts)) / len(texts)}


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


def table(header: list[str], lines: list[list]) -> str:
    show = lambda v: "" if v is None else f"{v:.3f}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else v  # noqa: E731
    rows = [header, ["---"] * len(header), *[[show(v) for v in line] for line in lines]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


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
            "Recall: share of answers that say the taught name.\n\n" + table(header.split(", "), recall),
            "Pictures that were not written.\n\n"
            + table(["facts", *(f"{g}: {c}" for g in ("unrelated", "look-alike") for c in columns), questions], scope),
            "After forgetting half, augmented views.\n\n"
            + table(["facts", "forgotten", "kept", "kept, before"], [f for f in forget if f[1] is not None]),
            "Bytes.\n\n" + table(["facts", "posterior", "receipts", "retrieval"], size),
            "Milliseconds for one fact (median); all but forgetting encode the picture, writing its grey copy too.\n\n"
            + table(list(times), [list(times.values())]),
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
        "--data", default=str(ROOT / "data/mini/validation.parquet"), help="pictures of concepts outside training"
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
