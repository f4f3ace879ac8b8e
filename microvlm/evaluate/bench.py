"""Teach facts about images and ask for them."""

import random
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..data.augment import gray_copy, image_augmentation
from ..data.episodes import FACTS, QUESTIONS, caption_noun, make_names
from ..data.rows import decode_row, text_ids
from ..model import MemoryState

STOPWORDS = set("a an the of with and in on to for from at by is 3d model picture".split())
TRAINING_NAMES = 4000  # names that training draws from; the next ones are new
BATCH = 64


def caption_words(caption: str) -> set[str]:
    return set(re.findall(r"[a-z]+", caption.lower())) - STOPWORDS


def says_name(name: str, text: str) -> bool:
    return re.search(rf"\b{name}\b", text, re.IGNORECASE) is not None


def name_share(names: list[str], texts: list[str]) -> float:
    """Compute the share of texts that say their name."""
    return any_name_share([[name] for name in names], texts)


def any_name_share(names: list[list[str]], texts: list[str]) -> float:
    """Compute the share of texts that say one of their names."""
    said = [any(says_name(name, text) for name in own) for own, text in zip(names, texts, strict=True)]
    return sum(said) / max(1, len(said))


@dataclass
class Lesson:
    """R memories with N facts each, and the M facts to ask for.

    Indices of images, names and sentences are (R, N), the memory has R rows, `places` are rows and numbers (M, 2).
    """

    images: list[list[int]]
    names: list[list[str]]
    facts: list[list[str]]
    memory: MemoryState
    places: list[tuple[int, int]]

    def at_places(self, table: list[list]) -> list:
        """Pick the M entries to ask for from a table (R, N)."""
        return [table[r][n] for r, n in self.places]

    def asking(self, places: list[tuple]) -> dict:
        """Give the memory, and for places (row, ...) the rows to ask; None where it has one for all."""
        return {"memory": self.memory, "rows": None if len(self.images) == 1 else [r for r, *_ in places]}


