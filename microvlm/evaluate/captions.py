"""Score greedy captions against references."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..data.rows import decode_row
from ..metrics import ngram_scores, score

NEW_TOKENS = 32
CAPTIONERS = {"model": "model", "shuffled": "model, others' references", "nearest_neighbour": "nearest neighbour"}


@dataclass
class CaptionedRow:
    """One row: its image (3, height, width) uint8, greedy caption with its tokens, and own caption."""

    image: torch.Tensor
    ids: list[int]
    caption: str
    reference: str


@torch.inference_mode()
def captioned_rows(model, processor, rows, batch_size=16, max_new_tokens=NEW_TOKENS) -> Iterator[CaptionedRow]:
    """Caption rows of `load_rows` in batches; one batch of images is in memory."""
    for start in range(0, len(rows), batch_size):
        batch = rows.select(range(start, min(start + batch_size, len(rows))))
        images, references = zip(*(decode_row(row, processor.image_processor) for row in batch))
        pixel_values = processor.image_processor(list(images), return_tensors="pt")["pixel_values"]
        prompt = model.default_prompt(len(images))
        ids = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            pixel_values=pixel_values.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
        )[:, prompt.shape[1] :]
        captions = processor.batch_decode(ids, skip_special_tokens=True)
        for image, tokens, caption, reference in zip(images, ids.tolist(), captions, references):
            yield CaptionedRow(image, tokens, caption.strip(), reference)


def caption_rows(model, processor, rows, batch_size=16, max_new_tokens=NEW_TOKENS) -> tuple[list[str], list[str]]:
    """Write greedy captions of rows of `load_rows`; returns captions and references."""
    pairs = [(row.caption, row.reference) for row in captioned_rows(model, processor, rows, batch_size, max_new_tokens)]
    return [caption for caption, _ in pairs], [reference for _, reference in pairs]


def caption_scores(sets: dict[str, tuple[list[str], list[str]]]) -> tuple[dict, dict[str, str]]:
    """Score lists of raw captions with their references; returns scores, and reasons for what was not measured."""
    scores = {name: score(*captions) | ngram_scores(*captions) for name, captions in sets.items()}
    if any(len(references) > 1 for _, references in sets.values()):
        return scores, {}
    for values in scores.values():
        values["cider"] = None
    return scores, {"cider": "one picture: every word is in every reference, so all weights are 0"}
