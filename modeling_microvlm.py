"""MicroVLM: a tiny vision-language model.

The way of the data, top to bottom (B rows, N pictures, T text positions, P = 25 prefix tokens, D text width, V vocabulary):

    pixel_values (N, 3, 224, 224)
      -> vision tower    196 patch features                (N, 196, 192)
      -> adapter         MLP, then P learned queries pool   (N, P, D)
      -> sequence        take the image placeholders' place (B, T, D)
      -> language model  any causal decoder                 (B, T, D)
      -> lm_head                                            (B, T, V)

Pictures of all rows lie one after the other in `pixel_values`; a row has as many as `input_ids` has runs of P placeholders. The
alignment head beside this path projects pictures and texts into one space for the contrastive loss; it never touches the logits.
"""

import hashlib
import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModel,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
    TimmWrapperModel,
    initialization as init,
)
from transformers.activations import ACT2FN
from transformers.generation.logits_process import (
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    SuppressTokensLogitsProcessor,
)
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .cache_microvlm import CACHE_NAME, MemoryCache, memory_mask, one_cache
from .configuration_microvlm import MicroVLMAdapterConfig, MicroVLMConfig, naming_section
from .decoder_microvlm import PackedDecoder, versions
from .kernels_microvlm import kernel_threads
from .memory_microvlm import (
    EpisodicMemory,
    MemoryContentEncoder,
    MemoryProjection,
    MemoryQuery,
    MemoryReadout,
    ScopeNet,
    in_float32,
    scope_threshold,
)
from .memory_posterior_microvlm import address_kl
from .memory_state_microvlm import MemoryState
from .quantization_microvlm import PackedEmbedding, register_quantizer, replace_with_ternary

# A decoder whose head does more than one linear map would give wrong logits here, so it is refused.
UNSUPPORTED_HEAD_ATTRIBUTES = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")
# What `forward` hands on to the language model and the loss; any other name is a mistake, and is refused.
FORWARD_KWARGS = TransformersKwargs.__optional_keys__ | {"use_cache", "token_type_ids", "shift_labels", "ignore_index"}
FAST_KWARGS = {"use_cache", "return_dict", "shift_labels", "ignore_index", "num_items_in_batch"}
# Values of the memory's config on which addresses, contents and the posterior depend, besides weights.
FINGERPRINT_FIELDS = (
    "num_slots",
    "code_size",
    "num_content_slots",
    "max_content_tokens",
    "addressing",
    "address_ridge",
    "address_temperature",
    "ben_cohen_steps",
    "observation_noise",
    "ordering",
    "gray_weight",
)


@dataclass
class MicroVLMImageFeatures(BaseModelOutputWithPooling):
    """Output of `get_image_features`.

    Args:
        last_hidden_state: vision features, class token first, (N, 1 + patches, vision width).
        pooler_output: prefix tokens, a tuple of N tensors (P, D).
        pooling_attentions: attention of the P queries over the patches, (N, heads, P, patches), with `output_attentions`.
    """

    pooling_attentions: torch.FloatTensor | None = None


@dataclass
class MicroVLMModelOutputWithPast(BaseModelOutputWithPast):
    """Output of `MicroVLMModel`.

    Args:
        image_hidden_states: prefix tokens (N, P, D) of the pictures in this call.
        pooling_attentions: see `MicroVLMImageFeatures`.
    """

    image_hidden_states: torch.FloatTensor | None = None
    pooling_attentions: torch.FloatTensor | None = None


@dataclass
class MicroVLMCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Output of `MicroVLMForConditionalGeneration`.

    Args:
        loss: language-modelling loss (), when `labels` are given.
        logits: (B, T or logits_to_keep, V).
        image_hidden_states: prefix tokens (N, P, D) of the pictures in this call.
        pooling_attentions: attention of the P queries over the patches, (N, heads, P, patches), with `output_attentions`.
        image_embeds: pictures in the shared space, unit length, one per row that has a picture and a text (R, projection), with
            `return_alignment`.
        text_embeds: texts of those rows, unit length, (R, projection).
        match_logits: logit of "text r belongs to picture c" (R, 2): the pair itself, and the text with the most similar other
            picture of the batch; with `use_fusion` and two such rows or more.
        scope_probability: that the memory knows the row's query (B,), with `memory`.
        scope_logits: their logits (B,).
        memory_content: what was read, (B, S, C), with `memory`.
        memory_kl: of the memories from their prior, mean over rows (), per entry; with `memory`.
        address_kl: of the queries' addresses from their prior, mean over rows (), per slot; with `memory`.
    """

    image_hidden_states: torch.FloatTensor | None = None
    pooling_attentions: torch.FloatTensor | None = None
    image_embeds: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None
    match_logits: torch.FloatTensor | None = None
    scope_probability: torch.FloatTensor | None = None
    scope_logits: torch.FloatTensor | None = None
    memory_content: torch.FloatTensor | None = None
    memory_kl: torch.FloatTensor | None = None
    address_kl: torch.FloatTensor | None = None


def contrastive_loss(image_embeds: torch.Tensor, text_embeds: torch.Tensor, temperature: float) -> torch.Tensor:
    """Symmetric InfoNCE (CLIP, arXiv 2103.00020) of R pairs; the other rows are the negatives.

    Args:
        image_embeds: unit vectors (R, C).
        text_embeds: unit vectors (R, C).
        temperature: the similarities are divided by it.

    Returns:
        The mean loss (), float32.
    """
    similarity = image_embeds.float() @ text_embeds.float().mT / temperature  # (R, R)
    target = torch.arange(len(similarity), device=similarity.device)
    return (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.mT, target)) / 2


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over positions of (R, T, C) where mask (R, T) is set; every row needs one position."""
    weight = mask.to(x.dtype).unsqueeze(-1)
    return (x * weight).sum(1) / weight.sum(1)


