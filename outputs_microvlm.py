"""What the forward passes return, and the logits of text models that scale or cap them."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling, MoeModelOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

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


class DecodedText:
    """Stand for a text model of transformers that has run its decoder: its `forward` then makes logits.

    What it reads besides `model` and `lm_head`, such as a scale or a cap, is in its config.
    """

    def __init__(self, config: PreTrainedConfig, hidden_states: torch.FloatTensor, lm_head: nn.Module):
        self.config, self.hidden_states, self.lm_head, self.model = config, hidden_states, lm_head, self

    def __getattr__(self, name: str):
        return getattr(self.config, name)

    def __call__(self, **kwargs) -> MoeModelOutputWithPast:
        outputs = MoeModelOutputWithPast(last_hidden_state=self.hidden_states)
        outputs.shared_kv_states = None  # Gemma 4's
        return outputs

    def logits(self) -> torch.FloatTensor:
        text = MODEL_FOR_CAUSAL_LM_MAPPING[type(self.config)]
        return text.forward(self, inputs_embeds=self.hidden_states, return_dict=True, output_router_logits=False).logits

    @classmethod
    def changes(cls, config: PreTrainedConfig) -> bool:
        """Whether logits are more than what the head gives, seen on a head that changes nothing."""
        probe, head = torch.tensor([[[-50.0, 1.0, 50.0]]], dtype=torch.float32, device="cpu"), nn.Identity()
        head.weight = probe  # whose dtype some ask for
        try:
            return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not cls(config, probe, head).logits().equal(probe)
        except (AttributeError, TypeError) as error:
            raise ValueError(f"text model {config.model_type!r} makes logits with other parts ({error})") from error
