"""The terms of the loss.

A term turns a `Step`, one forward pass, into its value. The loss of an optimizer step must not depend on how its rows
are spread over micro-batches and ranks, so every term also says which share of that loss its value is:

    term                                      value                                    share
    lm, distill                               sum over tokens / tokens of the step     x ranks (gradients are averaged)
    align                                     InfoNCE of all pairs of the step         / micro-batches; gradient x ranks
    match, scope, reconstruction, key, *_kl   mean over the micro-batch                / micro-batches
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from ..model import in_float32
from .gradcache import PairCache, embedded_pairs, gather_pairs

EPISODE_LOSSES = ("memory_kl", "address_kl", "reconstruction", "scope", "key")
LOSSES = ("lm", "distill", "align", "match", *EPISODE_LOSSES)


@dataclass
class Step:
    """One forward pass, and its place in the optimizer step."""

    model: torch.nn.Module  # without wrappers
    inputs: dict[str, torch.Tensor]  # arguments of `forward`, of the batch
    options: dict[str, Any]  # arguments of `forward`, of the trainer
    accelerator: Any  # to gather from other ranks
    items: torch.Tensor | int | None = None  # labelled tokens of the step on all ranks; None: a mean over this batch
    micro_batches: int = 1  # their number, where their losses are summed
    ranks: int = 1  # their number, where gradients of sums over tokens are averaged over them
    pairs: PairCache | None = None  # embeddings of the step's pairs from a pass before this one
    episode_losses: dict[str, torch.Tensor] = field(default_factory=dict)  # of `memory_losses`
    captioned: torch.BoolTensor | None = None  # of `captioned_rows`; None: no episodes
    outputs: Any = None  # of `forward`; None where no term with a weight needs it


class Term:
    """A part of the loss that is a mean over the rows of a micro-batch.

    Called with a step it computes its value (); None where the batch has nothing to measure.
    """

    needs_forward = True

    def __init__(self, name: str, weight: float):
        self.name, self.weight = name, weight

    def share(self, value: torch.Tensor, step: Step) -> torch.Tensor:
        """Turn a value into its share of the optimizer step's loss."""
        return value / step.micro_batches

    def mean(self, value: torch.Tensor, step: Step) -> float:
        """Turn a value into the mean that is logged."""
        return value.item()

    def count(self, step: Step) -> int:
        """Count what `mean` is a mean of, for the mean over several batches."""
        return len(step.inputs["input_ids"])


class TokenTerm(Term):
    """A part of the loss: a mean over all labelled tokens of the optimizer step."""

    def share(self, value: torch.Tensor, step: Step) -> torch.Tensor:
        return value * step.ranks

    def mean(self, value: torch.Tensor, step: Step) -> float:
        return value.item() * step.ranks * step.micro_batches

    def count(self, step: Step) -> int:
        return int((step.inputs["labels"][:, 1:] != -100).sum())


class LanguageModelling(TokenTerm):
    """Cross-entropy of the next token."""

    def __call__(self, step: Step) -> torch.Tensor:
        return step.outputs.loss


class Distillation(TokenTerm):
    """KL(teacher || model) temperature^2 per token (Hinton et al., arXiv 1503.02531).

    Of episodes in the rows alone that have their image's caption: the teacher has no memory.
    """

    def __init__(self, name: str, weight: float, teacher: torch.nn.Module, temperature: float):
        super().__init__(name, weight)
        self.teacher, self.temperature = teacher, temperature

    def __call__(self, step: Step) -> torch.Tensor:
        # the teacher's logits at the same positions
        inputs = {k: v for k, v in step.inputs.items() if k != "labels"}
        inputs |= {k: v for k, v in step.options.items() if k == "logits_to_keep"}
        with torch.no_grad():
            target = self.teacher(**inputs, use_cache=False).logits  # (B, K, V)
        # both distributions at the labelled tokens
        labels = step.options.get("shift_labels")
        labels = F.pad(step.inputs["labels"], (0, 1), value=-100)[:, 1:] if labels is None else labels
        on = labels != -100
        if step.captioned is not None:
            pairs = pair_rows(step.model, step.inputs)
            on &= torch.zeros_like(pairs).masked_scatter(pairs, step.captioned).unsqueeze(1)
        log_p, log_q = (x[on].float().div(self.temperature).log_softmax(-1) for x in (target, step.outputs.logits))
        total = F.kl_div(log_q, log_p, reduction="sum", log_target=True) * self.temperature**2
        return total / (on.sum() if step.items is None else step.items)


