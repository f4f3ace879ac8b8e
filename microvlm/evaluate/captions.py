"""Score greedy captions against references."""

import torch

from ..data.rows import decode_row
from ..metrics import meteor, ngram_scores, score

NEW_TOKENS = 32
CAPTIONERS = {"model": "model", "shuffled": "model, others' references", "nearest_neighbour": "nearest neighbour"}


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


def caption_scores(
    sets: dict[str, tuple[list[str], list[str]]], with_meteor: bool = True
) -> tuple[dict, dict[str, str]]:
    """All caption scores of several lists of captions, and what was not measured with its reason.

    Args:
        sets: name -> captions and references, both raw.
        with_meteor: METEOR takes seconds to start.
    """
    missing, out = {}, {}
    for name, (candidates, references) in sets.items():
        out[name] = score(candidates, references) | ngram_scores(candidates, references)
        if len(references) == 1:
            out[name]["cider"] = None
    if len(next(iter(sets.values()))[1]) == 1:
        missing["cider"] = "one picture: every word is in every reference, so all weights are 0"
    try:
        if not with_meteor:
            raise RuntimeError("--no-meteor")
        for name, (candidates, references) in sets.items():
            out[name]["meteor"] = meteor(candidates, references)
    except RuntimeError as error:
        missing["meteor"] = str(error)
        for scores in out.values():
            scores["meteor"] = None
    return out, missing
