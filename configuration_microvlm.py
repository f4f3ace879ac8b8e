"""Configuration of MicroVLM: one section per part, the shapes of every variant in one place.

A variant is a config, not a code path: `configs/microvlm-m.json` (BitNet b1.58 2B-4T), `configs/microvlm-v.json`
(Qwen2.5-0.5B) and `configs/microvlm-nano.json` (what ships) differ in numbers only.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from huggingface_hub.dataclasses import as_validated_field, strict
from huggingface_hub.errors import StrictDataclassError
from transformers.utils.versions import require_version

TRANSFORMERS = "5.23", "6"  # the lowest supported version, and the first that is not: as in pyproject.toml

try:
    from transformers import AutoConfig, PreTrainedConfig
    from transformers.cache_utils import get_layer_types_and_kwargs
    from transformers.configuration_utils import SubConfigSpec
    from transformers.utils.type_validators import activation_fn_key, interval
finally:  # also when another version lacks one of the names: its number says more than the name
    require_version(
        "transformers>={},<{}.dev0".format(*TRANSFORMERS),
        "MicroVLM: pip install 'transformers>={},<{}'".format(*TRANSFORMERS),
    )

AUTO_MAP = {
    "AutoConfig": "configuration_microvlm.MicroVLMConfig",
    "AutoModel": "modeling_microvlm.MicroVLMForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_microvlm.MicroVLMForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_microvlm.MicroVLMForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_microvlm.MicroVLMForConditionalGeneration",
}

LARGEST_SIZE = 2**24  # of one axis of a tensor
# counts that transformers and timm loop over while they build, before anything can fail
LARGEST_COUNTS = {"num_hidden_layers": 1000, "depth": 1000, "num_labels": 100_000, "num_classes": 100_000}


def require(condition: bool, message: str, *values) -> None:
    """Raise a ValueError unless the condition holds; `values` fill the braces of the message."""
    if not condition:
        raise ValueError(message.format(*values) if values else message)


# Fields that `@strict` checks: `name: int = size(default=512)`. No interval holds NaN, an open one no infinity.
@as_validated_field
def size(value: int | None) -> None:
    """Check the size of one axis; whether None is allowed is up to the type."""
    require(value is None or 1 <= value <= LARGEST_SIZE, f"Value must be from 1 to {LARGEST_SIZE}, got {value}.")


count = interval(min=0, max=1000)
share = interval(min=0, max=1)
positive = interval(min=0, exclude_min=True, exclude_max=True)
not_negative = interval(min=0, exclude_max=True)


@contextmanager
def naming_section(section: str) -> Iterator[None]:
    """Raise an error of the block as a ValueError that names a section of the configuration."""
    try:
        yield
    except (ImportError, OSError, MemoryError, torch.OutOfMemoryError):  # not the section's fault
        raise
    except Exception as error:
        kind = "" if isinstance(error, (ValueError, StrictDataclassError)) else f"{type(error).__name__}: "
        raise ValueError(f"{section} is not valid: {kind}{error}") from error


def check_foreign(values: dict, section: str = "") -> None:
    """Refuse values of other libraries that they use before they check them."""
    for name, value in values.items():
        # objects and types
        if name == "quantization_config":
            known = value is None or isinstance(value, dict) or hasattr(value, "to_dict")
            require(known, f"{section}{name} must be an object of names and values, got {value!r}.")
        elif name == "dtype":
            known = isinstance(value, (str, torch.dtype, type(None)))
            require(known, f"{section}{name} must be the name of one, got {value!r}.")
        # sections, and counts
        elif isinstance(value, dict):
            check_foreign(value, f"{section}{name}.")
        elif name in LARGEST_COUNTS and value is not None:
            largest = LARGEST_COUNTS[name]
            fits = isinstance(value, int) and 0 <= value <= largest
            require(fits, f"{section}{name} must be a whole number of at most {largest}, got {value!r}.")


@strict
class MicroVLMAdapterConfig(PreTrainedConfig):
    """The adapter: 196 patches become 25 prefix tokens."""

    model_type = "microvlm_adapter"
    base_config_key = "adapter_config"

    vision_hidden_size: int = size(default=192)  # width of a patch feature of the vision tower (192 in DeiT-Tiny)
    num_patches: int = size(default=196)  # patches the vision tower gives (196 = 14 x 14)
    num_prefix_tokens: int = size(default=25)  # P, learned pooling queries, and image placeholders of an image
    mlp_hidden_size: int = size(default=512)  # hidden units of the MLP from vision to text width
    num_attention_heads: int = size(default=8)  # of the pooling cross-attention; must divide the text width
    dropout: float | int = share(default=0.1)  # in the MLP, training only
    hidden_act: str = activation_fn_key(default="gelu")  # the MLP's activation


@strict
class MicroVLMMemoryConfig(PreTrainedConfig):
    """The episodic memory (docs/memory.md), built when `use_memory` is set."""

    model_type = "microvlm_memory"
    base_config_key = "memory_config"

    num_slots: int = size(default=512)  # K, rows of the memory matrix
    code_size: int = size(default=896)  # C, width of a key
    content_size: int | None = size(default=None)  # width of a content slot; default C
    num_memory_tokens: int = size(default=7)  # S, memory tokens per decoder layer
    # content vectors under one address: S (default), or 1 for a single vector; one a token if S is max_content_tokens
    num_content_slots: int | None = size(default=None)
    max_content_tokens: int = size(default=32)  # longest sentence that can be stored, in tokens with its end
    copy_size: int | None = size(default=None)  # width of the pointer that says a slot's token; None: no such path
    copy_dropout: float | int = share(default=0.0)  # share of open rows with the pointer's words alone, training only
    max_items: int | None = size(default=None)  # most items a memory may hold; default 4 K
    key_hidden_size: int = size(default=512)  # hidden width of the key encoder
    key_dropout: float | int = share(default=0.2)  # on the standardised vision features of a key, training only
    # weight of the image's grey copy in the key under which it is stored; 0 for the image alone
    gray_weight: float | int = not_negative(default=0.5)
    # ridge by Cholesky, an iteration, softmax of distances, or waves: see addressing_microvlm.py
    addressing: Literal["pseudoinverse", "ben_cohen", "gaussian", "waves"] = "pseudoinverse"
    address_ridge: float | int = not_negative(default=1e-3)  # lambda of the pseudo-inverse
    address_temperature: float | int = positive(default=0.25)  # tau of the Gaussian address, and of the waves
    ben_cohen_steps: int = count(default=30)  # of the iteration
    # Sherman-Morrison, or all at once; the same posterior
    write_method: Literal["sequential", "direct"] = "sequential"
    observation_noise: float | int = positive(default=0.01)  # variance, against a prior variance of 1
    # draws a query's address to the nearest stored ones before reading; 0 for the linear read
    read_sharpness: float | int = not_negative(default=40.0)
    ordering: Literal["lstm"] | None = None  # a bidirectional LSTM over the keys of an episode
    kv_rank: int | None = size(default=None)  # of the map from a read-out to keys and values; None for full rank
    scope_hidden_size: int = size(default=256)  # hidden width of ScopeNet
    scope_context: bool = True  # whether ScopeNet sees the key, next to the statistics of a read
    # probability from which the memory is used, chosen on validation data: one for all, or pairs [facts, probability]
    # in rising order of facts; for questions in words, default: `scope_threshold`
    scope_threshold: float | list[list[float | int]] = 0.5
    word_threshold: float | list[list[float | int]] | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.max_items is None:
            self.max_items = 4 * self.num_slots
        if self.num_content_slots is None:
            self.num_content_slots = self.num_memory_tokens
        if self.content_size is None:
            self.content_size = self.code_size
        if self.word_threshold is None:
            self.word_threshold = self.scope_threshold

    def validate_slots(self):
        S, slots = self.num_memory_tokens, self.num_content_slots
        require(slots in (1, S), f"num_content_slots must be 1 or num_memory_tokens ({S}), got {slots}.")

    def validate_thresholds(self):
        for name in ("scope_threshold", "word_threshold"):
            threshold = getattr(self, name)
            pairs = threshold if isinstance(threshold, list) else [[0, threshold]]
            known = pairs and all(len(pair) == 2 for pair in pairs)
            require(known, f"{name} must be a number or pairs [facts, probability], got {threshold}.")
            facts, values = zip(*pairs)
            rising = all(a < b for a, b in zip((-1, *facts), (*facts, math.inf)))
            require(rising, f"{name} must be in rising order of facts, got {threshold}.")
            inside = all(0 < value < 1 for value in values)
            require(inside, f"{name} must be between 0 and 1, got {threshold}.")


@strict
class MicroVLMAlignmentConfig(PreTrainedConfig):
    """Contrastive alignment of images and texts; with `use_fusion`, the cross-modal fusion block."""

    model_type = "microvlm_alignment"
    base_config_key = "alignment_config"

    projection_size: int = size(default=512)  # width of the shared space
    temperature: float | int = positive(default=0.07)  # of the InfoNCE softmax
    fusion_num_layers: int = count(default=2)
    fusion_num_attention_heads: int = size(default=8)


@strict
class MicroVLMQuantizationConfig(PreTrainedConfig):
    """Quantisation-aware training; `quantization_config` is transformers' own name, for packed weights."""

    model_type = "microvlm_quantization"
    base_config_key = "qat_config"

    # regular expressions on names of linear layers inside `MicroVLMModel`, such as
    # `language_model.layers.0.mlp.up_proj`, whose weights are rounded to {-1, 0, 1} times a scale in every forward pass
    ternary_modules: list[str] | None = None
    # `absmean` rounds (BitNet b1.58, arXiv 2402.17764); `none` leaves weights that are ternary already
    ternary_weights: Literal["absmean", "none"] = "absmean"
    activation_bits: Literal[8] | None = 8  # of the per-token rounding in front of those layers; None for none
    group_size: Literal["tensor", "row"] | int = "tensor"  # weights that share a scale; a number of columns of a row

    def validate_group_size(self):
        known = isinstance(self.group_size, str) or self.group_size >= 1
        require(known, f"group_size must be 'tensor', 'row' or a number of columns, got {self.group_size}.")