class Alignment(Term):
    """InfoNCE of all pairs of the optimizer step; in evaluation of the batch's."""

    def __call__(self, step: Step) -> torch.Tensor | None:
        if step.outputs.image_embeds is None:
            return None
        pairs = embedded_pairs(step.outputs, step.captioned)
        if step.model.training:
            cache = step.pairs or gather_pairs(step.accelerator, [pairs.detach()])[0]
            pairs = cache.replace(pairs)
        return step.model.contrastive_loss(pairs[:, 0], pairs[:, 1]) if len(pairs) else None

    def share(self, value: torch.Tensor, step: Step) -> torch.Tensor:
        if not step.model.training:
            return value
        # every micro-batch and rank has the whole value, but only the gradient of its own pairs
        gradient = step.accelerator.num_processes * (value - value.detach())
        return value.detach() / step.micro_batches + gradient


class Matching(Term):
    """Binary cross-entropy of the fusion block's judgements; the hardest other image is of the micro-batch."""

    def __call__(self, step: Step) -> torch.Tensor | None:
        logits = step.outputs.match_logits
        return None if logits is None else match_loss(logits)  # a single pair has no other image


class EpisodeTerm(Term):
    """One of the memory's own losses; the negatives of `key` are of the micro-batch."""

    needs_forward = False

    def __call__(self, step: Step) -> torch.Tensor | None:
        return step.episode_losses.get(self.name)


def loss_terms(weights: dict[str, float], teacher=None, temperature: float = 1.0) -> list[Term]:
    """List the terms of a loss; the memory's are measured at any weight."""
    terms = [LanguageModelling("lm", weights.get("lm", 1.0))]
    if teacher is not None:
        terms.append(Distillation("distill", weights["distill"], teacher, temperature))
    terms += [Alignment("align", weights["align"])] if weights.get("align") else []
    terms += [EpisodeTerm(name, weights.get(name, 0.0)) for name in EPISODE_LOSSES]
    return terms + ([Matching("match", weights["match"])] if weights.get("match") else [])


def labelled_logits(labels: torch.Tensor) -> dict[str, Any]:
    """Spare the logits before the first labelled column: arguments of `forward` for labels (B, T)."""
    labelled = torch.nonzero((labels != -100).any(0)).flatten()
    if not len(labelled) or labelled[0] == 0:
        return {}
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    keep = labels.shape[1] - int(labelled[0]) + 1
    return {"logits_to_keep": keep, "shift_labels": shifted[:, -keep:].contiguous()}


def pair_rows(model, inputs: dict[str, torch.Tensor]) -> torch.BoolTensor:
    """Tell which rows have an image and a text, (B,)."""
    return (inputs["input_ids"] == model.config.image_token_id).any(1) & (inputs["labels"] != -100).any(1)


def match_loss(match_logits: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy () of `match_logits` (R, 2): a text's own image, then another."""
    target = torch.zeros_like(match_logits)
    target[:, 0] = 1
    return F.binary_cross_entropy_with_logits(match_logits.float(), target.float())


def scope_loss(scope_logits: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy () of "the query is known" (B,), balanced over both answers."""
    target = known.float()
    share = target.mean().clamp(1e-3, 1 - 1e-3)
    balance = torch.where(known, 0.5 / share, 0.5 / (1 - share))
    return F.binary_cross_entropy_with_logits(scope_logits, target, weight=balance)


def reconstruction_loss(content: torch.Tensor, target: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """1 - cosine () of read and stored contents (B, S x C) where known (B,)."""
    weight = known.float()
    similarity = F.cosine_similarity(content, target, dim=-1)
    return ((1 - similarity) * weight).sum() / weight.sum().clamp(min=1)


def key_loss(model, key_features: torch.Tensor) -> torch.Tensor:
    """InfoNCE () of the addresses of two views of P images; features as in `Episodes`."""
    memory = model.model.memory
    first, second, *gray = in_float32(memory.key_encoder, key_features)  # (P, C) each
    first = memory.written_keys(first, gray[0] if gray else None)
    return model.contrastive_loss(memory.address(first), memory.address(second))
