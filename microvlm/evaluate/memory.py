"""Measure what the memory gives back: facts stored, asked, forgotten."""

import random
import re
from functools import cache

import torch
import torch.nn.functional as F

from ..data.augment import gray_copy, image_augmentation
from ..data.episodes import FACTS, QUESTIONS, caption_noun, make_names
from ..data.rows import decode_row, row_caption, text_ids
from ..metrics import auroc, equal_error_rate, normalise, word_f1

MEMORY_POOL = 2000  # pictures whose features are held at once
TEMPLATE_WORDS = {"this", "is", "the"}
TRAINING_NAMES = 4000  # recipes/nano_memory.yaml
BATCH = 64


@cache
def longest_name(tokenizer) -> str:
    """Of the names that facts may have, the one with the most tokens."""
    names = make_names(2 * TRAINING_NAMES)
    return max(zip(names, text_ids(tokenizer, [f" {name}" for name in names])), key=lambda pair: len(pair[1]))[0]


def counted(facts: int) -> str:
    return "1 fact" if facts == 1 else f"{facts} facts"


def fact_fits(model, tokenizer, caption: str) -> bool:
    """Whether "This is Bimo the <what the caption names>." can be stored, whatever the name."""
    fact = text_ids(tokenizer, f"This is {longest_name(tokenizer)} the {caption_noun(caption)}.")
    return len(fact) < model.config.memory_config.max_content_tokens  # the end token too


@torch.no_grad()
def memory_scores(model, processor, rows, sizes: list[int], queries: int) -> tuple[list[dict], dict[int, dict], dict]:
    """Figures of `measure` in benchmarks/memory_recall.py for memories of several sizes, and the KL terms.

    Returns:
        A dictionary per size; per size the scope probabilities `known` and `unrelated` they come from; and what was not measured.

    Raises:
        UnreadableRowError: a row without caption or picture; the message names it.
    """
    if getattr(model.model, "memory", None) is None:
        return [], {}, {"memory": "the checkpoint has no memory (config.use_memory is false)"}
    if model.config.default_prompt_ids is None:
        return [], {}, {"memory": "the checkpoint has no default prompt to ask with (config.default_prompt_ids)"}
    missing, out, scopes = {}, [], {}
    if len(rows) > MEMORY_POOL:
        rows = rows.select(range(MEMORY_POOL))
    fits = [i for i, row in enumerate(rows) if fact_fits(model, processor.tokenizer, row_caption(row))]
    if len(fits) < len(rows):
        missing[f"memory of {len(rows) - len(fits)} pictures"] = "their caption is too long for a fact"
        rows = rows.select(fits)
    if "concept" not in rows.column_names:
        rows = rows.add_column("concept", [normalise(caption) for caption in rows["caption"]])
    bench, most = Bench(model, processor, rows), model.config.memory_config.max_items
    for size in dict.fromkeys(sizes):
        if size > min(len(rows), most):
            limit = f"a memory holds {most}" if size > most else f"there are only {len(rows)} pictures"
            missing[f"memory of {counted(size)}"] = limit
            continue
        kept: dict = {}
        try:
            found = measure(bench, size, queries, ("new",), kept)
        except (ValueError, torch.linalg.LinAlgError) as error:  # what it holds is not finite
            missing[f"memory of {counted(size)}"] = str(error)
            continue
        scope, of_facts = found["unrelated"], found["new"]
        entry = {"facts": size, "questions": len(kept["known"]), "memory_kl": float(kept["memory"].kl().mean())}
        ids, features = model.default_prompt(1), bench.views[0][0][:1]
        query = model.model.get_memory_query(ids, None, features)
        entry["address_kl"] = float(model.model.read_memory(kept["memory"].select([0]), query).address_kl)
        entry |= {f"recall_{name}": of_facts.get(name) for name in ("same", "view", "words", "style")}
        entry |= {"word_f1": of_facts["word_f1"], "recall_no_memory": of_facts["no_memory"]}
        entry |= {"recall_nearest": of_facts["view_nearest"]}
        names = {"auroc": "scope_auroc", "eer": "scope_eer", "accuracy": "scope_accuracy"}
        names |= {name: name for name in ("false_recall", "unchanged")}
        entry |= {new: scope.get(old) for old, new in names.items()}
        entry |= {name: (found.get("forget") or {}).get(name) for name in ("forgotten", "kept", "kept_before")}
        if "auroc" not in scope:
            missing[f"scope of {counted(size)}"] = "every picture shares a word of its caption with a stored one"
        if size == 1:
            missing["forgetting of 1 fact"] = "half of one fact is none"
        if entry["recall_style"] is None:
            missing[f"other style, {counted(size)}"] = "no concept has a second picture that is not stored"
        out.append(entry)
        scopes[size] = {name: kept[name] for name in ("known", "unrelated") if name in kept}
    return out, scopes, missing


STOPWORDS = set("a an the of with and in on to for from at by is 3d model picture".split())


def caption_words(caption: str) -> set[str]:
    return set(re.findall(r"[a-z]+", caption.lower())) - STOPWORDS


def says_name(name: str, text: str) -> bool:
    return re.search(rf"\b{name}\b", text, re.IGNORECASE) is not None


def own_words(text: str) -> str:
    return " ".join(w for w in normalise(text, articles=True).split() if w not in TEMPLATE_WORDS)


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
        self.views = [self.encode(rows, augment) for augment in (None, image_augmentation(), gray_copy)]
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
            return sum(map(says_name, wanted, texts)) / max(1, len(texts))

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
        return sum(any(says_name(name, t) for name in names[r]) for (r, _), t in zip(pairs, texts)) / len(pairs)

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
        return sum(says_name(names[r][n], t) for (r, n), t in zip(places, texts)) / len(texts)

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
    return {"in_prompt": sum(map(says_name, wanted, texts)) / len(texts)}


def share_recalled(model, processor, rows, facts: int) -> float:
    """Share of so many taught names that are said of an augmented view of their picture, as benchmarks/memory_recall.py counts."""

    bench = Bench(model, processor, rows)
    pictures, names = bench.choose(facts), bench.draw.sample(bench.names["new"], facts)
    memory = bench.teach([pictures], [bench.facts(names, pictures)])
    return sum(map(says_name, names, bench.answers(1, pictures, memory=memory))) / facts