class Bench:
    """A model, images encoded once, and questions about them."""

    def __init__(self, model, processor, rows, seed: int = 0):
        self.model, self.processor = model, processor
        self.captions, self.concepts = rows["caption"][:], rows["concept"][:]
        self.words = [caption_words(c) for c in self.captions]
        self.by_concept: dict[str, list[int]] = {}
        for i, concept in enumerate(self.concepts):
            self.by_concept.setdefault(concept, []).append(i)
        self.draw = random.Random(seed)
        # names that no caption says and that the tokenizer splits
        names = make_names(2 * TRAINING_NAMES)
        taken = set().union(STOPWORDS, *(caption_words(text) for text in (*self.captions, *FACTS, *QUESTIONS)))
        rare = [name.lower() not in taken and len(self.tokens(f" {name}")) > 1 for name in names]
        self.names = {
            "seen": [name for name, good in zip(names[:TRAINING_NAMES], rare) if good],
            "new": [name for name, good in zip(names[TRAINING_NAMES:], rare[TRAINING_NAMES:]) if good],
        }
        # the images as they are, an augmented view and a grey copy
        self.views = [self.encode(rows, augment) for augment in (None, image_augmentation(), gray_copy)]
        self.skip = model.model.vision_tower.timm_model.num_prefix_tokens
        self.pooled = [model.model.memory.key_encoder.pool(features, self.skip) for features, _ in self.views]
        self.plain: dict[int, str] = {}  # captions without memory, by image

    @torch.inference_mode()
    def encode(self, rows, augment) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute vision features (M, tokens, W) and prefix tokens (M, P, D) of all images."""
        features, prefixes = [], []
        image_processor = self.processor.image_processor
        torch.manual_seed(1)
        for start in range(0, len(rows), BATCH):
            batch = rows.select(range(start, min(start + BATCH, len(rows))))
            images = [decode_row(row, image_processor)[0] for row in batch]
            x = image_processor(images, return_tensors="pt", do_normalize=False)["pixel_values"]
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

    def tokens(self, text: str) -> list[int]:
        return text_ids(self.processor.tokenizer, text)

    def pad(self, lines: list[list[int]]) -> dict[str, torch.Tensor]:
        return self.processor.tokenizer.pad({"input_ids": lines}, return_tensors="pt").to(self.model.device)

    def facts(self, names: list[str], images: list[int]) -> list[str]:
        """Write the facts to teach about images."""
        return [f"This is {name} the {caption_noun(self.captions[i])}." for name, i in zip(names, images)]

    def questions(self, indices: list[int]) -> list[list[int]]:
        """Write prompts that ask in words who the thing in an image is."""
        user, assistant = self.model.config.default_prompt_ids[0], self.model.config.default_prompt_ids[-1]
        nouns = [caption_noun(self.captions[i]) for i in indices]
        return [[user, *self.tokens(self.draw.choice(QUESTIONS).format(noun=noun)), assistant] for noun in nouns]

    @torch.inference_mode()
    def answers(
        self, view: int | None, indices: list[int], prompts=None, memory=None, rows=None, gate="auto"
    ) -> list[str]:
        """Answer greedily about M images, or with view None to questions in words.

        Args:
            view: of the images: 0 as they are, 1 augmented, 2 grey.
            prompts: token ids of M prompts; default: the model's own.
            rows: row of the memory for each image; None: it has one row.
            gate: `memory_gate` of `generate()`.
        """
        texts = []
        for start in range(0, len(indices), BATCH):
            # the image, or only its question
            part, kwargs = indices[start : start + BATCH], {}
            if view is not None:
                kwargs["mm_encoder_outputs"] = self.image(view, part)
            lines = self.model.default_prompt(len(part)).tolist() if prompts is None else prompts[start : start + BATCH]
            inputs = self.pad(lines)
            # each image asks its own row
            if memory is not None:
                kwargs["memory"] = memory if rows is None else memory.select(rows[start : start + BATCH])
                kwargs["memory_gate"] = gate
            ids = self.model.generate(**inputs, **kwargs, max_new_tokens=32, do_sample=False, num_beams=1)
            texts += self.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def without_memory(self, indices: list[int]) -> list[str]:
        missing = [i for i in dict.fromkeys(indices) if i not in self.plain]
        self.plain.update(zip(missing, self.answers(0, missing)))
        return [self.plain[i] for i in indices]

    def choose(self, number: int) -> list[int]:
        """Draw images, of different concepts while they last."""
        concepts = self.draw.sample(sorted(self.by_concept), len(self.by_concept))
        chosen = [self.draw.choice(self.by_concept[c]) for c in concepts[:number]]
        rest = sorted(set(range(len(self.captions))) - set(chosen))
        return chosen + self.draw.sample(rest, number - len(chosen))

    def unwritten(self, stored: list[int]) -> tuple[list[int], list[int]]:
        """Find unrelated images, without a common word, and look-alikes: a common word, another concept."""
        words = set().union(*(self.words[i] for i in stored))
        concepts = {self.concepts[i] for i in stored}
        everything = range(len(self.captions))
        unrelated = [i for i in everything if not self.words[i] & words]
        return unrelated, [i for i in everything if self.words[i] & words and self.concepts[i] not in concepts]

    def teach(self, images: list[list[int]], facts: list[list[str]]) -> MemoryState:
        """Write facts (R, N) about images (R, N) into a memory of R rows."""
        memory = self.model.new_memory(len(images))
        prefix = [self.model.config.image_token_id] * self.model.config.num_prefix_tokens
        if len(images) == 1:
            steps = [(images[0][s : s + BATCH], facts[0][s : s + BATCH]) for s in range(0, len(images[0]), BATCH)]
        else:
            steps = list(zip(zip(*images), zip(*facts)))
        for indices, texts in steps:
            inputs = self.pad([prefix + self.tokens(text) for text in texts])
            images_to_write = self.image(0, list(indices)) | {"gray": self.image(2, list(indices))["image"]}
            memory = self.model.write_memory(memory, **inputs, mm_encoder_outputs=images_to_write, labels=list(texts))
        return memory

    def lesson(self, rows: int, size: int, queries: int, kind: str) -> Lesson:
        """Teach R memories N facts each with names of a kind, and draw at most so many queries."""
        images = [self.choose(size) for _ in range(rows)]
        names = [self.draw.sample(self.names[kind], size) for _ in range(rows)]
        facts = [self.facts(*pair) for pair in zip(names, images)]
        memory = self.teach(images, facts)
        places = [(r, n) for r in range(rows) for n in range(size)]
        return Lesson(images, names, facts, memory, self.draw.sample(places, min(len(places), queries)))

    @torch.inference_mode()
    def scope(self, view: int | None, indices: list[int], memory, rows=None) -> torch.Tensor:
        """Compute the probability that the memory knows M images, or questions about them, (M,)."""
        probabilities = []
        for start in range(0, len(indices), BATCH):
            part = indices[start : start + BATCH]
            if view is None:
                inputs, features = self.pad(self.questions(part)), None
            else:
                inputs = {"input_ids": self.model.default_prompt(len(part)), "attention_mask": None}
                features = self.views[view][0][part]
            query = self.model.model.get_memory_query(inputs["input_ids"], inputs["attention_mask"], features)
            state = memory if rows is None else memory.select(rows[start : start + BATCH])
            probabilities.append(self.model.model.read_memory(state, query).scope_logits.sigmoid().cpu())
        return torch.cat(probabilities)

    def nearest(self, view: int, index: int, stored: list[int]) -> int:
        """Find the place in `stored` whose pooled features are closest to those of an image."""
        encoder = self.model.model.memory.key_encoder
        mean, std = encoder.feature_mean.float(), encoder.feature_std.float()
        x, y = ((t - mean) / std for t in (self.pooled[view][index], self.pooled[0][stored]))
        return int(F.cosine_similarity(x.unsqueeze(0), y).argmax())
