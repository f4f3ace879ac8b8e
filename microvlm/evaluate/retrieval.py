"""Score retrieval between images and captions."""

import math

import torch

from ..metrics import retrieval_recalls

RANKS = (1, 5, 10)
RETRIEVAL_POOL = 5000  # images, the first ones of a larger set


def retrieval_scores(model, image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> tuple[dict, dict[str, str]]:
    """Compute recalls both ways and the InfoNCE loss of R pairs (R, C), and reasons for what was not measured."""
    # recall at k among k images is no score
    R, missing = len(image_embeds), {}
    ranks = [k for k in RANKS if k < R]
    for k in RANKS[len(ranks) :]:
        missing[f"recall at {k}"] = f"among {R} pictures it is always 1"
    recalls = retrieval_recalls(image_embeds, text_embeds, RANKS)
    if not (image_embeds.isfinite().all() and text_embeds.isfinite().all()):
        recalls = dict.fromkeys(recalls, math.nan)  # nothing is nearer than NaN: every recall would be 1
    out = {"pairs": R} | {name: v if int(name.rpartition("_")[2]) in ranks else None for name, v in recalls.items()}
    if R == 1:
        missing["alignment_loss"] = "one pair has no negatives"
        return out | {"alignment_loss": None, "chance_loss": None}, missing
    loss = float(model.contrastive_loss(image_embeds, text_embeds))
    return out | {"alignment_loss": loss, "chance_loss": math.log(R)}, missing
