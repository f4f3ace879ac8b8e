"""Build memory episodes: facts to store, questions, what must be remembered."""

import math
import random
import re
import string
import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..model import require
from .collators import CaptionCollator, FeatureCollator
from .rows import ordinary_tokens, text_ids

CODAS = ["", "", "", "n", "r", "l", "s", "m", "k"]
FACTS = (
    "This is {name} the {noun}.",
    "This is {name}, the {noun}.",
    "{name} the {noun}.",
    "My {noun} is called {name}.",
    "This {noun} is named {name}.",
    "Here is {name} the {noun}.",
    "A {noun} called {name}.",
    "{name} is a {noun}.",
)
QUESTIONS = (
    "Who is the {noun}?",
    "What is the {noun} called?",
    "What is the name of the {noun}?",
    "Tell me about the {noun}.",
)
TEXT_QUESTIONS = (*QUESTIONS, "What about {noun}?", "{noun}?")  # where facts are any text
FORMS = 0.25  # share of the facts that have a form, where there are texts
KINDS = {"text": 0.45, "tokens": 0.35, "codes": 0.2}  # of the others
CAPITALS = 0.1  # share of the texts that are in capitals
SIGNS = string.ascii_letters + 2 * string.digits + string.punctuation
SHARES = {"view": 0.45, "style": 0.1, "text": 0.1, "new": 0.3, "unknown": 0.05}  # of the kinds of query
UNWRITTEN = ("new", "unknown")  # kinds of query for what no memory holds
OWN_NOUN, OTHER_NOUN, OTHER_WORDS = 0.4, 0.6, 0.8  # upper bounds of these facts in [0, 1]; the rest has invented words
STYLE_PAIRS = 0.4  # share of the key pairs that show two images of a concept
ONSETS = "b c d f g h j k l m n p r s t v w z br ch dr kr sh st th tr".split()
VOWELS = "a e i o u ai ea ie oo".split()


def make_names(number: int, seed: int = 0) -> list[str]:
    """Make up different pronounceable names; a longer list begins with the shorter one."""
    draw, names = random.Random(seed), {}
    while len(names) < number:
        name = "".join(draw.choice(ONSETS) + draw.choice(VOWELS) for _ in range(draw.choice((1, 2, 2, 3))))
        names.setdefault((name + draw.choice(CODAS)).capitalize())
    return list(names)


def caption_noun(caption: str) -> str:
    """Return what a caption names, without its article: `A hiking boot.` -> `hiking boot`."""
    return re.sub(r"^(An?|The)\s+(?=\S)", "", caption.strip()).rstrip(".")


def pad_sentences(sentences: list[list[int]], length: int) -> torch.Tensor:
    """Cut sentences to `length` and pad them with -1, (N, length)."""
    rows = [ids[:length] + [-1] * (length - len(ids)) for ids in sentences]
    return torch.tensor(rows, dtype=torch.long).view(-1, length)


@dataclass(eq=False, repr=False)
class ImageEpisodeCollator(CaptionCollator):
    """Build memory episodes from plain image-caption pairs, as a stream has them.

    Every `size` neighbouring rows share a memory. A random half of them is written to it: the caption under another
    view of the image, or any text for most where there are `texts`. All rows ask. A written row has to read what was
    stored; for the others ScopeNet has to say no. Rows repeated to fill the last episode have no answer.
    """

    size: int = 4  # rows of an episode
    max_tokens: int = 32  # of a stored sentence with its end; longer ones are cut
    texts: Sequence[str] = ()  # sentences to teach, a path to a file of a line each, or none: captions alone

    def __post_init__(self):
        super().__post_init__()
        tokenizer = self.processor.tokenizer
        self.story = Storyteller(tokenizer, [], 0, self.max_tokens, self.texts) if self.texts else None

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        pairs = self.read_all(rows)
        # fill the last episode
        readable = len(pairs)
        pairs += [pairs[i % readable] for i in range(-readable % self.size)]
        images, captions = [image for image, _ in pairs], [caption for _, caption in pairs]
        # what the rows ask, and what they are to say
        answers = self.answers(captions)
        # what the memories hold: a repeated row is written where its first is
        draw = random.Random(f"{self.seed} {self.epoch} {captions}")
        written = [draw.random() < 0.5 for _ in range(readable)]
        known = torch.tensor([written[i % readable] for i in range(len(pairs))])
        for i in range(readable):
            if written[i] and self.story and draw.random() > FORMS:
                answers[i::readable] = [self.story.text(draw).tokens] * len(answers[i::readable])
        targets = [*answers[:readable], *[[]] * (len(pairs) - readable)]
        batch = self.sequences([self.prompt_ids] * len(pairs), targets) | self.images(images)
        tokens = pad_sentences(answers, self.max_tokens)
        return batch | {
            "support_pixel_values": self.images(images, "support")["pixel_values"],
            "support_tokens": tokens.view(-1, self.size, self.max_tokens),
            "support_active": known.view(-1, self.size),
            "target_tokens": tokens.masked_fill(~known.unsqueeze(1), -1),
            "known": known,
        }


