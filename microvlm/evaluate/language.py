"""Score language modelling: loss, perplexity, bits per byte."""

import math

import torch
import torch.nn.functional as F

from ..data.collators import CaptionCollator
from ..data.rows import decode_row


class StrictCollator(CaptionCollator):
    """Collate captions; a row that cannot be read ends the evaluation instead of being skipped."""

    def read(self, row: dict) -> tuple[torch.Tensor, str]:
        return decode_row(row, self.processor.image_processor)


def reference_batches(model, processor, rows, batch_size: int):
    """Yield batches on the model's device, captions at the line ends, with the tokens of the longest one."""
    collator = StrictCollator(processor, model.default_prompt(1)[0].tolist())
    for start in range(0, len(rows), batch_size):
        batch = collator(list(rows.select(range(start, min(start + batch_size, len(rows))))))
        batch = {name: x.to(model.device) for name, x in batch.items()}
        yield batch, int((batch["labels"] != -100).sum(1).max())


@torch.inference_mode()
def teacher_forced(model, processor, rows, batch_size: int = 16, align: bool = True) -> dict[str, torch.Tensor]:
    """Compute the losses of N references, token by token after the image.

    Returns:
        `loss` (N,) float64, nats of a caption with its end token; `tokens` (N,); with `align` unit vectors
        `image_embeds` and `text_embeds` (N, C) of the alignment heads.
    """
    out = {"loss": [], "tokens": []} | ({"image_embeds": [], "text_embeds": []} if align else {})
    for batch, length in reference_batches(model, processor, rows, batch_size):
        image = {"image": model.get_image_features(batch.pop("pixel_values").to(model.dtype), return_dict=True)}
        # captions and images as pairs
        if align:
            pairs = model(**batch, mm_encoder_outputs=image, return_alignment="only", use_fusion=False)
            out["image_embeds"].append(pairs.image_embeds.float().cpu())
            out["text_embeds"].append(pairs.text_embeds.float().cpu())
        # the captions alone, at the line ends
        labels = batch.pop("labels")[:, -length:]
        logits = model(**batch, mm_encoder_outputs=image, logits_to_keep=length + 1).logits[:, :-1].float()
        loss = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
        out["loss"].append(loss.cpu().double().sum(1))
        out["tokens"].append((labels != -100).sum(1).cpu())
    return {name: torch.cat(values) for name, values in out.items()}


def language_scores(losses: torch.Tensor, tokens: torch.Tensor, captions: list[str]) -> dict[str, float]:
    """Compute lm_loss (nats a token), perplexity, bits_per_byte of UTF-8 and the number of tokens.

    Of N captions `losses` (N,) are nats, `tokens` (N,) numbers with the end token.
    """
    total, number = losses.double().sum(), int(tokens.sum())
    bits = float(total) / math.log(2) / sum(len(c.encode()) for c in captions)
    loss = total / number
    return {"lm_loss": float(loss), "perplexity": float(loss.exp()), "bits_per_byte": bits, "tokens": number}
