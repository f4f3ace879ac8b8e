"""MicroVLM: a tiny vision-language model.

The way of the data, top to bottom (B rows, N images, T text positions, P = 25 prefix tokens, D width, V vocabulary):

    pixel_values (N, 3, 224, 224)
      -> vision tower    196 patch features                (N, 196, 192)
      -> adapter         MLP, then P learned queries pool  (N, P, D)
      -> sequence        replace the image placeholders    (B, T, D)
      -> memory          S tokens in the cache's layers    memory_mixin_microvlm.py
      -> language model  any causal decoder                (B, T, D)
      -> lm_head                                           (B, T, V)

`pixel_values` holds the images of all rows, one after the other; a row has one for each run of P placeholders in
`input_ids`. Apart from this path, alignment_microvlm.py projects images and texts into one space; it never touches
the logits. `generate()` is in generation_microvlm.py, the memory's verbs are in memory_mixin_microvlm.py.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, Cache, PreTrainedModel, TimmWrapperModel, initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .alignment_microvlm import AlignmentMixin, MicroVLMAlignment, MicroVLMFusion, contrastive_loss
from .cache_microvlm import CACHE_NAME, memory_mask, one_cache, positions_without_padding
from .configuration_microvlm import MicroVLMAdapterConfig, MicroVLMConfig, naming_section, require
from .decoder_microvlm import PackedDecoder
from .generation_microvlm import MicroVLMGenerationMixin
from .llvm_microvlm import BUILDING
from .memory_microvlm import EpisodicMemory, MemoryCopy, MemoryProjection, MemoryReadout, ScopeNet, in_float32
from .memory_mixin_microvlm import (
    MemoryMixin,
    MemoryReader,
    check_memory_arguments,
    init_memory_weights,
    memory_outputs,
    question_mask,
    without_placeholders,
)
from .memory_state_microvlm import MemoryState
from .outputs_microvlm import (
    DecodedText,
    MicroVLMCausalLMOutputWithPast,
    MicroVLMImageFeatures,
    MicroVLMModelOutputWithPast,
)
from .quantization_microvlm import PackedEmbedding, PackedWeight, present, register_quantizer, replace_with_ternary

# What `forward` hands on to the language model and the loss. With transformers' own attention and caches any other name
# is a mistake, and is refused; a paged cache, and the attention of vLLM or SGLang, take names of their own.
FORWARD_KWARGS = TransformersKwargs.__optional_keys__ | {"use_cache", "token_type_ids", "shift_labels", "ignore_index"}
# What the packed decoder can do without; with any other the plain one runs.
FAST_KWARGS = {"use_cache", "return_dict", "shift_labels", "ignore_index", "num_items_in_batch"}


class MicroVLMAdapter(nn.Module):
    """Patch features (N, patches, vision width) -> prefix tokens (N, P, D).

    The features are standardised per channel with statistics of the training images (`patch_mean`, `patch_std`, set
    once by `calibrate`), go through an MLP and are pooled by P learned queries. The queries begin small: each starts as
    the mean of all patches, and training sharpens it. With unit-variance queries a decoder first learns to ignore the
    image.
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
        """Standardise patch features and map them to what the queries read, (N, patches, D)."""
        x = (patches - self.patch_mean) / self.patch_std
        return self.fc2(self.dropout(self.act(self.fc1(x))))

    def forward(
        self, patches: torch.Tensor, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the prefix tokens (N, P, D) and, with `output_attentions`, the attention (N, heads, P, patches)."""
        # queries and patches by heads
        N, x = patches.shape[0], self.project(patches)
        q, k, v = self.q_proj(self.query_tokens).unsqueeze(0), self.k_proj(x), self.v_proj(x)
        q, k, v = (t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        q, attention = q.expand(N, -1, -1, -1), None  # (N, heads, P, head_dim)
        # pool
        if output_attentions:
            attention = (q @ k.mT / math.sqrt(self.head_dim)).softmax(-1)
            pooled = attention.to(v.dtype) @ v
        else:
            pooled = F.scaled_dot_product_attention(q, k, v)
        pooled = pooled.transpose(1, 2).reshape(N, -1, self.num_heads * self.head_dim)  # (N, P, D)
        return self.norm(self.query_tokens + self.out_proj(pooled)), attention


class MicroVLMVisionTower(TimmWrapperModel):
    """A timm model (N, 3, height, width) -> (N, 1 + patches, vision width).

    Every place of the map of a convnet or a Swin is a patch, with no class token before.
    """

    _no_split_modules = ["MicroVLMVisionTower"]  # FSDP looks the classes up by name, and `super()` names itself

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: a vision transformer's class token."""
        return getattr(self.timm_model, "num_prefix_tokens", 0)

    def forward(self, pixel_values: torch.FloatTensor, **kwargs):
        try:
            with present(self):  # timm's own `forward`, which a hook waits for, is never called
                out = super().forward(pixel_values, **kwargs)
        except AssertionError as error:
            raise ValueError(f"the vision tower cannot take these images: {error} Resize them (do_resize).") from error
        # a map as tokens
        hidden = out[0]  # a tuple without return_dict
        if hidden.ndim == 4:  # (N, width, rows, columns), or (N, rows, columns, width)
            is_last = getattr(self.timm_model, "output_fmt", "NCHW") == "NHWC"
            tokens = hidden.flatten(1, 2) if is_last else hidden.flatten(2).mT.contiguous()
            if isinstance(out, tuple):
                return (tokens, *out[1:])
            out.last_hidden_state = tokens
        return out

    def train(self, mode: bool = True):
        """Keep a frozen tower in evaluation mode: a convnet's running statistics are frozen with it."""
        return super().train(mode and any(p.requires_grad for p in self.parameters()))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        for name, parameter in module.named_parameters(recurse=False):
            if name not in ("weight", "bias"):  # class token, position embedding: `super()` leaves them as allocated
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
        """Open a checkpoint like `super()`, packed ones with the quantizer of this copy of the code.

        One at a time: transformers sets the default dtype of the process meanwhile.
        """
        with BUILDING:
            register_quantizer()
            return super().from_pretrained(*args, **kwargs)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Count parameters like `super()`, and the numbers of packed weights."""
        count, parts = super().num_parameters(only_trainable, exclude_embeddings), []
        if not only_trainable:
            embeddings = [m for m in self.modules() if exclude_embeddings and isinstance(m, PackedEmbedding)]
            left_out = {part for embedding in embeddings for part in embedding.children()}
            parts = [m for m in self.modules() if isinstance(m, PackedWeight) and m not in left_out]
        return count + sum(part.rows * part.columns for part in parts)

    def set_attn_implementation(self, attn_implementation: str | dict, *args, **kwargs) -> None:
        """Set it like `super()`, without its warnings of sections of the config that have no model."""
        is_one, names = isinstance(attn_implementation, str), ("", "text_config", "vision_config")
        parts = dict.fromkeys(names, attn_implementation) if is_one else attn_implementation
        super().set_attn_implementation(parts, *args, **kwargs)
        for name in self.config.sub_configs.keys() - set(names) if is_one else ():
            getattr(self.config, name)._attn_implementation = attn_implementation

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_memory_weights(module, self.config.initializer_range)
        if isinstance(module, MicroVLMAdapter):
            init.zeros_(module.patch_mean)
            init.ones_(module.patch_std)
            init.normal_(module.query_tokens, std=self.config.initializer_range)
            for linear in (module.fc1, module.fc2, module.v_proj, module.out_proj):
                init.xavier_uniform_(linear.weight)
        elif isinstance(module, nn.MultiheadAttention):
            init.xavier_uniform_(module.in_proj_weight)
            init.zeros_(module.in_proj_bias)


def check_parts(model: "MicroVLMModel") -> None:
    """Refuse a vision tower or a language model that does not fit the rest."""
    expected, width = model.config.adapter_config.vision_hidden_size, model.vision_tower.timm_model.num_features
    features = f"{model.config.vision_config.architecture} has features of width {width}"
    require(expected == width, f"adapter_config.vision_hidden_size is {expected}, but {features}.")
    for name in ("embed_tokens", "layers"):
        lacks = f"text model {model.config.text_config.model_type!r} has no {name}"
        require(hasattr(model.language_model, name), f"{lacks}: MicroVLM takes decoders that are built like Llama.")


class MicroVLMModel(AlignmentMixin, MemoryReader, MicroVLMPreTrainedModel):
    """Vision tower, adapter, language model without its head, alignment modules and memory."""

    def __init__(self, config: MicroVLMConfig):
        super().__init__(config)
        text, alignment, hidden_size = config.text_config, config.alignment_config, config.text_config.hidden_size
        # images and text
        with naming_section("vision_config"):
            self.vision_tower = MicroVLMVisionTower._from_config(config.vision_config)
        with naming_section("adapter_config"):
            self.adapter = MicroVLMAdapter(config.adapter_config, hidden_size)
        with naming_section("text_config"):
            self.language_model = AutoModel.from_config(text)
        check_parts(self)
        # the shared space, the memory
        self.alignment = MicroVLMAlignment(hidden_size, alignment.projection_size)
        self.fusion = self.memory = self.memory_projection = self.memory_copy = self.scope = None
        if config.use_fusion:
            heads = alignment.fusion_num_attention_heads
            self.fusion = MicroVLMFusion(hidden_size, alignment.fusion_num_layers, heads)
        if config.use_memory:
            head_dim = getattr(text, "head_dim", None) or hidden_size // text.num_attention_heads
            kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
            vision_width = config.adapter_config.vision_hidden_size
            self.memory = EpisodicMemory(config.memory_config, vision_width, hidden_size, text.vocab_size)
            layers = len(config.full_attention_layers)
            self.memory_projection = MemoryProjection(config.memory_config, layers, kv_heads, head_dim)
            if config.memory_config.copy_size:
                self.memory_copy = MemoryCopy(config.memory_config, hidden_size)
            self.scope = ScopeNet(config.memory_config)
        # layers that train for packing
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
        """Encode images to prefix tokens.

        Args:
            pixel_values: (N, 3, height, width), normalised by the image processor.
            output_attentions: also return the pooling attention; default: the config's.
            output_hidden_states: also return the feature maps of all the vision tower's layers; default: the config's.
        """
        # no names of their own in the signature: generate() takes every name in it away from the decoder
        output_attentions, output_hidden_states = (
            getattr(self.config, name) if kwargs.get(name) is None else kwargs[name]
            for name in ("output_attentions", "output_hidden_states")
        )
        shape = tuple(pixel_values.shape)
        images = len(shape) == 4 and shape[0] > 0
        require(images, "pixel_values must have the shape (images, channels, height, width), got {}.", shape)
        # features of the vision tower, then prefix tokens
        vision = self.vision_tower(
            pixel_values,
            output_attentions=False,  # timm has none
            output_hidden_states=bool(output_hidden_states),  # numbers stand for layers of the text
            do_pooling=False,
            return_dict=True,
        )
        image = self.pool_image_features(vision.last_hidden_state, output_attentions)
        image.hidden_states = vision.hidden_states
        image.attentions = None if image.pooling_attentions is None else (image.pooling_attentions,)
        return image

    def pool_image_features(
        self, vision_features: torch.FloatTensor, output_attentions: bool = False
    ) -> MicroVLMImageFeatures:
        """Pool features of the vision tower (N, 1 + patches, vision width) to prefix tokens."""
        skip = self.vision_tower.num_prefix_tokens  # the class token
        prefix, attention = self.adapter(vision_features[:, skip:], output_attentions=output_attentions)
        return MicroVLMImageFeatures(
            last_hidden_state=vision_features, pooler_output=tuple(prefix), pooling_attentions=attention
        )

    def encode_images(self, pixel_values, mm_encoder_outputs=None, **kwargs) -> MicroVLMImageFeatures | None:
        """Encode the images of a call, or take those that come encoded; None without images."""
        both = "You cannot specify both pixel_values and mm_encoder_outputs at the same time"
        require(pixel_values is None or not mm_encoder_outputs, both)
        # pixels, or features of `get_image_features` or of the vision tower alone
        if pixel_values is not None:
            return self.get_image_features(pixel_values, **kwargs | {"return_dict": True})
        image = (mm_encoder_outputs or {}).get("image")
        if image is not None and image.pooler_output is None:  # features of a frozen vision tower
            image = self.pool_image_features(image.last_hidden_state, bool(kwargs.get("output_attentions")))
        return image

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
        # by number, or by the placeholder's embedding
        if input_ids is None:
            token = torch.tensor(self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(token)).all(-1)
        else:
            mask = input_ids == self.config.image_token_id
        # as many as prefix tokens
        if image_features is not None and not torch.compiler.is_compiling():
            count, expected, P = int(mask.sum()), image_features[..., 0].numel(), self.config.num_prefix_tokens
            require(
                count == expected,
                "Image features and image tokens do not match: {} images need {} placeholders ({} each), "
                "the text has {}.",
                *(expected // P, expected, P, count),
            )
        return mask.unsqueeze(-1).to(inputs_embeds.device)

    def count_images(self, input_ids: torch.LongTensor) -> torch.LongTensor:
        """Count the images of each row (B,) by its placeholders, which must be a multiple of P."""
        P, count = self.config.num_prefix_tokens, (input_ids == self.config.image_token_id).sum(1)
        if not torch.compiler.is_compiling() and bool((count % P).any()):
            row = int((count % P).nonzero()[0])
            raise ValueError(f"row {row} has {int(count[row])} image placeholders, an image needs {P}.")
        return count // P

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
        **kwargs: Unpack[TransformersKwargs],
    ) -> MicroVLMModelOutputWithPast:
        cache, unknown = one_cache(past_key_values, cache), sorted(kwargs.keys() - FORWARD_KWARGS)
        foreign = self.config.text_config._attn_implementation not in (None, "eager", "sdpa")
        if unknown and not foreign and isinstance(cache, Cache | None):
            raise TypeError(f"forward() got unexpected keyword arguments: {', '.join(unknown)}")
        # images take the place of their placeholders: one sequence of embeddings
        image = self.encode_images(pixel_values, mm_encoder_outputs, **kwargs)
        inputs_embeds, prefix = self.embed(input_ids, inputs_embeds, image)
        # memory tokens join the cache, without a position
        if memory_readout is not None:
            cache, kwargs["use_cache"] = self.attach_memory(memory_readout, cache, kwargs.get("use_cache"))
        if position_ids is None:
            position_ids = positions_without_padding(attention_mask, inputs_embeds.shape[1], cache)
        with self.replaying_memory(cache):
            outputs = self.decode(inputs_embeds, attention_mask, position_ids, cache, **kwargs)
        return MicroVLMModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            **{CACHE_NAME: None if kwargs.get("use_cache") is False else getattr(outputs, CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_outputs=image,
            image_hidden_states=prefix,
            pooling_attentions=None if image is None else image.pooling_attentions,
        )

    def embed(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.FloatTensor | None,
        image: MicroVLMImageFeatures | None,
    ) -> tuple[torch.FloatTensor, torch.FloatTensor | None]:
        """Put the prefix tokens (N, P, D) at their placeholders: embeddings (B, T, D), and these tokens."""
        one = (input_ids is None) != (inputs_embeds is None)
        require(one, "You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        require(len(inputs_embeds) > 0, "The batch is empty: input_ids has no rows.")
        if image is None:
            return inputs_embeds, None
        # prefix tokens in the place of their placeholders
        prefix = torch.stack(tuple(image.pooler_output)).to(inputs_embeds.device, inputs_embeds.dtype)
        mask = self.get_placeholder_mask(input_ids, inputs_embeds, prefix)
        if input_ids is not None and image.last_hidden_state is not None:  # not the rest of a prompt cached in part
            self.count_images(input_ids)
        return inputs_embeds.masked_scatter(mask, prefix), prefix

    def decode(self, inputs_embeds, attention_mask, position_ids, cache: Cache | None, **kwargs):
        """Run the language model over (B, T, D); by its packed form where that gives all outputs."""
        # the packed form, looked at again before a new text
        others = [k for k, v in kwargs.items() if k not in FAST_KWARGS and v is not None and v is not False]
        decoder = None if others else self.packed_decoder()
        if decoder is not None and (cache is None or not cache.get_seq_length()):
            decoder = self.packed_decoder(checked=True)
        # or the plain form, with the memory's columns in its mask
        if decoder is not None and not inputs_embeds.requires_grad and not any(decoder.hooks):
            kwargs = {"use_cache": kwargs.get("use_cache")}
        else:
            decoder, kwargs = self.language_model, {"return_dict": True, **kwargs}
            if getattr(cache, "num_memory_tokens", 0):
                text_config = self.config.text_config
                attention_mask = memory_mask(text_config, inputs_embeds, attention_mask, cache, position_ids)
        return decoder(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE_NAME if isinstance(cache, Cache | None) else "cache": cache},  # a paged one has one name
            **kwargs,
        )

    def packed_decoder(self, checked: bool = False) -> PackedDecoder | None:
        """Return the fast way through packed weights on a CPU; None in training or for other weights.

        Args:
            checked: build it again if the weights have changed.
        """
        if self.training:
            return None
        # make one where there is none, or one of other weights; a thread that has one keeps it
        missing = object()
        decoder = getattr(self, "_decoder", missing)
        if decoder is missing or (checked and decoder is not None and not decoder.is_current()):
            if not PackedDecoder.supports(self.language_model):
                self._decoder = None  # without the lock, which torch.compile does not know
                return None
            with BUILDING:
                newest = getattr(self, "_decoder", missing)
                if newest is missing or newest is decoder:  # no other thread was first
                    self._decoder = newest = PackedDecoder(self.language_model)
            decoder = newest
        return decoder

    def _apply(self, fn, recurse=True):
        self.__dict__.pop("_decoder", None)
        return super()._apply(fn, recurse)

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "_decoder"}  # a copy makes its own


class MicroVLMForConditionalGeneration(MemoryMixin, MicroVLMGenerationMixin, MicroVLMPreTrainedModel):
    """MicroVLM with its language-modelling head: captions through `generate()`.

    Arguments of `forward`:
        input_ids, attention_mask: (B, T); P placeholders `image_token_id` stand for an image; 0 on padding.
        pixel_values: images of all rows in order, (N, 3, height, width); or `mm_encoder_outputs`, `{"image": ...}` of
            `get_image_features`; with `last_hidden_state` alone, the adapter pools it.
        past_key_values, cache: two names of the text's cache; outputs have the name of the installed transformers.
        labels: (B, T), -100 where no loss is wanted; shifted inside. Image placeholders count as -100.
        logits_to_keep: number of last positions to give logits for, 0 for all; or positions.
        return_alignment: also embed images and texts, of labelled positions if any; "only": without the language model.
        use_fusion: also return `match_logits`; default: the config's.
        memory, memory_gate: read as in `generate`; or `memory_readout` of `read_memory`. The cache is a `MemoryCache`.
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: MicroVLMConfig):
        super().__init__(config)
        self.model = MicroVLMModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.scales_logits = DecodedText.changes(config.text_config)
        self.post_init()
        if not config.text_config.base_model_tp_plan:  # not the head alone: it shares the embedding's weights
            self._tp_plan = {}

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Module:
        """Like `super()`; the memory's weights of words follow, 1 for new tokens."""
        packed = isinstance(self.get_input_embeddings(), PackedEmbedding)
        require(not packed, "a packed vocabulary cannot be resized: call dequantize() first.")
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
        **kwargs: Unpack[TransformersKwargs],
    ) -> MicroVLMCausalLMOutputWithPast:
        """Run one pass; the arguments are described by the class."""
        check_memory_arguments(memory, memory_gate, memory_readout)
        has_images = pixel_values is not None or (mm_encoder_outputs or {}).get("image") is not None
        self.model.check_alignment(return_alignment, use_fusion, input_ids, has_images)
        if labels is not None and input_ids is not None:
            placeholders = (input_ids == self.config.image_token_id).to(labels.device)
            labels = without_placeholders(labels, placeholders, kwargs)
        # ask the memory with the images and words of this call
        if memory is not None:
            image = self.model.encode_images(pixel_values, mm_encoder_outputs, **kwargs)
            question = question_mask(attention_mask, labels)
            memory_readout = self.ask_memory(memory, memory_gate, input_ids, question, image)
            pixel_values, mm_encoder_outputs = None, {"image": image}
        if return_alignment == "only":
            return self._align_only(input_ids, pixel_values, mm_encoder_outputs, labels, attention_mask, use_fusion)
        # one pass of the language model
        cache = one_cache(past_key_values, cache)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            memory_readout=memory_readout,
            **{CACHE_NAME: cache},
            return_dict=True,
            **kwargs,
        )
        # logits, loss and the shared space
        logits = self.logits(outputs.last_hidden_state, logits_to_keep, memory_readout or cache)
        loss, alignment = None, {}
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
            loss = self.model.reaching_all(loss)
        if return_alignment and outputs.image_hidden_states is not None:
            prefix = outputs.image_hidden_states
            alignment = self.model.get_alignment(input_ids, prefix, labels, attention_mask, use_fusion)
        rest = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        rest |= alignment | memory_outputs(memory_readout)
        return MicroVLMCausalLMOutputWithPast(loss=loss, logits=logits, **rest)

    def logits(
        self,
        hidden_states: torch.FloatTensor,
        logits_to_keep: int | torch.Tensor = 0,
        read: MemoryReadout | Cache | None = None,
    ) -> torch.FloatTensor:
        """Compute logits (B, T or logits_to_keep, V) of hidden states (B, T, D), mixed with words that were read."""
        # contiguous: a slice goes through a batched product, five times slower into a large vocabulary on a CPU
        hidden_states = slice_logits_to_keep(hidden_states, logits_to_keep).contiguous()
        states = hidden_states
        if isinstance(self.lm_head, nn.Linear):
            states = states.to(self.lm_head.weight.dtype)  # a packed decoder gives float32
        if self.scales_logits:
            logits = DecodedText(self.config.text_config, states, self.lm_head).logits()
        else:
            logits = self.lm_head(states)
        if (words := getattr(read, "words", None)) is None:
            return logits
        return in_float32(self.model.memory_copy, hidden_states, logits, read.log_gate, *vars(words).values())

    def _align_only(self, input_ids, pixel_values, mm_encoder_outputs, labels, attention_mask, use_fusion):
        """Align images and texts without running the language model."""
        image = self.model.encode_images(pixel_values, mm_encoder_outputs)
        prefix = torch.stack(tuple(image.pooler_output))  # (N, P, D)
        alignment = self.model.get_alignment(input_ids, prefix, labels, attention_mask, use_fusion)
        return MicroVLMCausalLMOutputWithPast(image_hidden_states=prefix, **alignment)

    def contrastive_loss(self, image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
        """InfoNCE () of R pairs of unit vectors (R, C), at the config's temperature."""
        return contrastive_loss(image_embeds, text_embeds, self.config.alignment_config.temperature)


MicroVLMModel.register_for_auto_class("AutoModel")  # so that a saved base model, too, has its code next to it
MicroVLMForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
# `label_smoothing_factor`: Trainer shifts the labels for these classes alone
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault("microvlm", "MicroVLMForConditionalGeneration")
