"""What the forward passes return."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

try:  # transformers 5.24: with the image encoder's outputs
    from transformers.modeling_outputs import (
        MultimodalBaseModelOutputWithPast as BaseOutput,
        MultimodalCausalLMOutputWithPast as CausalLMOutput,
    )
except ImportError:
    from transformers.modeling_outputs import (
        BaseModelOutputWithPast as BaseOutput,
        CausalLMOutputWithPast as CausalLMOutput,
    )


@dataclass
class MicroVLMImageFeatures(BaseModelOutputWithPooling):
    """Output of `get_image_features`.

    `last_hidden_state` has the vision features, class token first, (N, 1 + patches, vision width); `pooler_output` the
    prefix tokens, a tuple of N tensors (P, D); `attentions` has the pooling's alone, as a tuple.
    """

    pooling_attentions: torch.FloatTensor | None = None  # with `output_attentions`, (N, heads, P, patches)


@dataclass
class MicroVLMModelOutputWithPast(BaseOutput):
    """Output of `MicroVLMModel`; with a memory, `attentions` have its S columns behind the text's."""

    image_outputs: MicroVLMImageFeatures | None = None  # of the images in this call
    image_hidden_states: torch.FloatTensor | None = None  # prefix tokens (N, P, D) of the images in this call
    pooling_attentions: torch.FloatTensor | None = None  # see `MicroVLMImageFeatures`


@dataclass
class MicroVLMCausalLMOutputWithPast(CausalLMOutput):
    """Output of `MicroVLMForConditionalGeneration`; `logits` are (B, T or logits_to_keep, V)."""

    image_outputs: MicroVLMImageFeatures | None = None  # see `MicroVLMModelOutputWithPast`
    image_hidden_states: torch.FloatTensor | None = None
    pooling_attentions: torch.FloatTensor | None = None
    # with alignment: unit vectors (R, projection) of the R rows with an image and a text
    image_embeds: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None
    # (R, 2): the text belongs to its own image, to the most similar other
    match_logits: torch.FloatTensor | None = None
    # with a memory
    scope_probability: torch.FloatTensor | None = None  # that the memory knows the row's query, (B,)
    scope_logits: torch.FloatTensor | None = None
    memory_content: torch.FloatTensor | None = None  # what was read, (B, S, C)
    memory_kl: torch.FloatTensor | None = None  # divergence of memories and addresses from their priors, ()
    address_kl: torch.FloatTensor | None = None
