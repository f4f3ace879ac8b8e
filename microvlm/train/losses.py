"""Losses of training that the model itself has no use for: image-text matching, and the memory's own."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..model import MemoryReadout, contrastive_loss, in_float32


def match_loss(match_logits: torch.Tensor | None) -> torch.Tensor | None:
    """Binary cross-entropy () of `match_logits` (R, 2): a text's own image, then another; None without any."""
    if match_logits is None:
        return None
    target = torch.zeros_like(match_logits)
    target[:, 0] = 1
    return F.binary_cross_entropy_with_logits(match_logits.float(), target.float())


def alignment_loss(model, outputs) -> torch.Tensor | None:
    """Sum InfoNCE and, if the fusion block ran, the matching loss of a forward with `return_alignment`."""
    if outputs.image_embeds is None or not len(outputs.image_embeds):
        return None
    loss = model.contrastive_loss(outputs.image_embeds, outputs.text_embeds)
    match = match_loss(outputs.match_logits)
    return loss if match is None else loss + match


@dataclass
class Episodes:
    """Facts that are written to G memories, and B queries that ask for them; every B / G neighbours ask one memory.

    Args:
        input_ids, attention_mask: queries (B, T), where the mask is 1.
        vision_features: of their images, (N, 1 + patches, vision width).
        support_features: key features of the facts (G, N, 1 or 2, 2 x vision width), the second of the grey copy.
        support_tokens: their sentences (G, N, L), then -1; facts are those with `support_active` (G, N).
        target_tokens: the sentence a query asks for, (B, L); `known` (B,): it was written.
        key_features: P images: one view, another and, if there is one, the grey copy, (2 or 3, P, 2 x vision width).
    """

    input_ids: torch.LongTensor
    attention_mask: torch.Tensor
    vision_features: torch.FloatTensor
    support_features: torch.FloatTensor
    support_tokens: torch.LongTensor
    support_active: torch.BoolTensor
    target_tokens: torch.LongTensor
    known: torch.BoolTensor
    key_features: torch.FloatTensor


def memory_losses(model, episodes: Episodes) -> tuple[MemoryReadout, dict[str, torch.Tensor]]:
    """Write episodes and read them with a batch's queries, in one graph.

    Half of the rows see the memory through ScopeNet's soft gate, the other half as in inference: on where the query
    was written, off where it was not.

    Returns:
        The read-out for `forward`, and the losses: `scope`, `reconstruction`, `key`, `memory_kl`, `address_kl`.
    """
    part, known = model.require_memory(), episodes.known
    G, N = episodes.support_active.shape
    # encode and write the facts
    contents = model.encode_contents(torch.cat([episodes.support_tokens.flatten(0, 1), episodes.target_tokens]))
    supports, targets = contents[: G * N].view(G, N, -1), contents[G * N :]  # (G, N, S x C), (B, S x C)
    state = part.new_state(G, dtype=torch.float32, device=supports.device)
    keys, *gray_keys = in_float32(part.key_encoder, episodes.support_features).unbind(2)  # (G, N, C) each
    keys = part.written_keys(keys, gray_keys[0] if gray_keys else None)
    state = part.write(state, keys, supports, active=episodes.support_active, method="direct")
    # read them, half of the rows with the gate of inference
    query = model.model.get_memory_query(episodes.input_ids, episodes.attention_mask, episodes.vision_features)
    readout = model.model.read_memory(state, query)
    hard = torch.zeros_like(readout.log_gate).masked_fill(~known, -torch.inf)
    readout.log_gate = torch.where(torch.rand_like(hard) < 0.5, hard, readout.log_gate)
    return readout, {
        "scope": scope_loss(readout.scope_logits, known),
        "reconstruction": reconstruction_loss(readout.content.flatten(1), targets, known),
        "key": key_loss(model, episodes.key_features),
        "memory_kl": readout.memory_kl,
        "address_kl": readout.address_kl,
    }


def scope_loss(scope_logits: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy () of "the query is known" (B,), with known and unknown rows in balance."""
    target = known.float()
    share = target.mean().clamp(1e-3, 1 - 1e-3)
    balance = torch.where(known, 0.5 / share, 0.5 / (1 - share))
    return F.binary_cross_entropy_with_logits(scope_logits, target, weight=balance)


def reconstruction_loss(content: torch.Tensor, target: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """1 - cosine of read and stored contents (B, S x C), averaged over the known rows (B,)."""
    weight = known.float()
    similarity = F.cosine_similarity(content, target, dim=-1)
    return ((1 - similarity) * weight).sum() / weight.sum().clamp(min=1)


def key_loss(model, key_features: torch.Tensor) -> torch.Tensor:
    """InfoNCE of the addresses that two views of P images get; features (2 or 3, P, 2 x vision width)."""
    part = model.model.memory
    first, second, *gray = in_float32(part.key_encoder, key_features)  # (P, C) each
    first = part.written_keys(first, gray[0] if gray else None)
    return contrastive_loss(part.address(first), part.address(second), model.config.alignment_config.temperature)