@strict
class MicroVLMConfig(PreTrainedConfig):
    """Configuration of `MicroVLMModel` and `MicroVLMForConditionalGeneration`."""

    model_type = "microvlm"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="timm_wrapper",
            init_kwargs={"architecture": "deit_tiny_patch16_224", "do_pooling": False},
        ),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2"),
        "adapter_config": SubConfigSpec(config_class=MicroVLMAdapterConfig),
        "memory_config": SubConfigSpec(config_class=MicroVLMMemoryConfig),
        "alignment_config": SubConfigSpec(config_class=MicroVLMAlignmentConfig),
        "qat_config": SubConfigSpec(config_class=MicroVLMQuantizationConfig),
    }
    keys_to_ignore_at_inference = [
        "past_key_values",
        "cache",
        "hidden_states",
        "attentions",
        "image_outputs",
        "image_hidden_states",
        "scope_logits",
        "memory_content",
    ]

    vision_config: dict | PreTrainedConfig | None = None  # a `timm_wrapper` configuration, default DeiT-Tiny
    text_config: dict | PreTrainedConfig | None = None  # of any causal decoder of transformers, default Qwen2
    adapter_config: dict | PreTrainedConfig | None = None
    memory_config: dict | PreTrainedConfig | None = None
    alignment_config: dict | PreTrainedConfig | None = None
    qat_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 0  # the image placeholder
    # the prompt of `generate(pixel_values=...)` without `input_ids`, with `image_token_id` once; None: that alone
    default_prompt_ids: list[int] | None = None
    use_memory: bool = False  # build the episodic memory
    use_fusion: bool = False  # build the cross-modal fusion block
    tie_word_embeddings: bool | None = None  # input and output embeddings; default: that of `text_config`
    initializer_range: float | int = not_negative(default=0.02)

    def __post_init__(self, **kwargs):
        sections = {name: getattr(self, name) for name in self.sub_configs_defaults}
        dictionaries = {name: values for name, values in sections.items() if isinstance(values, dict)}
        check_foreign({"dtype": self.dtype, **kwargs, **dictionaries})
        # build the sections here, so that an error names the one it comes from
        for name, values in sections.items():
            with naming_section(name):
                section, kwargs = self.sub_configs_defaults[name].create_subconfig(name, values, **kwargs)
                setattr(self, name, section)
        with naming_section("the configuration"):
            super().__post_init__(**kwargs)
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = bool(self.text_config.tie_word_embeddings)

    def validate_parts(self):
        kind, text = self.vision_config.model_type, self.text_config
        timm = "vision_config.model_type must be 'timm_wrapper' (any timm model)"
        require(kind == "timm_wrapper", f"{timm}, got {kind!r}.")
        heads = {"adapter_config.num_attention_heads": self.adapter_config.num_attention_heads}
        if self.use_fusion:
            heads["alignment_config.fusion_num_attention_heads"] = self.alignment_config.fusion_num_attention_heads
        for name, number in heads.items():
            divides = text.hidden_size % number == 0
            require(divides, f"{name} ({number}) must divide text_config.hidden_size ({text.hidden_size}).")
        heads, shared = (getattr(text, f"num_{kind}_heads", None) for kind in ("attention", "key_value"))
        if isinstance(heads, int) and isinstance(shared, int):
            divides = shared > 0 and heads % shared == 0
            multiple = f"a multiple of num_key_value_heads ({shared})"
            require(divides, f"text_config.num_attention_heads ({heads}) must be {multiple}.")
        kinds = get_layer_types_and_kwargs(text)[0] if self.use_memory else ["full_attention"]
        has = f"{text.model_type!r} has {', '.join(sorted({*kinds}))}"
        require("full_attention" in kinds, f"use_memory needs a text model with full attention in a layer, {has}.")

    def validate_tokens(self):
        size, image, prompt = self.text_config.vocab_size, self.image_token_id, self.default_prompt_ids
        inside = f"must be inside the text vocabulary of {size} tokens"
        require(0 <= image < size, f"image_token_id ({image}) {inside}.")
        once = prompt is None or prompt.count(image) == 1
        require(once, f"default_prompt_ids must hold image_token_id ({image}) exactly once, got {prompt}.")
        known = all(0 <= token < size for token in prompt or [])
        require(known, f"default_prompt_ids {inside}, got {prompt}.")

    def to_dict(self) -> dict:
        # every saved folder carries the code: the map points at its own files, wherever this config came from
        return {**super().to_dict(), "auto_map": dict(AUTO_MAP)}

    @property
    def full_attention_layers(self) -> list[int]:
        """Number the decoder's layers that keep keys and values of the whole text: they carry the memory."""
        kinds = get_layer_types_and_kwargs(self.text_config)[0]
        return [i for i, kind in enumerate(kinds) if kind == "full_attention"]

    @property
    def prompt_has_words(self) -> bool:
        """Whether the default prompt is more than the image between two marks of turns."""
        return len(self.default_prompt_ids or ()) > 3

    @property
    def num_prefix_tokens(self) -> int:
        """Image placeholders per image."""
        return self.adapter_config.num_prefix_tokens


MicroVLMConfig.register_for_auto_class()
