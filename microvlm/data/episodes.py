"""Build memory episodes: facts to store, questions, what must be remembered."""

import math
import random
import re
import zlib
from collections import defaultdict

import torch
import torch.nn.functional as F

from .collators import CaptionCollator, FeatureCollator
from .rows import text_ids

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
UNWRITTEN = ("new", "unknown")  # kinds of query for what no memory holds
ONSETS = "b c d f g h j k l m n p r s t v w z br ch dr kr sh st th tr".split()
VOWELS = "a e i o u ai ea ie oo".split()


def make_names(number: int, seed: int = 0) -> list[str]:
    """Pronounceable made-up names, all different, the same for the same seed; a longer list begins with the shorter one."""
    draw, names = random.Random(seed), {}
    while len(names) < number:
        name = "".join(draw.choice(ONSETS) + draw.choice(VOWELS) for _ in range(draw.choice((1, 2, 2, 3))))
        names.setdefault((name + draw.choice(CODAS)).capitalize())
    return list(names)


def caption_noun(caption: str) -> str:
    """What a caption names, without its article: `A hiking boot.` -> `hiking boot`."""
    return re.sub(r"^(An?|The)\s+(?=\S)", "", caption.strip()).rstrip(".")


class ImageEpisodeCollator(CaptionCollator):
    """Rows -> episodes for the memory from plain picture-caption pairs, as a stream has them: no concepts, no kept features.

    Every `size` neighbouring rows share a memory. Half of them, drawn at random, are written to it: the caption under another view of the
    picture. All of them ask: where the row was written the caption can be read back, elsewhere ScopeNet has to say that it cannot.
    Where the readable rows do not fill the last episode some are repeated, without an answer: for the memory's losses alone.

    Args:
        size: rows of an episode; the seed's E = 4.
        max_tokens: of a stored caption with its end; a longer one is cut.
        others: as in `CaptionCollator`.
    """

    def __init__(self, *args, size: int = 4, max_tokens: int = 32, **kwargs):
        super().__init__(*args, **kwargs)
        self.episode_size, self.max_tokens = size, max_tokens

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        pairs = self.read_all(rows)
        readable = len(pairs)
        pairs += [pairs[i % readable] for i in range(-readable % self.episode_size)]
        pictures, captions = [picture for picture, _ in pairs], [caption for _, caption in pairs]
        answers = self.answers(captions)
        asked = [*answers[:readable], *[[]] * (len(pairs) - readable)]
        batch = self._sequences([self.prompt_ids] * len(pairs), asked) | self.pictures(pictures)
        batch["support_pixel_values"] = self.pictures(pictures, "support")["pixel_values"]
        tokens = torch.full((len(pairs), self.max_tokens), -1)
        for i, ids in enumerate(answers):
            ids = ids[: self.max_tokens]
            tokens[i, : len(ids)] = torch.tensor(ids)
        epoch = int(self.counts[2]) if self.epoch is None else self.epoch
        draw = random.Random(f"{self.seed} {epoch} {captions}")
        known = [draw.random() < 0.5 for _ in range(readable)]
        known = torch.tensor([known[i % readable] for i in range(len(pairs))])  # a repeated row with its first
        batch["support_tokens"] = tokens.view(-1, self.episode_size, self.max_tokens)
        batch["support_active"] = known.view(-1, self.episode_size)
        batch["target_tokens"] = tokens.masked_fill(~known.unsqueeze(1), -1)
        return batch | {"known": known}


