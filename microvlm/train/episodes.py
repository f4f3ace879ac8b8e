"""Teach the memory: write facts and read them with queries, in one graph."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..data.augment import gray_copy
from ..model import in_float32
from .losses import key_loss, pair_rows, reconstruction_loss, scope_loss

FORWARD_INPUTS = ("input_ids", "attention_mask", "labels", "pixel_values", "mm_encoder_outputs")


@dataclass
class Episodes:
    """Facts for G memories, and B queries; every B / G neighbours ask one memory."""

    input_ids: torch.LongTensor  # queries (B, T), where the mask is 1
    attention_mask: torch.Tensor
    vision_features: torch.FloatTensor  # of their images, (N, 1 + patches, vision width)
    support_features: torch.FloatTensor  # keys of the facts (G, N, 1 or 2, 2 x vision width), the second of a grey copy
    support_tokens: torch.LongTensor  # their sentences (G, N, L), then -1
    support_active: torch.BoolTensor  # which are facts, (G, N)
    target_tokens: torch.LongTensor  # the sentence a query asks for, (B, L)
    known: torch.BoolTensor  # whether it was written, (B,)
    key_features: torch.FloatTensor  # P images: a view, another, perhaps the grey copy, (2 or 3, P, 2 x vision width)


EPISODE_INPUTS = tuple(Episodes.__dataclass_fields__)[3:]  # of a batch with features


def split_inputs(model, batch: dict[str, Any]) -> tuple[dict[str, Any], Episodes | None]:
    """Split a batch into arguments of `forward` and its episodes, if it has any."""
    inputs = {k: v for k, v in batch.items() if k in FORWARD_INPUTS}
    features = batch.get("vision_features")
    episodes = {k: v for k, v in batch.items() if k in EPISODE_INPUTS}
    if "support_pixel_values" in batch:
        features, support, pairs = encode_images(model, inputs.pop("pixel_values"), batch["support_pixel_values"])
        support = support.unflatten(0, batch["support_active"].shape)
        episodes |= {"support_features": support, "key_features": pairs}
    if episodes:
        question = inputs["attention_mask"] * (inputs["labels"] == -100)  # without the answer
        episodes = Episodes(inputs["input_ids"], question, features, **episodes)
    if features is not None and len(features):
        inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(last_hidden_state=features)}
    return inputs, episodes or None


def captioned_rows(model, inputs: dict[str, Any], episodes: Episodes) -> torch.BoolTensor:
    """Tell which of the R rows with an image and a text have its caption and not a fact, (R,)."""
    return ~episodes.known[pair_rows(model, inputs)]


def encode_images(model, queries: torch.Tensor, supports: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Encode images (B, 3, H, W) in one pass: the queries' features, and keys and pairs of keys as in `Episodes`."""
    images = [queries, supports]
    if model.config.memory_config.gray_weight:
        images.append(gray_copy(supports))
    hidden = model.model.vision_tower(torch.cat(images), do_pooling=False).last_hidden_state
    skip, pool = model.model.vision_tower.num_prefix_tokens, model.model.memory.key_encoder.pool
    query, *support = (pool(part, skip) for part in hidden.split(len(supports)))
    return hidden[: len(supports)], torch.stack(support, 1), torch.stack([support[0], query, *support[1:]])


def memory_losses(model, episodes: Episodes) -> tuple[Any, dict[str, torch.Tensor]]:
    """Write episodes and read them with queries: the read-out, and the memory's losses."""
    memory, known = model.model.memory, episodes.known
    G, N = episodes.support_active.shape
    # encode and write the facts
    contents = model.encode_contents(torch.cat([episodes.support_tokens.flatten(0, 1), episodes.target_tokens]))
    supports, targets = contents[: G * N].view(G, N, -1), contents[G * N :]  # (G, N, S x C), (B, S x C)
    state = memory.new_state(G, dtype=torch.float32, device=supports.device)
    keys, *gray = in_float32(memory.key_encoder, episodes.support_features).unbind(2)  # (G, N, C) each
    keys = memory.written_keys(keys, gray[0] if gray else None)
    state = memory.write(state, keys, supports, active=episodes.support_active, method="direct")
    # read them: half of the rows see the memory through ScopeNet's soft gate, the other half as in inference: on where
    # the query was written, off where it was not; ScopeNet learns from what was written alone, not from the words
    query = model.model.get_memory_query(episodes.input_ids, episodes.attention_mask, episodes.vision_features)
    readout = model.model.read_memory(state, query)
    hard = torch.zeros_like(readout.log_gate).masked_fill(~known, -torch.inf)
    readout.log_gate = torch.where(torch.rand_like(hard) < 0.5, hard, readout.log_gate.detach())
    return readout, {
        "scope": scope_loss(readout.scope_logits, known),
        "reconstruction": reconstruction_loss(readout.content.flatten(1), targets, known),
        "key": key_loss(model, episodes.key_features),
        "memory_kl": readout.memory_kl,
        "address_kl": readout.address_kl,
    }