class MicroVLMAdapter(nn.Module):
    """Patch features (N, patches, vision width) -> prefix tokens (N, P, D).

    The features are standardised per channel with statistics of the training pictures (`patch_mean`, `patch_std`, set once by
    `calibrate`), go through an MLP and are pooled by P learned queries. The queries begin small, so that each starts as
    the mean of all patches and training sharpens it; with unit-variance queries a decoder learns to ignore the picture first.
    """

    def __init__(self, config: MicroVLMAdapterConfig, hidden_size: int):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.head_dim = hidden_size // config.num_attention_heads
        self.register_buffer("patch_mean", torch.zeros(config.vision_hidden_size))
        self.register_buffer("patch_std", torch.ones(config.vision_hidden_size))
        self.fc1 = nn.Linear(config.vision_hidden_size, config.mlp_hidden_size)
        self.act = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.dropout)
        self.fc2 = nn.Linear(config.mlp_hidden_size, hidden_size)
        self.query_tokens = nn.Parameter(torch.empty(config.num_prefix_tokens, hidden_size))
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size)

    @torch.no_grad()
    def calibrate(self, patch_features: torch.Tensor) -> None:
        """Take mean and standard deviation per channel from sample features (..., vision width)."""
        flat = patch_features.reshape(-1, patch_features.shape[-1]).float()
        self.patch_mean.copy_(flat.mean(0))
        self.patch_std.copy_(flat.std(0).clamp(min=1e-4))

    def project(self, patches: torch.Tensor) -> torch.Tensor:
        """Patch features, standardised and through the MLP: what the queries read, (N, patches, D)."""
        x = (patches - self.patch_mean) / self.patch_std
        return self.fc2(self.dropout(self.act(self.fc1(x))))

    def forward(
        self, patches: torch.Tensor, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the prefix tokens (N, P, D) and, if asked, the attention (N, heads, P, patches)."""
        N, x = patches.shape[0], self.project(patches)
        split = lambda t: t.view(t.shape[0], -1, self.num_heads, self.head_dim).transpose(1, 2)  # noqa: E731
        q = split(self.q_proj(self.query_tokens).unsqueeze(0)).expand(N, -1, -1, -1)  # (N, heads, P, head_dim)
        k, v = split(self.k_proj(x)), split(self.v_proj(x))  # (N, heads, patches, head_dim)
        attention = None
        if output_attentions:
            attention = (q @ k.mT / math.sqrt(self.head_dim)).softmax(-1)
            pooled = attention.to(v.dtype) @ v
        else:
            pooled = F.scaled_dot_product_attention(q, k, v)
        pooled = pooled.transpose(1, 2).reshape(N, -1, self.num_heads * self.head_dim)
        return self.norm(self.query_tokens + self.out_proj(pooled)), attention


class MicroVLMFusionLayer(nn.Module):
    """Pre-norm cross-attention of text over prefix tokens, then an MLP."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size)
        self.attention = nn.MultiheadAttention(hidden_size, num_heads, batch_first=True)
        self.norm2 = nn.LayerNorm(hidden_size)
        self.fc1 = nn.Linear(hidden_size, 4 * hidden_size)
        self.fc2 = nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, text: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
        text = text + self.attention(self.norm1(text), prefix, prefix, need_weights=False)[0]
        return text + self.fc2(F.gelu(self.fc1(self.norm2(text))))


class MicroVLMFusion(nn.Module):
    """Cross-modal block that judges whether a text belongs to a picture (image-text matching, ALBEF, arXiv 2107.07651)."""

    def __init__(self, hidden_size: int, num_layers: int, num_heads: int):
        super().__init__()
        self.layers = nn.ModuleList([MicroVLMFusionLayer(hidden_size, num_heads) for _ in range(num_layers)])
        self.norm = nn.LayerNorm(hidden_size)
        self.match = nn.Linear(hidden_size, 1)

    def forward(self, text: torch.Tensor, text_mask: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
        """Logits (R,) for texts (R, T, D) with mask (R, T) and prefix tokens (R, P, D)."""
        for layer in self.layers:
            text = layer(text, prefix)
        return self.match(masked_mean(self.norm(text), text_mask)).squeeze(-1)


class MicroVLMAlignment(nn.Module):
    """Projects pooled prefix tokens and pooled text embeddings (R, D) to unit vectors (R, projection)."""

    def __init__(self, hidden_size: int, projection_size: int):
        super().__init__()
        self.image_norm = nn.LayerNorm(hidden_size)
        self.image_proj = nn.Linear(hidden_size, projection_size)
        self.text_norm = nn.LayerNorm(hidden_size)
        self.text_proj = nn.Linear(hidden_size, projection_size)

    def embed_image(self, pooled: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.image_proj(self.image_norm(pooled)), dim=-1)

    def embed_text(self, pooled: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.text_proj(self.text_norm(pooled)), dim=-1)


class MicroVLMVisionTower(TimmWrapperModel):
    """A timm model (N, 3, height, width) -> (N, 1 + patches, vision width); of a convnet's map every place is a patch, with no token before."""

    _no_split_modules = ["MicroVLMVisionTower"]  # FSDP looks the classes up by name, and the parent names itself

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: a vision transformer's class token."""
        return getattr(self.timm_model, "num_prefix_tokens", 0)

    def forward(self, pixel_values: torch.FloatTensor, **kwargs):
        out = super().forward(pixel_values, **kwargs)
        hidden = out[0]  # a tuple without return_dict
        if hidden.ndim == 4:  # (N, width, rows, columns)
            tokens = hidden.flatten(2).mT.contiguous()
            if isinstance(out, tuple):
                return (tokens, *out[1:])
            out.last_hidden_state = tokens
        return out

    def train(self, mode: bool = True):
        """As the parent; a tower of which nothing trains keeps to evaluation: a convnet's running statistics are frozen with it."""
        return super().train(mode and any(p.requires_grad for p in self.parameters()))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        for name, parameter in module.named_parameters(recurse=False):
            if name not in ("weight", "bias"):  # class token, position embedding: the parent leaves them as allocated
                init.normal_(parameter, std=self.config.initializer_range)


class MicroVLMPreTrainedModel(PreTrainedModel):
    config_class = MicroVLMConfig
    config: MicroVLMConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["MicroVLMAdapter"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Open a checkpoint like `super()`, packed ones with the quantizer of this copy of the code."""
        register_quantizer()
        return super().from_pretrained(*args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MicroVLMAdapter):
            init.zeros_(module.patch_mean)
            init.ones_(module.patch_std)
            init.normal_(module.query_tokens, std=self.config.initializer_range)
            for linear in (module.fc1, module.fc2, module.v_proj, module.out_proj):
                init.xavier_uniform_(linear.weight)
        elif isinstance(module, EpisodicMemory):
            init.orthogonal_(module.reference)
            init.constant_(module.address_log_variance, -6.0)
            init.zeros_(module.key_encoder.feature_mean)
            init.ones_(module.key_encoder.feature_std)
            init.ones_(module.word_weight)
            for linear in (module.key_encoder.image_skip, module.key_encoder.image_fc1):
                init.xavier_uniform_(linear.weight)
        elif isinstance(module, MemoryContentEncoder):
            S, L = module.position_bias.shape
            init.normal_(module.slot_queries, std=self.config.initializer_range)
            distance = (torch.arange(S).view(-1, 1) - torch.arange(L)).abs().clamp(max=1)
            init.copy_(module.position_bias, -6.0 * distance)
            init.copy_(module.v_proj.weight, torch.eye(*module.v_proj.weight.shape))
        elif isinstance(module, MemoryProjection):
            init.normal_(module.token_bias, std=0.2)
            init.xavier_uniform_(module.up.weight)
        elif isinstance(module, nn.LSTM):
            for parameter in module.parameters():
                init.uniform_(parameter, -(module.hidden_size**-0.5), module.hidden_size**-0.5)
        elif isinstance(module, nn.MultiheadAttention):
            init.xavier_uniform_(module.in_proj_weight)
            init.zeros_(module.in_proj_bias)


class MicroVLMModel(MicroVLMPreTrainedModel):
    """Vision tower, adapter, language model without its head, and the alignment modules."""

    def __init__(self, config: MicroVLMConfig):
        super().__init__(config)
        for name in UNSUPPORTED_HEAD_ATTRIBUTES:
            if getattr(config.text_config, name, None) not in (None, 1, 1.0):
                raise ValueError(
                    f"text model {config.text_config.model_type!r} has {name}={getattr(config.text_config, name)}: "
                    "its head is more than one linear map, which MicroVLM does not support."
                )
        hidden_size = config.text_config.hidden_size
        with naming_section("vision_config"):
            self.vision_tower = MicroVLMVisionTower._from_config(config.vision_config)
        vision_width = self.vision_tower.timm_model.num_features
        if vision_width != config.adapter_config.vision_hidden_size:
            raise ValueError(
                f"adapter_config.vision_hidden_size is {config.adapter_config.vision_hidden_size}, but "
                f"{config.vision_config.architecture} has features of width {vision_width}."
            )
        with naming_section("adapter_config"):
            self.adapter = MicroVLMAdapter(config.adapter_config, hidden_size)
        with naming_section("text_config"):
            self.language_model = AutoModel.from_config(config.text_config)
        if missing := [name for name in ("embed_tokens", "layers", "norm") if not hasattr(self.language_model, name)]:
            raise ValueError(
                f"text model {config.text_config.model_type!r} has no {missing[0]}: MicroVLM takes decoders that are built like Llama."
            )
        self.alignment = MicroVLMAlignment(hidden_size, config.alignment_config.projection_size)
        self.fusion = None
        if config.use_fusion:
            alignment = config.alignment_config
            self.fusion = MicroVLMFusion(hidden_size, alignment.fusion_num_layers, alignment.fusion_num_attention_heads)
        self.memory = self.memory_projection = self.scope = None
        if config.use_memory:
            text = config.text_config
            head_dim = getattr(text, "head_dim", None) or hidden_size // text.num_attention_heads
            self.memory = EpisodicMemory(config.memory_config, vision_width, hidden_size, text.vocab_size)
            self.memory_projection = MemoryProjection(
                config.memory_config,
                text.num_hidden_layers,
                getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
                head_dim,
            )
            self.scope = ScopeNet(config.memory_config)
        if config.qat_config.ternary_modules:
            with naming_section("qat_config"):
                replace_with_ternary(
                    self,
                    config.qat_config.ternary_modules,
                    ternary_weights=config.qat_config.ternary_weights == "absmean",
                    activation_bits=config.qat_config.activation_bits,
                    group_size=config.qat_config.group_size,
                )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.FloatTensor, **kwargs: Unpack[TransformersKwargs]
    ) -> MicroVLMImageFeatures:
        """Prefix tokens of pictures.

        Args:
            pixel_values: (N, 3, height, width), normalised by the image processor.
            output_attentions: also return the pooling attention; default: the config's.
            output_hidden_states: also return the feature maps of the vision tower's layers; default: the config's.
        """
        # no names of their own in the signature: generate() takes every name in it away from the decoder
        output_attentions = kwargs.get("output_attentions")
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = kwargs.get("output_hidden_states")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if pixel_values.ndim != 4 or not len(pixel_values):
            raise ValueError(
                f"pixel_values must have the shape (pictures, channels, height, width), got {tuple(pixel_values.shape)}."
            )
        vision = self.vision_tower(
            pixel_values,
            output_attentions=False,  # timm has none
            output_hidden_states=output_hidden_states,
            do_pooling=False,
            return_dict=True,
        )
        image = self.pool_image_features(vision.last_hidden_state, output_attentions)
        image.hidden_states = vision.hidden_states
        return image

    def pool_image_features(
        self, vision_features: torch.FloatTensor, output_attentions: bool = False
    ) -> MicroVLMImageFeatures:
        """Prefix tokens from features of the vision tower, class token first, (N, 1 + patches, vision width)."""
        skip = self.vision_tower.num_prefix_tokens  # the class token
        prefix, attention = self.adapter(vision_features[:, skip:], output_attentions=output_attentions)
        return MicroVLMImageFeatures(
            last_hidden_state=vision_features, pooler_output=tuple(prefix), pooling_attentions=attention
        )

    def get_placeholder_mask(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.FloatTensor,
        image_features: torch.FloatTensor | None = None,
    ) -> torch.BoolTensor:
        """Mask (B, T, 1) of the image placeholders.

        Raises:
            ValueError: their number is not the number of prefix tokens in `image_features` (N, P, D) or (N x P, D).
        """
        if input_ids is None:
            token = torch.tensor(self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(token)).all(-1)
        else:
            mask = input_ids == self.config.image_token_id
        if image_features is not None and not torch.compiler.is_compiling():
            found, given, P = int(mask.sum()), image_features[..., 0].numel(), self.config.num_prefix_tokens
            if found != given:
                raise ValueError(
                    f"Image features and image tokens do not match: {given // P} pictures need {given} placeholders "
                    f"({P} each), the text has {found}."
                )
        return mask.unsqueeze(-1).to(inputs_embeds.device)

    def count_pictures(self, input_ids: torch.LongTensor) -> torch.LongTensor:
        """Pictures of each row (B,), by its placeholders.

        Raises:
            ValueError: a row with another number of placeholders than a multiple of P.
        """
        P, found = self.config.num_prefix_tokens, (input_ids == self.config.image_token_id).sum(1)
        if not torch.compiler.is_compiling() and bool((found % P).any()):
            row = int((found % P).nonzero()[0])
            raise ValueError(f"row {row} has {int(found[row])} image placeholders, a picture needs {P}.")
        return found // P

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        mm_encoder_outputs: dict[str, MicroVLMImageFeatures] | None = None,
        memory_readout: MemoryReadout | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> MicroVLMModelOutputWithPast:
        past_key_values = one_cache(past_key_values, cache)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if pixel_values is not None and mm_encoder_outputs:
            raise ValueError("You cannot specify both pixel_values and mm_encoder_outputs at the same time")
        if unknown := sorted(kwargs.keys() - FORWARD_KWARGS):
            raise TypeError(f"forward() got unexpected keyword arguments: {', '.join(unknown)}")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if inputs_embeds.shape[0] == 0:
            raise ValueError("The batch is empty: input_ids has no rows.")

        image = (mm_encoder_outputs or {}).get("image")
        if image is None and pixel_values is not None:
            image = self.get_image_features(
                pixel_values, output_attentions=kwargs.get("output_attentions"), return_dict=True
            )
        prefix = pooling_attentions = None
        if image is not None and image.pooler_output is None:  # features of a frozen vision tower
            image = self.pool_image_features(image.last_hidden_state, bool(kwargs.get("output_attentions")))
        if image is not None:
            prefix = torch.stack(tuple(image.pooler_output)).to(inputs_embeds.device, inputs_embeds.dtype)  # (N, P, D)
            pooling_attentions = image.pooling_attentions
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, prefix)
            inputs_embeds = inputs_embeds.masked_scatter(mask, prefix)
            if (
                input_ids is not None and image.last_hidden_state is not None
            ):  # not the rest of a prompt that is cached in part
                self.count_pictures(input_ids)

        if memory_readout is not None:
            past_key_values, kwargs["use_cache"] = self._attach(
                memory_readout, past_key_values, kwargs.get("use_cache")
            )
        # padding does not count: memory tokens have no position, so how far the text stands from its beginning matters, now or in a later pass
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            T, past = inputs_embeds.shape[1], 0 if past_key_values is None else past_key_values.get_seq_length()
            place = past + torch.arange(T, device=attention_mask.device)  # the mask may be as long as the cache can get
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, place]
        replayed = []  # layers that may read the memory again, in the replay of a checkpoint
        if self._is_checkpointing and isinstance(past_key_values, MemoryCache) and past_key_values.is_read_only:
            replayed = list(self.language_model.layers)
        for layer in replayed:
            layer._can_checkpoint_with_cache = True
        try:
            decoder, extra = self.packed_decoder(), {"return_dict": True, **kwargs}
            if decoder is not None and (past_key_values is None or not past_key_values.get_seq_length()):
                decoder = self.packed_decoder(checked=True)
            if (
                decoder is not None
                and not inputs_embeds.requires_grad
                and not any(v is not None and v is not False for k, v in extra.items() if k not in FAST_KWARGS)
            ):
                decode, extra = decoder, {"use_cache": kwargs.get("use_cache")}
            else:
                decode = self.language_model
                if isinstance(past_key_values, MemoryCache) and past_key_values.num_memory_tokens:
                    attention_mask = memory_mask(
                        self.config.text_config, inputs_embeds, attention_mask, past_key_values, position_ids
                    )
            outputs = decode(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **{CACHE_NAME: past_key_values},
                **extra,
            )
        finally:
            for layer in replayed:
                del layer._can_checkpoint_with_cache  # the class says no
        return MicroVLMModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            **{CACHE_NAME: None if kwargs.get("use_cache") is False else getattr(outputs, CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=prefix,
            pooling_attentions=pooling_attentions,
        )

    def packed_decoder(self, checked: bool = False) -> PackedDecoder | None:
        """The fast way through the language model, if its weights are packed, it is on a CPU and not in training; `checked`: made anew if they
        have changed.
        """
        if self.training:
            return None
        if checked and getattr(self, "_decoder", None) is not None and not self._decoder.is_current():
            del self._decoder
        if not hasattr(self, "_decoder"):
            supported = PackedDecoder.supports(self.language_model)
            self._decoder = PackedDecoder(self.language_model) if supported else None
        return self._decoder

    def _apply(self, fn, recurse=True):
        self.__dict__.pop("_decoder", None)
        return super()._apply(fn, recurse)

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "_decoder"}  # a copy makes its own

    def _load_from_state_dict(self, *args, **kwargs):
        self.__dict__.pop("_decoder", None)
        super()._load_from_state_dict(*args, **kwargs)

    @property
    def _is_checkpointing(self) -> bool:
        on = self.training and getattr(self.language_model, "gradient_checkpointing", False)
        return on and (CACHE_NAME == "past_key_values" or torch.is_grad_enabled())  # 5.23 does without gradients, too

    def _attach(self, readout: MemoryReadout, cache: Cache | None, use_cache: bool | None) -> tuple[MemoryCache, bool]:
        """The cache of this pass with the memory in it, and whether it keeps the text."""
        layers = self.language_model.layers
        checkpointing = self._is_checkpointing
        if cache is None:
            use_cache = getattr(self.config.text_config, "use_cache", True) if use_cache is None else use_cache
            if use_cache and not checkpointing:
                return MemoryCache(DynamicCache(config=self.config.text_config), readout), True
            for layer in layers if checkpointing else []:
                if layer._gradient_checkpointing_func.keywords.get("use_reentrant"):
                    raise ValueError(
                        "gradient checkpointing with a memory needs use_reentrant=False: all layers share the memory's graph."
                    )
            return MemoryCache.read_only(len(layers), readout), False
        if checkpointing:
            raise ValueError("gradient checkpointing with a memory needs a pass without a cache.")
        if not isinstance(cache, MemoryCache):
            return MemoryCache(cache, readout), use_cache
        cache.attach(readout)
        return cache, use_cache

    def get_text_mask(self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None) -> torch.BoolTensor:
        """Positions (B, T) of words: neither padding nor placeholder nor one of the prompt's control tokens. The mask may also cover what a
        cache holds, (B, past + T).
        """
        text = self.config.text_config
        control = {self.config.image_token_id, *(self.config.default_prompt_ids or [])}
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(text, name, None)
            control.update(value if isinstance(value, (list, tuple)) else [value] if value is not None else [])
        mask = ~torch.isin(input_ids, torch.tensor(sorted(control), device=input_ids.device))
        return mask if attention_mask is None else mask & attention_mask[:, -input_ids.shape[1] :].bool()

    def get_memory_query(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None,
        vision_features: torch.FloatTensor | None,
    ) -> MemoryQuery:
        """What B rows ask a memory by: a row's pictures (the mean of their keys), or its words when it has none.

        Args:
            input_ids: (B, T).
            vision_features: of all pictures, (N, 1 + patches, vision width).
        """
        per_row = self.count_pictures(input_ids)
        found, given = int(per_row.sum()), 0 if vision_features is None else len(vision_features)
        if found != given:
            raise ValueError(f"The text has placeholders for {found} pictures, {given} were given.")
        keys = torch.zeros(len(per_row), self.config.memory_config.code_size, device=input_ids.device)
        if found:
            image_keys = self.memory.image_keys(vision_features, self.vision_tower.num_prefix_tokens)
            owner = torch.arange(len(per_row), device=per_row.device).repeat_interleave(per_row)
            keys = F.normalize(keys.index_add(0, owner, image_keys), dim=-1)
        if bool((per_row > 0).all()):
            return MemoryQuery(keys)
        mask = self.get_text_mask(input_ids, attention_mask) & (per_row == 0).unsqueeze(1)
        place = (~mask).long().argsort(dim=1, stable=True)[:, : max(1, int(mask.sum(1).max()))]  # words first, in order
        ids, mask = input_ids.gather(1, place), mask.gather(1, place)
        words = self.memory.words(self.get_input_embeddings()(ids))
        return MemoryQuery(keys, words, self.memory.weigh_words(ids) * mask)

    def scope_threshold(self, memory: MemoryState, by_words: bool = False) -> torch.Tensor:
        """Probability from which each of R memories applies to a picture, or to a question in words, (R,)."""
        config = self.config.memory_config
        return scope_threshold(config.word_threshold if by_words else config.scope_threshold, memory.counts)

    def read_memory(
        self, memory: MemoryState, query: MemoryQuery, gate: str | torch.Tensor = "auto", kl: bool = True
    ) -> MemoryReadout:
        """What `memory` adds to a forward pass of B rows.

        Args:
            memory: R rows; every B / R neighbouring rows of the query ask one of them.
            query: of `get_memory_query`.
            gate: `auto` (ScopeNet: soft in training, hard by the config's threshold in eval), `on`, `off`, a boolean or a weight in
                [0, 1], or one per row (B,).
            kl: also compute the two KL terms, which generation does without.
        """
        R, B = memory.num_rows, len(query.keys)
        read, addresses = self.memory.read(memory, query)
        scope = in_float32(self.scope, query.keys, read.statistics.flatten(0, 1))
        if isinstance(gate, (bool, int, float)):  # the same for all rows
            gate = torch.full((B,), float(gate))
        if isinstance(gate, torch.Tensor):
            if gate.shape != (B,):
                raise ValueError(f"memory_gate has the shape {tuple(gate.shape)}, expected ({B},).")
            gate = gate.to(scope.device, torch.float32)
            if not bool(((gate >= 0) & (gate <= 1)).all()):
                raise ValueError("memory_gate must lie between 0 and 1.")
            log_gate = gate.log()
        elif gate == "auto" and self.training:
            log_gate = F.logsigmoid(scope)
        elif gate in ("auto", "on", "off"):
            on = torch.ones_like(scope, dtype=torch.bool)
            if gate == "auto":
                of_pictures, of_words = (
                    self.scope_threshold(memory, by_words).to(scope.device).repeat_interleave(B // R)
                    for by_words in (False, True)
                )
                on = scope.sigmoid() >= torch.where(query.by_words, of_words, of_pictures)
            on = torch.zeros_like(on) if gate == "off" else on
            log_gate = torch.zeros_like(scope).masked_fill(~on, -torch.inf)
        else:
            raise ValueError(f"memory_gate must be 'auto', 'on', 'off' or a tensor, got {gate!r}.")
        empty = (memory.counts == 0).repeat_interleave(B // R)
        log_gate = log_gate.masked_fill(empty.to(log_gate.device), -torch.inf)
        content = read.content.flatten(0, 1)
        return MemoryReadout(
            key_values=self.memory_projection(content.to(self.memory_projection.token_bias.dtype)),
            log_gate=log_gate,
            scope_logits=scope,
            content=content.view(B, self.config.memory_config.num_content_slots, -1),
            address=addresses.flatten(0, 1),
            memory_kl=memory.kl().mean().float().to(scope.device) if kl else None,
            address_kl=address_kl(addresses, self.memory.address_log_variance.float()).mean() if kl else None,
        )

    def get_alignment(
        self,
        input_ids: torch.LongTensor,
        image_hidden_states: torch.FloatTensor,
        text_mask: torch.BoolTensor,
        use_fusion: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Pictures and texts of the rows that have both, in the shared space.

        The text side reads token *embeddings*: a hidden state of the decoder has seen the picture and would give the answer away.

        Args:
            input_ids: (B, T), with P placeholders per picture.
            image_hidden_states: prefix tokens (N, P, D).
            text_mask: positions (B, T) of the text that describes the row's pictures.
            use_fusion: also judge pairs with the fusion block.

        Returns:
            image_embeds (R, projection), text_embeds (R, projection) and match_logits (R, 2) or None.
        """
        per_row = self.count_pictures(input_ids)
        owner = torch.arange(len(input_ids), device=input_ids.device).repeat_interleave(per_row)  # (N,)
        rows = torch.nonzero((per_row > 0) & text_mask.any(1)).flatten()  # (R,)
        shape = (len(input_ids), *image_hidden_states.shape[1:])
        prefix = image_hidden_states.new_zeros(shape).index_add(0, owner, image_hidden_states)[rows]
        prefix = prefix / per_row[rows].view(-1, 1, 1)  # several pictures of a row: their mean
        text, mask = self.get_input_embeddings()(input_ids)[rows], text_mask[rows]
        image_embeds = self.alignment.embed_image(prefix.mean(1))
        text_embeds = self.alignment.embed_text(masked_mean(text, mask))
        match_logits = None
        if use_fusion and len(rows) > 1:
            similarity = (text_embeds @ image_embeds.mT).detach()
            similarity.fill_diagonal_(-torch.inf)
            hardest = similarity.argmax(1)
            match_logits = torch.stack(
                [self.fusion(text, mask, prefix), self.fusion(text, mask, prefix[hardest])], dim=-1
            )
        return image_embeds, text_embeds, match_logits


def check_no_gate(gate) -> None:
    """Raises ValueError for a gate that there is no memory for."""
    if not (isinstance(gate, str) and gate == "auto"):
        raise ValueError(
            "memory_gate is for a memory, which was not given: a cache keeps the one it has, with its gate."
        )


class Indexed:
    """Fills the scores of some tokens by their numbers; those outside the vocabulary are none of it."""

    def without(self, scores: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Scores (B, V) with -inf at the tokens, which are looked through at the first call."""
        if not hasattr(self, "inside"):
            self.inside = tokens[(tokens >= 0) & (tokens < scores.shape[-1])].to(scores.device)
        return scores.index_fill(-1, self.inside, -math.inf)


class IndexedSuppressTokens(Indexed, SuppressTokensLogitsProcessor):
    """As the parent, which looks every token of the vocabulary up in the list: milliseconds per token."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        return self.without(scores, self.suppress_tokens)


class IndexedMinNewTokens(Indexed, MinNewTokensLengthLogitsProcessor):
    """As the parent, which looks every token of the vocabulary up in the list of end tokens."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[-1] - self.prompt_length_to_skip >= self.min_new_tokens:
            return scores
        return self.without(scores, self.eos_token_id)


class IndexedMinLength(Indexed, MinLengthLogitsProcessor):
    """As the parent, likewise."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[-1] >= self.min_length:
            return scores
        return self.without(scores, self.eos_token_id)


INDEXED = {
    MinLengthLogitsProcessor: IndexedMinLength,
    SuppressTokensLogitsProcessor: IndexedSuppressTokens,
    MinNewTokensLengthLogitsProcessor: IndexedMinNewTokens,
}


class MicroVLMForConditionalGeneration(MicroVLMPreTrainedModel, GenerationMixin):
    """MicroVLM with its language-modelling head: captions through `generate()`."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: MicroVLMConfig):
        super().__init__(config)
        self.model = MicroVLMModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Module:
        """As the parent's; the memory's weights of words follow, 1 for new tokens.

        Raises:
            ValueError: the vocabulary is packed.
        """
        if isinstance(self.get_input_embeddings(), PackedEmbedding):
            raise ValueError("a packed vocabulary cannot be resized: call dequantize() first.")
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        if (memory := self.model.memory) is not None:
            old, size = memory.word_weight, embeddings.num_embeddings
            memory.word_weight = torch.cat([old[:size], old.new_ones(max(0, size - len(old)))])
        return embeddings

    def get_image_features(self, pixel_values: torch.FloatTensor, **kwargs) -> MicroVLMImageFeatures | tuple:
        """See `MicroVLMModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, MicroVLMImageFeatures] | None = None,
        return_alignment: bool | str | None = None,
        use_fusion: bool | None = None,
        memory: MemoryState | None = None,
        memory_gate: str | torch.Tensor = "auto",
        memory_readout: MemoryReadout | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> MicroVLMCausalLMOutputWithPast:
        """One pass.

        Args:
            input_ids: (B, T); P placeholders `image_token_id` stand for a picture.
            pixel_values: pictures of all rows in order, (N, 3, height, width).
            attention_mask: (B, T), 0 on padding.
            past_key_values, cache: two names of the text's cache, the second since transformers 5.24; outputs have the installed one's.
            labels: (B, T), -100 where no loss is wanted; shifted inside.
            logits_to_keep: only the last so many logits, 0 for all; or positions.
            mm_encoder_outputs: `{"image": get_image_features(...)}` instead of `pixel_values`; with `last_hidden_state` alone,
                the adapter pools it.
            return_alignment: also return `image_embeds` and `text_embeds`; the text of a row is where `labels` are set, without
                labels all that is neither padding nor placeholder. "only": them alone, the language model does not run.
            use_fusion: also return `match_logits`; default: the config's.
            memory: memories to read with the pictures (or, in a row without one, the words) of this call: one that all rows share,
                or one per row.
            memory_gate: `auto` (ScopeNet decides), `on`, `off`, a boolean or a weight in [0, 1], or one per row (B,).
            memory_readout: of `read_memory`, instead of `memory`.

        Raises:
            ValueError: placeholders and pictures do not match, `use_fusion` on a model built without the block, a memory of
                another model or of another number of rows, or a gate without a memory.
        """
        if memory is not None and memory_readout is not None:
            raise ValueError("You cannot specify both memory and memory_readout at the same time")
        if memory is None:
            check_no_gate(memory_gate)
        if return_alignment not in (None, False, True, "only"):
            raise ValueError(f"return_alignment must be True, False or 'only', got {return_alignment!r}.")
        if use_fusion and self.model.fusion is None:
            raise ValueError("use_fusion=True needs a model built with config.use_fusion=True; this one has no block.")
        if memory is not None:
            asked = attention_mask
            if labels is not None:  # the answer is no part of the question
                asked = (labels == -100) & (True if attention_mask is None else attention_mask.bool())
            memory_readout, mm_encoder_outputs = self._read(
                memory,
                memory_gate,
                input_ids,
                asked,
                pixel_values,
                mm_encoder_outputs,
                kwargs.get("output_attentions"),
            )
            pixel_values = None
        if return_alignment == "only":
            image = self._image(pixel_values, mm_encoder_outputs)
            if image is None:
                raise ValueError("return_alignment='only' needs pictures: give pixel_values.")
            if image.pooler_output is None:
                image = self.model.pool_image_features(image.last_hidden_state)
            prefix = torch.stack(tuple(image.pooler_output))
            image_embeds, text_embeds, match_logits = self._align(input_ids, prefix, labels, attention_mask, use_fusion)
            return MicroVLMCausalLMOutputWithPast(
                image_hidden_states=prefix,
                image_embeds=image_embeds,
                text_embeds=text_embeds,
                match_logits=match_logits,
            )
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            memory_readout=memory_readout,
            return_dict=True,
            **kwargs,
        )
        # contiguous: a sliced (B, T, D) goes through a batched product, five times slower into a large vocabulary on a CPU
        hidden_states = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep).contiguous()
        if isinstance(self.lm_head, nn.Linear):
            hidden_states = hidden_states.to(self.lm_head.weight.dtype)  # a packed decoder gives float32
        logits = self.lm_head(hidden_states)

        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )

        image_embeds = text_embeds = match_logits = None
        if return_alignment and outputs.image_hidden_states is not None:
            image_embeds, text_embeds, match_logits = self._align(
                input_ids, outputs.image_hidden_states, labels, attention_mask, use_fusion
            )
        return MicroVLMCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            pooling_attentions=outputs.pooling_attentions,
            image_embeds=image_embeds,
            text_embeds=text_embeds,
            match_logits=match_logits,
            scope_probability=None if memory_readout is None else memory_readout.scope_logits.sigmoid(),
            scope_logits=None if memory_readout is None else memory_readout.scope_logits,
            memory_content=None if memory_readout is None else memory_readout.content,
            memory_kl=None if memory_readout is None else memory_readout.memory_kl,
            address_kl=None if memory_readout is None else memory_readout.address_kl,
        )

    def _align(self, input_ids, prefix, labels, attention_mask, use_fusion):
        """`get_alignment` of the rows' texts: their labelled positions, or all words."""
        if input_ids is None:
            raise ValueError("return_alignment needs input_ids.")
        text_mask = labels != -100 if labels is not None else input_ids != self.config.image_token_id
        if attention_mask is not None:
            text_mask = text_mask & attention_mask.bool()
        use_fusion = self.config.use_fusion if use_fusion is None else use_fusion
        return self.model.get_alignment(input_ids, prefix, text_mask, use_fusion)

    # ---- the episodic memory

    def _need_memory(self) -> EpisodicMemory:
        if self.model.memory is None:
            raise ValueError("this model has no episodic memory: build it with config.use_memory=True.")
        return self.model.memory

    def train(self, mode: bool = True):
        """As the parent; the fingerprint is computed anew afterwards."""
        self._fingerprint = (None,)
        return super().train(mode)

    def memory_fingerprint(self) -> str:
        """Digest of all that makes addresses and contents: a memory can be used with a model of the same fingerprint only.

        The decoder's layers are not in it: fine-tuning them leaves stored memories readable.
        """
        memory = self._need_memory()
        modules = {"memory": memory, "vision_tower": self.model.vision_tower}
        tensors = {f"{part}.{n}": t for part, m in modules.items() for n, t in m.state_dict(keep_vars=True).items()}
        vocabulary = self.get_input_embeddings().state_dict(keep_vars=True)
        tensors |= {f"embeddings.{name}".removesuffix(".weight"): tensor for name, tensor in vocabulary.items()}
        fields = tuple((name, getattr(self.config.memory_config, name)) for name in FINGERPRINT_FIELDS)
        key = fields, versions(tensors.values())
        if getattr(self, "_fingerprint", (None,))[0] != key:
            digest = hashlib.sha256(repr(fields).encode())
            for name in sorted(tensors):
                value = tensors[name].detach().to(torch.bfloat16).cpu().contiguous()  # the same in both widths
                digest.update(name.encode() + value.view(torch.uint8).numpy().tobytes())
            self._fingerprint = key, digest.hexdigest()[:32]
        return self._fingerprint[1]

    def new_memory(self, batch_size: int = 1) -> MemoryState:
        """Empty memories, one per row; one row serves any number of queries."""
        device = "cpu" if self.device.type == "mps" else self.device  # which has no float64
        return self._need_memory().new_state(batch_size, self.memory_fingerprint(), device=device)

    def load_memory(self, path: str) -> MemoryState:
        """A memory this model has saved; see `MemoryState.load` for what is checked."""
        expected = self.new_memory()
        return MemoryState.load(path, expected, expected.device)

    def _check_memory(self, memory: MemoryState, batch_size: int | None = None) -> None:
        if not isinstance(memory, MemoryState):
            raise TypeError(f"memory must be a MemoryState, got {type(memory).__name__}: load_memory() opens a file.")
        if memory.fingerprint != (own := self.memory_fingerprint()):
            raise ValueError(
                f"the memory was written by another model: its fingerprint is {memory.fingerprint}, this model's {own}."
            )
        if batch_size is not None and memory.num_rows not in (1, batch_size):
            raise ValueError(
                f"the memory has {memory.num_rows} rows, the batch {batch_size}: they must agree, or be one."
            )

    def _image(self, pixel_values, mm_encoder_outputs, output_attentions=None) -> MicroVLMImageFeatures | None:
        if pixel_values is not None and mm_encoder_outputs:
            raise ValueError("You cannot specify both pixel_values and mm_encoder_outputs at the same time")
        if pixel_values is None:
            return (mm_encoder_outputs or {}).get("image")
        return self.get_image_features(pixel_values, output_attentions=output_attentions, return_dict=True)

    def _read(
        self, memory, gate, input_ids, attention_mask, pixel_values, mm_encoder_outputs, output_attentions=None, kl=True
    ):
        """The read-out for a batch, and its encoded pictures, so that the vision tower runs once."""
        self._need_memory()
        if input_ids is None:
            raise ValueError(
                "reading a memory needs input_ids: inputs_embeds alone do not say which row owns a picture."
            )
        self._check_memory(memory, len(input_ids))
        image = self._image(pixel_values, mm_encoder_outputs, output_attentions)
        features = None if image is None else image.last_hidden_state
        query = self.model.get_memory_query(input_ids, attention_mask, features)
        readout = self.model.read_memory(memory, query, gate, kl)
        return readout, mm_encoder_outputs if image is None else {"image": image}

    @torch.no_grad()
    def write_memory(
        self,
        memory: MemoryState | None = None,
        *,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        mm_encoder_outputs: dict[str, MicroVLMImageFeatures] | None = None,
        labels: list[str] | None = None,
    ) -> MemoryState:
        """Store B facts, a picture and a sentence each, without a gradient step: `write_memory(**processor(images=..., text=...))`.

        The address is made of the picture alone, the content of the row's words.

        Args:
            memory: where to; unchanged. One row takes all facts, more rows one each. Default: a new memory of one row.
            input_ids: (B, T), one picture's placeholders and the words.
            attention_mask: (B, T).
            pixel_values: (B, 3, height, width), or `mm_encoder_outputs` with `image` and, if `memory_config.gray_weight` is not 0, `gray`:
                `get_image_features` of the pictures and of their grey copies (the mean of the channels).
            labels: names to find the facts by; default: none, they go by number.

        Returns:
            The new state.

        Raises:
            ValueError: a row without words, without picture or with several, too many words, content that is not finite, a memory of
                another model or number of rows, or one that is full; a model in training mode, whose dropout and noise the receipts
                would not know of.
        """
        B = len(input_ids)
        encoder = self._need_memory()
        if self.training:
            raise ValueError("write_memory needs the model in evaluation mode: call eval() first.")
        memory = self.new_memory() if memory is None else memory
        self._check_memory(memory, B)
        if labels is not None and len(labels) != B:
            raise ValueError(f"{len(labels)} labels for {B} facts.")
        if not B:
            raise ValueError("The batch is empty: input_ids has no rows.")
        contents, token_ids = self._encode_contents(input_ids, attention_mask)
        P = self.config.num_prefix_tokens
        for row, count in enumerate((input_ids == self.config.image_token_id).sum(1).tolist()):
            if count != P:
                count = count // P if count % P == 0 else f"{count / P:.2f}"
                raise ValueError(f"row {row} has {count} pictures: a fact to write is one picture and its words.")
        image, gray = self._image(pixel_values, mm_encoder_outputs), None
        if image is None:
            raise ValueError("the text has placeholders, but there are no pictures: give pixel_values.")
        if self.config.memory_config.gray_weight:
            if pixel_values is not None:
                gray = self._image(pixel_values.mean(1, keepdim=True).expand_as(pixel_values), None)
            elif (gray := mm_encoder_outputs.get("gray")) is None:
                raise ValueError("mm_encoder_outputs lacks `gray`: a key to write needs the pictures in grey as well.")
        keys, gray_keys = (
            None if x is None else self.model.get_memory_query(input_ids, attention_mask, x.last_hidden_state).keys
            for x in (image, gray)
        )
        keys = encoder.written_keys(keys, gray_keys)
        if not torch.isfinite(contents).all() or not torch.isfinite(keys).all():
            raise ValueError("the memory content is not finite: nothing was written.")
        R = memory.num_rows
        names = [""] * B if labels is None else list(labels)
        names = [names] if R == 1 else [[name] for name in names]
        split = lambda t: t.view(R, B // R, -1)  # noqa: E731
        return encoder.write(memory, split(keys), split(contents), names, token_ids=split(token_ids))

    def _encode_contents(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Contents (B, S x C) of the rows' words, ended by the end token, and these tokens (B, L), -1 behind the end."""
        config = self.config.memory_config
        words, L = self.model.get_text_mask(input_ids, attention_mask), config.max_content_tokens
        eos = self.config.text_config.eos_token_id
        eos = eos[0] if isinstance(eos, (list, tuple)) else eos
        end = [] if eos is None else [eos]
        lengths = words.sum(1)
        for row, length in enumerate(lengths.tolist()):
            if not length:
                raise ValueError(f"row {row} has no words: a fact to write is one picture and its words.")
            if length + len(end) > L:
                raise ValueError(f"row {row} has {length} tokens of words, at most {L - len(end)} can be stored.")
        order = (~words).long().argsort(dim=1, stable=True)  # words first, in their order
        packed = F.pad(input_ids.gather(1, order), (0, L))[:, :L]
        place = torch.arange(L, device=input_ids.device)
        token_ids = torch.where(place < lengths.unsqueeze(1), packed, -1)
        if end:
            token_ids[place == lengths.unsqueeze(1)] = eos
        return self.encode_contents(token_ids), token_ids

    def encode_contents(self, token_ids: torch.LongTensor) -> torch.Tensor:
        """Contents (N, S x C) of sentences (N, L), -1 behind their end."""
        token_ids = token_ids[:, : max(1, int((token_ids >= 0).sum(1).max()))]
        embeddings = self.get_input_embeddings()(token_ids.clamp(min=0))
        return self.model.memory.contents(embeddings, token_ids >= 0)

    def forget(self, memory: MemoryState, item: int | str, row: int | None = None) -> MemoryState:
        """`memory` as if `item`, a number in `memory.describe()` or a label, had never been written.

        Raises:
            ValueError: a memory of another model, or an item that is not in it.
        """
        self._check_memory(memory)
        return memory.forget(item, row)

    @torch.no_grad()
    def edit_memory(
        self,
        memory: MemoryState,
        item: int | str,
        input_ids: torch.LongTensor,
        row: int | None = None,
        label: str = "",
        attention_mask: torch.Tensor | None = None,
    ) -> MemoryState:
        """`memory` with other words (1, T) under the address of `item`, whose label, made for the old ones, goes.

        Raises:
            ValueError: as `write_memory` and `forget`.
        """
        self._check_memory(memory)
        if len(input_ids) != 1:
            raise ValueError(f"an item is edited to one sentence, got {len(input_ids)}.")
        contents, token_ids = self._encode_contents(input_ids, attention_mask)
        return memory.edit(item, contents[0].to(memory.device), label, row, token_ids[0].to(memory.device))

    def memory_losses(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor,
        vision_features: torch.FloatTensor,
        support_features: torch.FloatTensor,
        support_tokens: torch.LongTensor,
        support_active: torch.BoolTensor,
        target_tokens: torch.LongTensor,
        known: torch.BoolTensor,
        key_features: torch.FloatTensor,
    ) -> tuple[MemoryReadout, dict[str, torch.Tensor]]:
        """Write episodes and read them with the queries of a batch, in one graph: a training step of the memory.

        Half of the rows see the memory through ScopeNet's soft gate, the other half as in inference: on where the query was written, off
        where it was not.

        Args:
            input_ids, attention_mask: queries (B, T), where the mask is 1; every B / G neighbouring rows ask one memory.
            vision_features: of their pictures.
            support_features: key features of what is written, (G, N, 1 or 2, 2 x vision width), the second of the grey copy, with
                `support_tokens` (G, N, L), -1 behind the end, where `support_active` (G, N).
            target_tokens: the stored sentence a query asks for, (B, L), where `known` (B,): the query was written.
            key_features: P pictures: one view, another and, if there is one, the grey copy, (2 or 3, P, 2 x vision width).

        Returns:
            The read-out for `forward`, and the losses: `scope`, balanced binary cross-entropy; `reconstruction`, 1 - cosine of read and
            stored content; `key`, InfoNCE of the addresses of two views; `memory_kl` and `address_kl`.
        """
        memory = self._need_memory()
        G, N = support_active.shape
        contents = self.encode_contents(torch.cat([support_tokens.flatten(0, 1), target_tokens]))
        supports, targets = contents[: G * N].view(G, N, -1), contents[G * N :]
        state = memory.new_state(G, dtype=torch.float32, device=supports.device)
        keys = in_float32(memory.key_encoder, support_features).unbind(2)
        keys = memory.written_keys(keys[0], keys[1] if len(keys) > 1 else None)
        state = memory.write(state, keys, supports, active=support_active, method="direct")
        query = self.model.get_memory_query(input_ids, attention_mask, vision_features)
        readout = self.model.read_memory(state, query)
        hard = torch.zeros_like(readout.log_gate).masked_fill(~known, -torch.inf)
        readout.log_gate = torch.where(torch.rand_like(hard) < 0.5, hard, readout.log_gate)

        target = known.float()
        share = target.mean().clamp(1e-3, 1 - 1e-3)
        balance = torch.where(known, 0.5 / share, 0.5 / (1 - share))
        similarity = F.cosine_similarity(readout.content.flatten(1), targets, dim=-1)
        first, second, *gray = in_float32(memory.key_encoder, key_features)  # (P, C) each
        first = memory.written_keys(first, gray[0] if gray else None)
        first, second = memory.address(first), memory.address(second)  # (P, K)
        temperature = self.config.alignment_config.temperature
        return readout, {
            "scope": F.binary_cross_entropy_with_logits(readout.scope_logits, target, weight=balance),
            "reconstruction": ((1 - similarity) * target).sum() / target.sum().clamp(min=1),
            "key": contrastive_loss(first, second, temperature),
            "memory_kl": readout.memory_kl,
            "address_kl": readout.address_kl,
        }

    @torch.no_grad()
    def generate(self, inputs=None, *args, memory: MemoryState | None = None, memory_gate="auto", **kwargs):
        """As the parent, with what `memory` knows of the pictures in the prompt, or of its words where a row has none.

        Args:
            memory: one that all rows share, or one per row; read once, before the first token.
            memory_gate: `auto` (ScopeNet decides), `on`, `off`, or per row (B,), boolean or a weight in [0, 1].

        Raises:
            ValueError: a memory of another model or of another number of rows, or a gate without a memory.
        """
        if memory is None:
            check_no_gate(memory_gate)
        cache = one_cache(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
        if cache is not None:
            kwargs[CACHE_NAME] = cache
        if memory is not None:
            input_ids = inputs if inputs is not None else kwargs.get("input_ids")
            pixel_values = kwargs.pop("pixel_values", None)
            if input_ids is None and pixel_values is not None and kwargs.get("inputs_embeds") is None:
                kwargs["input_ids"] = input_ids = self.default_prompt(len(pixel_values), pixel_values.device)
            kwargs["memory_readout"], encoded = self._read(
                memory,
                memory_gate,
                input_ids,
                kwargs.get("attention_mask"),
                pixel_values,
                kwargs.get("mm_encoder_outputs"),
                kl=False,
            )
            if encoded is not None:
                kwargs["mm_encoder_outputs"] = encoded
        with kernel_threads() if self.model.packed_decoder() is not None else nullcontext():
            return super().generate(inputs, *args, **kwargs)

    def _get_logits_processor(self, *args, **kwargs):
        processors = super()._get_logits_processor(*args, **kwargs)
        for processor in processors:
            processor.__class__ = INDEXED.get(type(processor), type(processor))
        return processors

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        readout = model_kwargs.pop("memory_readout", None)
        if readout is None:
            return
        copies = max(generation_config.num_beams, generation_config.num_return_sequences)
        readout = readout.repeat_interleave(copies) if copies > 1 else readout
        cache = model_kwargs.get(CACHE_NAME)
        if cache is None:  # use_cache=False: every step is a whole pass, and needs it again
            model_kwargs["memory_readout"] = readout
        elif isinstance(cache, MemoryCache):
            cache.attach(readout)
        else:
            model_kwargs[CACHE_NAME] = MemoryCache(cache, readout)

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, past_key_values=None, cache=None, **kwargs):
        cache = one_cache(past_key_values, cache)
        if isinstance(cache, MemoryCache) and cache.num_memory_tokens:
            return attention_mask  # the forward builds the mask, with the memory's columns
        return create_masks_for_generate(config, inputs_embeds, attention_mask, cache, **kwargs)

    def alignment_loss(self, outputs: MicroVLMCausalLMOutputWithPast) -> torch.Tensor | None:
        """InfoNCE of a forward with `return_alignment`, plus the matching loss when the fusion block ran; () or None without pairs."""
        if outputs.image_embeds is None or not len(outputs.image_embeds):
            return None
        loss = self.contrastive_loss(outputs.image_embeds, outputs.text_embeds)
        match = self.match_loss(outputs)
        return loss if match is None else loss + match

    def contrastive_loss(self, image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
        """InfoNCE () of R pairs of unit vectors (R, C), at the config's temperature; each pair's negatives are all the others."""
        return contrastive_loss(image_embeds, text_embeds, self.config.alignment_config.temperature)

    def match_loss(self, outputs: MicroVLMCausalLMOutputWithPast) -> torch.Tensor | None:
        """Binary cross-entropy () of the fusion block's judgements; None where it did not run."""
        if outputs.match_logits is None:
            return None
        target = torch.zeros_like(outputs.match_logits)
        target[:, 0] = 1
        return F.binary_cross_entropy_with_logits(outputs.match_logits.float(), target.float())

    def default_prompt(self, batch_size: int, device: torch.device | None = None) -> torch.LongTensor:
        """The prompt of `generate(pixel_values=...)`: `config.default_prompt_ids`, one picture a row, (batch_size, length)."""
        token, P = self.config.image_token_id, self.config.num_prefix_tokens
        ids = [i for t in self.config.default_prompt_ids or [token] for i in ([t] * P if t == token else [t])]
        return torch.tensor([ids], dtype=torch.long, device=device or self.device).expand(batch_size, -1).contiguous()

    def _prepare_model_inputs(self, inputs, bos_token_id, model_kwargs):
        model_kwargs = {k: v for k, v in model_kwargs.items() if k != "pixel_values" or v is not None}
        text = inputs if inputs is not None else model_kwargs.get("input_ids", model_kwargs.get("inputs_embeds"))
        if text is None and "pixel_values" in model_kwargs:
            pixel_values = model_kwargs["pixel_values"]
            model_kwargs["input_ids"] = self.default_prompt(len(pixel_values), pixel_values.device)
        return super()._prepare_model_inputs(inputs, bos_token_id, model_kwargs)

    def prepare_inputs_for_generation(self, input_ids, next_sequence_length=None, inputs_embeds=None, **kwargs):
        """As the parent; a conversation continued from its cache takes only the pictures which the cache does not hold."""
        for name in ("tokenizer", "assistant_tokenizer"):  # of stop strings: generate() hands them on to the model
            kwargs.pop(name, None)
        inputs = super().prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, inputs_embeds=inputs_embeds, **kwargs
        )
        image = (inputs.get("mm_encoder_outputs") or {}).get("image")
        length = input_ids.shape[1] if inputs_embeds is None else inputs_embeds.shape[1]
        if image is not None and next_sequence_length is not None and next_sequence_length < length:
            prefix = torch.cat(tuple(image.pooler_output))  # (N x P, D), in the order of their placeholders
            if inputs_embeds is None:
                inputs_embeds = self.get_input_embeddings()(input_ids)
            else:
                input_ids = None
            mask = self.model.get_placeholder_mask(input_ids, inputs_embeds, prefix).squeeze(-1)  # (B, T)
            order = mask.flatten().cumsum(0).view_as(mask) - 1  # which row of prefix belongs here
            new = order[:, -next_sequence_length:][mask[:, -next_sequence_length:]]
            image = MicroVLMImageFeatures(pooler_output=(prefix[new],)) if len(new) else None
            inputs["mm_encoder_outputs"] = {"image": image}
        return inputs


MicroVLMModel.register_for_auto_class("AutoModel")  # so that a saved base model, too, has its code beside it
MicroVLMForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["MicroVLMForConditionalGeneration", "MicroVLMModel", "MicroVLMPreTrainedModel"]