class EpisodeCollator(FeatureCollator):
    """Rows -> episodes: memories to be written, and the rows as queries to them. No gradient step lies between the two.

    A batch has `groups` memories. Each stores a fact per support picture ("This is Bimo the penguin."), the name drawn at random every
    time, so that no name can settle in the weights. The group's rows ask for them: `view` another view of a stored picture, `style` a
    picture of the same concept in another style, `text` a question in words, `new` a picture that was not stored, with the nearest
    look-alike of it stored for half of them, or `unknown` a question in words about one. The answer is the stored sentence, or the caption
    where nothing was stored; an unknown question has none, ScopeNet alone learns from it.

    Args:
        features: (views, rows, tokens, width), as in `FeatureCollator`.
        pooled: key features of the same pictures (views, rows, 2 x width).
        gray: key features of their grey copies (rows, 2 x width), or None.
        captions, concepts: of all rows of `features`.
        groups: memories per batch.
        sizes: smallest and largest number of facts in a memory; drawn evenly on a logarithmic scale.
        shares: of the kinds of query, `view`, `style`, `text`, `new`, `unknown`.
        names: how many made-up names there are in training.
        max_tokens: longest fact, in tokens with its end.
        key_pairs: pictures per batch for the contrastive loss of the keys, two views each.
        seed: of all that is drawn, with the epoch and the rows.
    """

    def __init__(
        self,
        features: torch.Tensor,
        pooled: torch.Tensor,
        gray: torch.Tensor | None,
        captions: list[str],
        concepts: list[str],
        processor,
        prompt_ids: list[int],
        max_tokens: int,
        groups: int = 4,
        sizes: tuple[int, int] = (1, 256),
        shares: dict[str, float] | None = None,
        names: int = 4000,
        key_pairs: int = 512,
        seed: int = 0,
    ):
        super().__init__(features, processor, prompt_ids)
        self.pooled, self.gray, self.captions, self.concepts = pooled, gray, captions, concepts
        self.groups, self.sizes, self.max_tokens, self.key_pairs = groups, sizes, max_tokens, key_pairs
        self.shares = shares or {"view": 0.45, "style": 0.1, "text": 0.1, "new": 0.3, "unknown": 0.05}
        if set(self.shares) != {"view", "style", "text", "new", "unknown"}:
            raise ValueError(f"shares must be of view, style, text, new and unknown, got {', '.join(self.shares)}.")
        self.names, self.seed = make_names(names), seed
        words = {word for caption in captions for word in caption_noun(caption).split()}
        self.vocabulary = sorted(words | {name.lower() for name in self.names[: len(words) // 2]})
        tokens = [t for t in processor.tokenizer.get_vocab() if t.lstrip("Ġ▁").isascii() and t.lstrip("Ġ▁").isalpha()]
        self.starts = sorted(t[1:] for t in tokens if t[0] in "Ġ▁")
        self.endings = sorted(t for t in tokens if t[0] not in "Ġ▁")
        self.mates = defaultdict(list)
        for i, concept in enumerate(concepts):
            self.mates[concept].append(i)
        self.lookalikes = self._lookalikes()

    def _lookalikes(self, k: int = 4) -> list[list[int]]:
        """Per row, the rows of other concepts with the most similar key features."""
        x = self.pooled[0].float()
        x = F.normalize((x - x.mean(0)) / x.std(0).clamp(min=1e-4), dim=-1)
        code = {concept: i for i, concept in enumerate(self.mates)}
        concept = torch.tensor([code[c] for c in self.concepts])
        nearest = []
        for start in range(0, len(x), 1024):
            similarity = x[start : start + 1024] @ x.mT
            similarity[concept[start : start + 1024, None] == concept[None]] = -1
            nearest += similarity.topk(min(k, len(x))).indices.tolist()
        return nearest

    def _tokens(self, text: str) -> list[int]:
        return text_ids(self.processor.tokenizer, text)

    def _fact(self, row: int, draw: random.Random) -> tuple[list[int], str]:
        """Tokens of a fact about a row, with the end token, and the noun it uses.

        Four facts in ten call the picture what it is; the others by a noun of another picture, a few random words or words made of random
        tokens, so that the decoder has to read the noun too instead of looking at the picture, and learns to repeat any token. Too
        long for the memory, a noun lends only its last words.
        """
        noun, name, form = caption_noun(self.captions[row]).split(), draw.choice(self.names), draw.choice(FACTS)
        kind = draw.random()
        if kind > 0.8 and self.starts and self.endings:
            parts = [draw.choice((0, 1, 1, 2, 3)) for _ in range(draw.choice((1, 1, 2, 3)))]
            noun = [draw.choice(self.starts) + "".join(draw.choices(self.endings, k=k)) for k in parts]
        elif kind > 0.6:
            noun = [draw.choice(self.vocabulary) for _ in range(draw.choice((1, 1, 2, 3)))]
        elif kind > 0.4:
            noun = caption_noun(draw.choice(self.captions)).split()
        while True:
            ids = [*self._tokens(form.format(name=name, noun=" ".join(noun))), self.processor.tokenizer.eos_token_id]
            if len(ids) <= self.max_tokens or len(noun) == 1:
                return ids[: self.max_tokens], " ".join(noun)
            noun = noun[1:]

    def sentences(self) -> list[list[int]]:
        """Tokens of a fact and of a question about every picture, their forms by turns."""
        out = []
        for i, caption in enumerate(self.captions):
            words = {"noun": caption_noun(caption), "name": self.names[i % len(self.names)]}
            out += [self._tokens(forms[i % len(forms)].format(**words)) for forms in (FACTS, QUESTIONS)]
        return out

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        own = [row["feature_row"] for row in rows]
        if len(own) % self.groups:
            raise ValueError(
                f"a batch of {len(own)} rows does not divide into {self.groups} groups: set dataloader_drop_last."
            )
        draw = random.Random(zlib.crc32(f"{self.seed} {int(self.counts[2])} {own}".encode()))
        views, n, G = len(self.features), len(self.captions), self.groups
        low, high = (math.log(s) for s in self.sizes)
        prompt, user, assistant = self.prompt_ids, self.prompt_ids[0], self.prompt_ids[-1]
        supports, answers, prompts, pictures, known = [], [], [], [], []
        for group in range(G):
            members = own[group * len(own) // G : (group + 1) * len(own) // G]
            size = round(math.exp(draw.uniform(low, high)))
            store: dict[int, tuple[list[int], str]] = {}  # row -> fact and its noun
            plan = []
            for i in members:
                kind = draw.choices(list(self.shares), list(self.shares.values()))[0]
                if kind == "style" and len(self.mates[self.concepts[i]]) < 2:
                    kind = "view"
                written = kind not in UNWRITTEN
                if written and len(store) >= size and i not in store:  # no room: ask for what is there
                    i = draw.choice(list(store))
                    kind = "view" if kind == "style" else kind
                if written and i not in store:
                    store[i] = self._fact(i, draw)
                plan.append((kind, i))
            told = {self.concepts[i] for i in store}
            for kind, i in plan:  # a new picture's look-alike, of a concept no other query asks for
                other = draw.choice(self.lookalikes[i])
                if kind in UNWRITTEN and len(store) < size and draw.random() < 0.5 and self.concepts[other] not in told:
                    store[other] = self._fact(other, draw)
            asked = {self.concepts[i] for _, i in plan}
            rest = [i for i in range(n) if i not in store and self.concepts[i] not in asked]
            for i in draw.sample(rest, min(len(rest), max(0, size - len(store)))):
                store[i] = self._fact(i, draw)
            order = list(store)
            draw.shuffle(order)
            supports.append([(i, draw.randrange(views), store[i][0]) for i in order])
            nouns = {noun.lower() for _, noun in store.values()}
            for kind, i in plan:
                if kind in UNWRITTEN and self.concepts[i] in {self.concepts[j] for j in store}:
                    kind = "view" if kind == "new" else "text"
                    i = next(j for j in store if self.concepts[j] == self.concepts[i])
                if kind == "unknown" and caption_noun(self.captions[i]).lower() in nouns:  # a fact has borrowed it
                    kind = "new"
                picture = i
                if kind == "style":
                    others = [j for j in self.mates[self.concepts[i]] if j != i and j not in store]
                    picture = draw.choice(others) if others else i
                if kind in ("text", "unknown"):
                    noun = store[i][1] if kind == "text" else caption_noun(self.captions[i])
                    question = draw.choice(QUESTIONS).format(noun=noun)
                    prompts.append([user, *self._tokens(question), assistant])
                else:
                    prompts.append(prompt)
                    pictures.append((draw.randrange(views), picture))
                caption = [*self._tokens(self.captions[i]), self.processor.tokenizer.eos_token_id]
                answers.append(store[i][0] if i in store else [] if kind == "unknown" else caption)
                known.append(kind not in UNWRITTEN)
        batch = self._sequences(prompts, answers)
        widest = max(map(len, supports))
        place = torch.zeros(G, widest, 2, dtype=torch.long)
        tokens = torch.full((G, widest, self.max_tokens), -1)
        active = torch.zeros(G, widest, dtype=torch.bool)
        target = torch.zeros(len(rows), self.max_tokens, dtype=torch.long) - 1
        for group, items in enumerate(supports):
            for k, (i, view, fact) in enumerate(items):
                place[group, k] = torch.tensor([view, i])
                tokens[group, k, : len(fact)] = torch.tensor(fact)
                active[group, k] = True
        for row, answer in enumerate(answers):
            if known[row]:
                target[row, : len(answer)] = torch.tensor(answer)
        index = torch.tensor(pictures, dtype=torch.long).view(-1, 2)
        batch["vision_features"] = self.features[index[:, 0], index[:, 1]]
        written = [self.pooled[place[..., 0], place[..., 1]]]
        if self.gray is not None:
            written.append(self.gray[place[..., 1]])
        batch["support_features"] = torch.stack(written, 2)
        batch |= {"support_tokens": tokens, "support_active": active, "target_tokens": target}
        batch["known"] = torch.tensor(known)
        return batch | self._key_batch(draw)

    def _key_batch(self, draw: random.Random) -> dict[str, torch.Tensor]:
        """Two views, or for one in ten two styles, of pictures of different concepts, and the first one's grey copies."""
        concepts = draw.sample(sorted(self.mates), min(self.key_pairs, len(self.mates)))
        first = [draw.choice(self.mates[c]) for c in concepts]
        second = [
            draw.choice(self.mates[c]) if draw.random() < 0.1 else i for i, c in zip(first, concepts, strict=True)
        ]
        view = lambda: torch.tensor([draw.randrange(len(self.pooled)) for _ in first])  # noqa: E731
        features = [self.pooled[view(), torch.tensor(i)] for i in (first, second)]
        if self.gray is not None:
            features.append(self.gray[first])
        return {"key_features": torch.stack(features)}