class Fact(NamedTuple):
    """A sentence about an image: tokens with the end token, and the words that a question has of it."""

    tokens: list[int]
    noun: str
    text: str


class Storyteller:
    """Draw facts of at most `max_tokens` about images, with `number` made-up names.

    With `texts`, sentences or a file of them, most facts are no form with a name but any sentence, any tokens, or words
    and codes: what is learned is to say them again, whatever they are.
    """

    def __init__(self, tokenizer, captions: list[str], number: int, max_tokens: int, texts: Sequence[str] = ()):
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.texts = Path(texts).read_text().splitlines() if isinstance(texts, str) else texts
        self.any_token = ordinary_tokens(tokenizer)
        self.nouns, self.names = [caption_noun(caption) for caption in captions], make_names(number)
        # words of captions and of names
        words = {word for noun in self.nouns for word in noun.split()}
        self.vocabulary = sorted(words | {name.lower() for name in self.names[: len(words) // 2]})
        # tokens that begin a word, and that go on with one
        tokens = [t for t in tokenizer.get_vocab() if t.lstrip("Ġ▁").isascii() and t.lstrip("Ġ▁").isalpha()]
        self.starts = sorted(t[1:] for t in tokens if t[0] in "Ġ▁")
        self.endings = sorted(t for t in tokens if t[0] not in "Ġ▁")

    def tokens(self, text: str) -> list[int]:
        return text_ids(self.tokenizer, text)

    def words(self, row: int, draw: random.Random) -> list[str]:
        """Draw the words for an image: its noun, another image's, other words or invented ones."""
        # so the decoder has to read the noun instead of looking at the image, and learns to repeat any token
        kind = draw.random()
        if kind > OTHER_WORDS and self.starts and self.endings:
            lengths = [draw.choice((0, 1, 1, 2, 3)) for _ in range(draw.choice((1, 1, 2, 3)))]
            return [draw.choice(self.starts) + "".join(draw.choices(self.endings, k=k)) for k in lengths]
        if kind > OTHER_NOUN:
            return [draw.choice(self.vocabulary) for _ in range(draw.choice((1, 1, 2, 3)))]
        return (draw.choice(self.nouns) if kind > OWN_NOUN else self.nouns[row]).split()

    def fact(self, row: int, draw: random.Random) -> Fact:
        """Draw a fact about an image, of a form or any text."""
        return self.text(draw) if self.texts and draw.random() > FORMS else self.form(row, draw)

    def text(self, draw: random.Random) -> Fact:
        """Draw a text that ends somewhere, words and codes, or tokens."""
        kind = draw.choices(list(KINDS), list(KINDS.values()))[0]
        if kind == "tokens":
            # a few that come again and again, or any
            few = draw.sample(self.any_token, draw.choice((2, 4, 8))) if draw.random() < 0.5 else None
            ids = draw.choices(few or self.any_token, k=draw.randint(1, self.max_tokens - 1))
        elif kind == "text":
            text = draw.choice(self.texts)
            ids = self.tokens(text.upper() if draw.random() < CAPITALS else text)
        else:
            codes = ("".join(draw.choices(SIGNS, k=draw.randint(1, 8))) for _ in range(draw.randint(1, 4)))
            words = [*codes, *draw.choice(self.texts).split()[: draw.randint(0, 5)]]
            ids = self.tokens(" ".join(draw.sample(words, len(words))))
        ids = ids[: self.max_tokens - 1]
        # a question has its longest words
        text = self.tokenizer.decode(ids)
        longest = sorted(re.findall(r"\w+", text), key=len)[-draw.randint(1, 3) :]
        asked = " ".join(word for word in text.split() if re.search("|".join(map(re.escape, longest)), word))
        return Fact([*ids, self.tokenizer.eos_token_id], (asked if longest else text)[:60], text)

    def form(self, row: int, draw: random.Random) -> Fact:
        """Draw a fact of a form; a long noun keeps only its last words."""
        name, form = draw.choice(self.names), draw.choice(FACTS)
        words = self.words(row, draw)
        while True:
            noun = " ".join(words)
            text = form.format(name=name, noun=noun)
            ids = [*self.tokens(text), self.tokenizer.eos_token_id]
            if len(ids) <= self.max_tokens or len(words) == 1:
                return Fact(ids[: self.max_tokens], noun, text)
            words = words[1:]

    def sentences(self) -> list[list[int]]:
        """Tokenize a fact and a question about every image, taking the forms in turn."""
        out = []
        for i, noun in enumerate(self.nouns):
            words = {"noun": noun, "name": self.names[i % len(self.names)]}
            out += [self.tokens(forms[i % len(forms)].format(**words)) for forms in (FACTS, QUESTIONS)]
        return out


class Support(NamedTuple):
    """A fact as it is written: under a view of an image."""

    view: int
    row: int
    tokens: list[int]


class Query(NamedTuple):
    """A row of a batch; `image` is (view, row), `known` whether a memory has the answer."""

    prompt: list[int]
    answer: list[int]
    image: tuple[int, int] | None
    known: bool


@dataclass(eq=False, repr=False, kw_only=True)
class EpisodeCollator(FeatureCollator):
    """Build memories to be written, and the rows as queries to them, in one batch.

    A memory stores a fact per image ("This is Bimo the penguin."), under a new name every time, so that no name can
    settle in the weights. Its rows ask: `view` shows another view of a stored image, `style` another image of its
    concept, `text` asks in words. `new` shows an image that is not stored; half of them have a look-alike stored.
    `unknown` asks for one in words. The answer is the stored sentence; of a new image its caption; of an unknown
    question nothing, only ScopeNet learns from it.
    """

    captions: list[str]  # of all images
    concepts: list[str]
    pooled: torch.Tensor  # features for keys (views, rows, 2 x width)
    gray: torch.Tensor | None  # of grey copies (rows, 2 x width)
    max_tokens: int  # of a fact with its end token
    groups: int = 4  # memories per batch
    sizes: Sequence[int] = (1, 256)  # smallest and largest number of facts, drawn evenly on a logarithmic scale
    shares: dict[str, float] = field(default_factory=SHARES.copy)  # of the kinds of query
    names: int = 4000  # number of made-up names
    texts: Sequence[str] = ()  # sentences to teach, a path to a file of a line each, or none: forms alone
    key_pairs: int = 512  # images per batch for the contrastive loss of the keys, two views each

    def __post_init__(self):
        super().__post_init__()
        shares = ", ".join(self.shares)
        require(set(self.shares) == set(SHARES), f"shares must be of {', '.join(SHARES)}, got {shares}.")
        self.story = Storyteller(self.processor.tokenizer, self.captions, self.names, self.max_tokens, self.texts)
        self.same_concept = defaultdict(list)
        for i, concept in enumerate(self.concepts):
            self.same_concept[concept].append(i)
        self.lookalikes = self._lookalikes()

    def _lookalikes(self, k: int = 4) -> list[list[int]]:
        """Find per row the rows of other concepts with the most similar key features."""
        x = self.pooled[0].float()
        x = F.normalize((x - x.mean(0)) / x.std(0).clamp(min=1e-4), dim=-1)
        code = {concept: i for i, concept in enumerate(self.same_concept)}
        concept = torch.tensor([code[c] for c in self.concepts])
        nearest = []
        for start in range(0, len(x), 1024):
            similarity = x[start : start + 1024] @ x.mT
            similarity[concept[start : start + 1024, None] == concept[None]] = -1
            nearest += similarity.topk(min(k, len(x))).indices.tolist()
        return nearest

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        own, groups = [row["feature_row"] for row in rows], self.groups
        message = f"a batch of {len(own)} rows does not divide into {groups} groups: set dataloader_drop_last."
        require(len(own) % groups == 0, message)
        draw = random.Random(zlib.crc32(f"{self.seed} {int(self.counts[2])} {own}".encode()))
        # draw what every memory stores and what its rows ask
        size, memories, queries = len(own) // groups, [], []
        for start in range(0, len(own), size):
            supports, asks = self._episode(own[start : start + size], draw)
            memories.append(supports)
            queries += asks
        # the rows as sequences with the features of their images
        batch = self.sequences([query.prompt for query in queries], [query.answer for query in queries])
        shown = torch.tensor([query.image for query in queries if query.image], dtype=torch.long).view(-1, 2)
        batch["vision_features"] = self.features[shown[:, 0], shown[:, 1]]
        # what is to be remembered
        targets = [query.answer if query.known else [] for query in queries]
        batch["target_tokens"] = pad_sentences(targets, self.max_tokens)
        batch["known"] = torch.tensor([query.known for query in queries])
        return batch | self._support_batch(memories) | self._key_batch(draw)

    def _episode(self, rows: list[int], draw: random.Random) -> tuple[list[Support], list[Query]]:
        """Draw a memory and the queries of its rows."""
        low, high = map(math.log, self.sizes)
        size = round(math.exp(draw.uniform(low, high)))
        plan, store = self._plan(rows, size, draw)
        self._fill(plan, store, size, draw)
        # write the facts in any order, each under any view
        order = list(store)
        draw.shuffle(order)
        supports = [Support(draw.randrange(len(self.features)), i, store[i].tokens) for i in order]
        return supports, [self._query(kind, i, store, draw) for kind, i in plan]

    def _plan(self, rows: list[int], size: int, draw: random.Random) -> tuple[list[tuple[str, int]], dict[int, Fact]]:
        """Draw what every row asks, kind and image, and the facts that answer it."""
        plan, store, shares = [], {}, self.shares
        for i in rows:
            kind = draw.choices(list(shares), list(shares.values()))[0]
            if kind == "style" and len(self.same_concept[self.concepts[i]]) < 2:
                kind = "view"
            if kind not in UNWRITTEN and i not in store:
                if len(store) < size:
                    store[i] = self.story.fact(i, draw)
                else:  # no room: ask for a stored image
                    i = draw.choice(list(store))
                    kind = "view" if kind == "style" else kind
            plan.append((kind, i))
        return plan, store

    def _fill(self, plan: list[tuple[str, int]], store: dict[int, Fact], size: int, draw: random.Random) -> None:
        """Add facts that nobody asks for to `store`, look-alikes of new images first."""
        stored = {self.concepts[i] for i in store}
        for kind, i in plan:
            other = draw.choice(self.lookalikes[i])
            room = kind in UNWRITTEN and len(store) < size
            if room and draw.random() < 0.5 and self.concepts[other] not in stored:
                store[other] = self.story.fact(other, draw)
        asked = {self.concepts[i] for _, i in plan}
        rest = [i for i in range(len(self.captions)) if i not in store and self.concepts[i] not in asked]
        for i in draw.sample(rest, min(len(rest), max(0, size - len(store)))):
            store[i] = self.story.fact(i, draw)

    def _query(self, kind: str, row: int, store: dict[int, Fact], draw: random.Random) -> Query:
        """Build the query for an image; the finished memory may change its kind."""
        concept = self.concepts[row]
        same = next((i for i in store if self.concepts[i] == concept), None)
        if kind in UNWRITTEN and same is not None:  # another row has stored its concept
            kind, row = "view" if kind == "new" else "text", same
        fact = self.story.fact(row, draw) if kind == "unknown" else store.get(row)
        if kind == "unknown" and any(fact.noun.lower() in other.text.lower() for other in store.values()):
            kind = "new"  # a stored fact has the words
        # the prompt: a question, or an image
        if kind in ("text", "unknown"):
            question = draw.choice(TEXT_QUESTIONS if self.story.texts else QUESTIONS).format(noun=fact.noun)
            prompt, image = [self.prompt_ids[0], *self.story.tokens(question), self.prompt_ids[-1]], None
        else:
            others = [i for i in self.same_concept[concept] if i != row and i not in store] if kind == "style" else []
            image = draw.choice(others) if others else row
            prompt, image = self.prompt_ids, (draw.randrange(len(self.features)), image)
        # the answer
        if kind not in UNWRITTEN:
            return Query(prompt, fact.tokens, image, True)
        caption = [*self.story.tokens(self.captions[row]), self.processor.tokenizer.eos_token_id]
        return Query(prompt, [] if kind == "unknown" else caption, image, False)

    def _support_batch(self, memories: list[list[Support]]) -> dict[str, torch.Tensor]:
        """Collect keys and facts of the memories, (groups, most facts, ...)."""
        widest = max(map(len, memories))
        padded = [[*supports, *[Support(0, 0, [])] * (widest - len(supports))] for supports in memories]
        place = torch.tensor([[s[:2] for s in supports] for supports in padded], dtype=torch.long)
        view, row = place.view(len(memories), widest, 2).unbind(-1)
        features = [self.pooled[view, row]] + ([] if self.gray is None else [self.gray[row]])
        tokens = torch.stack([pad_sentences([s.tokens for s in supports], self.max_tokens) for supports in padded])
        active = tokens[..., 0] >= 0
        return {"support_features": torch.stack(features, 2), "support_tokens": tokens, "support_active": active}

    def _key_batch(self, draw: random.Random) -> dict[str, torch.Tensor]:
        """Draw two views of images of different concepts, and the grey copies of the first."""
        concepts = draw.sample(sorted(self.same_concept), min(self.key_pairs, len(self.same_concept)))
        first = [draw.choice(self.same_concept[c]) for c in concepts]
        # for some the second is another image of the concept
        second = [
            draw.choice(self.same_concept[c]) if draw.random() < STYLE_PAIRS else i
            for i, c in zip(first, concepts, strict=True)
        ]
        features = []
        for rows in (first, second):
            views = [draw.randrange(len(self.pooled)) for _ in rows]
            features.append(self.pooled[views, rows])
        if self.gray is not None:
            features.append(self.gray[first])
        return {"key_features": torch.stack(features)}
