"""Configuration of MicroVLM: one section per part, the shapes of every variant in one place.

A variant is a config, not a code path: `configs/microvlm-m.json` (BitNet b1.58 2B-4T), `configs/microvlm-v.json` (Qwen2.5-0.5B)
and `configs/microvlm-nano.json` (what ships) differ in numbers only.
"""

import math
import typing
from collections.abc import Iterator
from contextlib import contextmanager

import transformers
from huggingface_hub.errors import StrictDataclassError
from packaging.version import Version

TRANSFORMERS = "5.23", "6"  # the lowest supported version, and the first that is not: as in pyproject.toml


def check_transformers(found: str) -> None:
    """Raise ImportError for a version of transformers that is not supported."""
    lowest, end = (Version(version).release for version in TRANSFORMERS)
    if not lowest <= Version(found).release < end:
        wanted = f">={TRANSFORMERS[0]},<{TRANSFORMERS[1]}"
        raise ImportError(f"MicroVLM needs transformers {wanted}, found {found}: pip install 'transformers{wanted}'")


check_transformers(transformers.__version__)  # before names are imported that other versions do not have

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig  # noqa: E402
from transformers.configuration_utils import SubConfigSpec  # noqa: E402

AUTO_MAP = {
    "AutoConfig": "configuration_microvlm.MicroVLMConfig",
    "AutoModel": "modeling_microvlm.MicroVLMForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_microvlm.MicroVLMForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_microvlm.MicroVLMForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_microvlm.MicroVLMForConditionalGeneration",
}

LARGEST_SIZE = 2**24  # of a whole number in our own sections
# of those that are counted up to, in our sections and while transformers and timm build, before anything can fail
LARGEST = {
    "num_hidden_layers": 1000,
    "depth": 1000,
    "num_labels": 100_000,
    "num_classes": 100_000,
    "fusion_num_layers": 1000,
    "ben_cohen_steps": 1000,
}
LEAST = {
    "ben_cohen_steps": 0,
    "fusion_num_layers": 0,
    "image_token_id": -1,
}  # the last is checked against the vocabulary


@contextmanager
def refusing(section: str) -> Iterator[None]:
    """Errors that some operation fell over while `section` was used, as a ValueError that names it."""
    try:
        yield
    except (ValueError, ImportError, OSError, MemoryError, StrictDataclassError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        raise ValueError(f"{section} gives no model: {type(error).__name__}: {error}") from error


def check_fields(config: PreTrainedConfig, section: str) -> None:
    """Raise a ValueError that names the first of the class's own fields whose value is not of its type: whole numbers are
    from 1 (or `LEAST`) to `LARGEST_SIZE` (or `LARGEST`), other numbers finite."""
    for name, kind in type(config).__annotations__.items():
        if name.endswith("_config"):
            continue
        value, kinds = getattr(config, name), typing.get_args(kind) or (kind,)
        kinds = (kind,) if typing.get_origin(kind) is list else kinds
        if not any(fits(value, k, LEAST.get(name, 1), LARGEST.get(name, LARGEST_SIZE)) for k in kinds):
            words = " or ".join("null" if k is type(None) else k.__name__ if k in PLAIN else str(k) for k in kinds)
            raise ValueError(f"{section}{name} must be {words}, in range, got {value!r}.")


PLAIN = (int, float, bool, str, list)


def fits(value, kind: type, least: int, largest: int = LARGEST_SIZE) -> bool:
    if kind is int:
        return type(value) is int and least <= value <= largest
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    if typing.get_origin(kind) is list:
        return isinstance(value, list) and all(fits(x, typing.get_args(kind)[0], 0) for x in value)
    return isinstance(value, kind)


def check_counts(dictionary: dict, section: str) -> None:
    """Raise a ValueError where a number in `LARGEST` is none, negative or too large, `dtype` is not a name, or
    `quantization_config` not an object."""
    dtype = dictionary.get("dtype")
    if not (dtype is None or isinstance(dtype, str) or type(dtype).__name__ == "dtype"):
        raise ValueError(f"{section}dtype must be the name of one, got {dtype!r}.")
    quantization = dictionary.get("quantization_config")
    if not (quantization is None or isinstance(quantization, dict) or hasattr(quantization, "to_dict")):
        raise ValueError(f"{section}quantization_config must be an object of names and values, got {quantization!r}.")
    for name, largest in LARGEST.items():
        value = dictionary.get(name)
        if value is not None and not (isinstance(value, int) and 0 <= value <= largest):
            raise ValueError(f"{section}{name} must be a whole number of at most {largest}, got {value!r}.")


class MicroVLMAdapterConfig(PreTrainedConfig):
    """How 196 patches become 25 prefix tokens.

    Args:
        vision_hidden_size: width of a patch feature of the vision tower (192 in DeiT-Tiny).
        num_patches: patches the vision tower gives (196 = 14 x 14).
        num_prefix_tokens: P, learned pooling queries and image placeholders a picture takes.
        mlp_hidden_size: hidden units of the MLP from vision to text width.
        num_attention_heads: heads of the pooling cross-attention; must divide the text width.
        dropout: in the MLP, training only.
        hidden_act: the MLP's activation.
    """

    model_type = "microvlm_adapter"
    base_config_key = "adapter_config"

    vision_hidden_size: int = 192
    num_patches: int = 196
    num_prefix_tokens: int = 25
    mlp_hidden_size: int = 512
    num_attention_heads: int = 8
    dropout: float = 0.1
    hidden_act: str = "gelu"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        check_fields(self, "adapter_config.")


class MicroVLMMemoryConfig(PreTrainedConfig):
    """The episodic memory (docs/memory.md), built when `use_memory` is set.

    Args:
        num_slots: K, rows of the memory matrix.
        code_size: C, width of a key and of a content slot.
        num_memory_tokens: S, memory tokens per decoder layer.
        num_content_slots: content vectors under one address: S (default), or 1 for the seed's single vector.
        max_content_tokens: longest sentence that can be stored, in tokens with its end.
        max_items: most items a memory may hold; default 4 K.
        key_hidden_size: hidden width of the key encoder.
        key_dropout: on the standardised vision features of a key, training only.
        gray_weight: of the picture's grey copy in the key under which it is stored; 0 for the picture alone.
        addressing: `pseudoinverse` (ridge by Cholesky), `ben_cohen` (the seed's iteration) or `gaussian` (softmax of distances).
        address_ridge: lambda of the pseudo-inverse.
        address_temperature: tau of the Gaussian address.
        ben_cohen_steps: of the iteration.
        write_method: `sequential` (Sherman-Morrison) or `direct`; the same posterior.
        observation_noise: variance of the observation noise, against a prior variance of 1.
        read_sharpness: draws the address of a query to the nearest stored ones before content is read; 0 for the linear read.
        ordering: `lstm` for a bidirectional LSTM over the keys of an episode, or None.
        kv_rank: rank of the map from a read-out to keys and values; None for full rank.
        scope_hidden_size: hidden width of ScopeNet.
        scope_context: ScopeNet sees the key, besides what the read says.
        scope_threshold: probability from which the memory is used, chosen on validation data: one for all, or pairs
            [facts, probability] in rising order of facts.
        word_threshold: the same for questions in words; default: `scope_threshold`.
    """

    model_type = "microvlm_memory"
    base_config_key = "memory_config"

    num_slots: int = 512
    code_size: int = 896
    num_memory_tokens: int = 7
    num_content_slots: int | None = None
    max_content_tokens: int = 32
    max_items: int | None = None
    key_hidden_size: int = 512
    key_dropout: float = 0.2
    gray_weight: float = 0.5
    addressing: str = "pseudoinverse"
    address_ridge: float = 1e-3
    address_temperature: float = 0.25
    ben_cohen_steps: int = 30
    write_method: str = "sequential"
    observation_noise: float = 0.01
    read_sharpness: float = 40.0
    ordering: str | None = None
    kv_rank: int | None = None
    scope_hidden_size: int = 256
    scope_context: bool = True
    scope_threshold: float | list = 0.5
    word_threshold: float | list | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.max_items is None:
            self.max_items = 4 * self.num_slots
        if self.num_content_slots is None:
            self.num_content_slots = self.num_memory_tokens
        check_fields(self, "memory_config.")
        for name, known in (
            ("addressing", ("pseudoinverse", "ben_cohen", "gaussian")),
            ("write_method", ("sequential", "direct")),
            ("ordering", (None, "lstm")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"memory_config.{name} must be one of {known}, got {getattr(self, name)!r}.")
        if self.num_content_slots not in (1, self.num_memory_tokens):
            raise ValueError(
                f"memory_config.num_content_slots must be 1 or num_memory_tokens ({self.num_memory_tokens}), "
                f"got {self.num_content_slots}."
            )
        for name in ("observation_noise", "address_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"memory_config.{name} must be positive, got {getattr(self, name)}.")
        for name in ("gray_weight", "read_sharpness", "address_ridge"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"memory_config.{name} must not be negative, got {getattr(self, name)}.")
        if self.word_threshold is None:
            self.word_threshold = self.scope_threshold
        self._check_threshold("scope_threshold")
        self._check_threshold("word_threshold")

    def _check_threshold(self, name: str):
        threshold = getattr(self, name)
        if isinstance(threshold, list):
            if not threshold or any(not isinstance(pair, (list, tuple)) or len(pair) != 2 for pair in threshold):
                raise ValueError(
                    f"memory_config.{name} must be a number or pairs [facts, probability], got {threshold}."
                )
            if not all(fits(number, float, 0) for pair in threshold for number in pair):
                raise ValueError(f"memory_config.{name} must hold finite numbers, got {threshold}.")
            facts, values = zip(*threshold)
            if facts[0] < 0 or any(a >= b for a, b in zip(facts, facts[1:])):
                raise ValueError(f"memory_config.{name} must be in rising order of facts, got {threshold}.")
        else:
            values = [threshold]
        if not all(0 < value < 1 for value in values):
            raise ValueError(f"memory_config.{name} must be between 0 and 1, got {threshold}.")


class MicroVLMAlignmentConfig(PreTrainedConfig):
    """Contrastive alignment of pictures and texts, and the optional cross-modal fusion block.

    Args:
        projection_size: width of the shared space.
        temperature: of the InfoNCE softmax.
        fusion_num_layers: layers of the cross-modal block, built when `use_fusion` is set.
        fusion_num_attention_heads: heads of the cross-modal block.
    """

    model_type = "microvlm_alignment"
    base_config_key = "alignment_config"

    projection_size: int = 512
    temperature: float = 0.07
    fusion_num_layers: int = 2
    fusion_num_attention_heads: int = 8

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        check_fields(self, "alignment_config.")
        if not self.temperature > 0:
            raise ValueError(f"alignment_config.temperature must be positive, got {self.temperature}.")


class MicroVLMQuantizationConfig(PreTrainedConfig):
    """Quantisation-aware training. (`quantization_config` is transformers' own name, for weights that are stored packed.)

    Args:
        ternary_modules: regular expressions on names of linear layers inside `MicroVLMModel` (`language_model.layers.0.mlp.up_proj`)
            whose weights are rounded to {-1, 0, 1} times a scale in every forward pass (BitNet b1.58, arXiv 2402.17764).
        ternary_weights: `absmean` rounds the weights; `none` leaves them, for weights that are ternary already.
        activation_bits: width of the per-token activation quantisation in front of those layers, 8 or `None` for none.
        group_size: weights that share a scale: "tensor", "row", or so many columns of a row.
    """

    model_type = "microvlm_quantization"
    base_config_key = "qat_config"

    ternary_modules: list[str] | None = None
    ternary_weights: str = "absmean"
    activation_bits: int | None = 8
    group_size: int | str = "tensor"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        check_fields(self, "qat_config.")


class MicroVLMConfig(PreTrainedConfig):
    """Configuration of `MicroVLMModel` and `MicroVLMForConditionalGeneration`.

    Args:
        vision_config: a `timm_wrapper` configuration, default DeiT-Tiny.
        text_config: configuration of any causal decoder of transformers, default Qwen2.
        adapter_config: see `MicroVLMAdapterConfig`.
        memory_config: see `MicroVLMMemoryConfig`.
        alignment_config: see `MicroVLMAlignmentConfig`.
        qat_config: see `MicroVLMQuantizationConfig`.
        image_token_id: id of the image placeholder; must be inside the text vocabulary.
        default_prompt_ids: the prompt of `generate(pixel_values=...)` without `input_ids`: token ids in which `image_token_id`
            stands once for the picture. `None`: the placeholder alone.
        use_memory: build the episodic memory.
        use_fusion: build the cross-modal fusion block.
        tie_word_embeddings: share input and output embeddings; taken from `text_config` when not given.

    Raises:
        ValueError: unknown text model, or sizes that contradict one another.
    """

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
        "image_hidden_states",
        "scope_logits",
        "memory_content",
    ]

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    adapter_config: dict | PreTrainedConfig | None = None
    memory_config: dict | PreTrainedConfig | None = None
    alignment_config: dict | PreTrainedConfig | None = None
    qat_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 0
    default_prompt_ids: list[int] | None = None
    use_memory: bool = False
    use_fusion: bool = False
    tie_word_embeddings: bool | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        check_counts({"dtype": self.dtype, **kwargs}, "")
        for name in self.sub_configs_defaults:
            section = getattr(self, name)
            if section is not None and not isinstance(section, (dict, PreTrainedConfig)):
                raise ValueError(f"{name} must be an object of names and values, got {section!r}.")
            if isinstance(section, dict):
                check_counts(section, f"{name}.")
                if isinstance(section.get("model_args"), dict):
                    check_counts(section["model_args"], f"{name}.model_args.")
        if isinstance(self.text_config, dict):
            text_type = self.text_config.get("model_type", "qwen2")
            if not isinstance(text_type, str) or text_type not in CONFIG_MAPPING:
                raise ValueError(
                    f"text_config.model_type is {text_type!r}, which this version of transformers does not know. "
                    "Use the model_type of a causal decoder such as 'qwen2', 'bitnet' or 'llama'."
                )
        with refusing("the configuration"):
            super().__post_init__(**kwargs)
            if self.tie_word_embeddings is None:
                self.tie_word_embeddings = bool(self.text_config.tie_word_embeddings)
            check_fields(self, "")
            self._check_sizes()

    def _check_sizes(self) -> None:
        adapter, text = self.adapter_config, self.text_config
        if self.vision_config.model_type != "timm_wrapper":
            raise ValueError(
                f"vision_config.model_type must be 'timm_wrapper' (any timm model), got {self.vision_config.model_type!r}."
            )
        if text.hidden_size % adapter.num_attention_heads:
            raise ValueError(
                f"adapter_config.num_attention_heads ({adapter.num_attention_heads}) must divide "
                f"text_config.hidden_size ({text.hidden_size})."
            )
        if not 0 <= self.image_token_id < text.vocab_size:
            raise ValueError(
                f"image_token_id ({self.image_token_id}) must be inside the text vocabulary of {text.vocab_size} tokens."
            )
        heads = self.alignment_config.fusion_num_attention_heads
        if self.use_fusion and text.hidden_size % heads:
            raise ValueError(
                f"alignment_config.fusion_num_attention_heads ({heads}) must divide text_config.hidden_size "
                f"({text.hidden_size})."
            )
        if self.default_prompt_ids is not None and self.default_prompt_ids.count(self.image_token_id) != 1:
            raise ValueError(
                f"default_prompt_ids must hold image_token_id ({self.image_token_id}) exactly once, "
                f"got {self.default_prompt_ids}."
            )
        if not all(0 <= token < text.vocab_size for token in self.default_prompt_ids or []):
            raise ValueError(
                f"default_prompt_ids must be inside the text vocabulary of {text.vocab_size} tokens, "
                f"got {self.default_prompt_ids}."
            )
        layer_types = getattr(text, "layer_types", None) or []
        if self.use_memory and any(kind != "full_attention" for kind in layer_types):
            raise ValueError(
                "use_memory needs a text model with full attention in every layer, this one has sliding windows."
            )
        if self.qat_config.ternary_weights not in ("absmean", "none"):
            raise ValueError(
                f"qat_config.ternary_weights must be 'absmean' or 'none', got {self.qat_config.ternary_weights!r}."
            )
        if self.qat_config.activation_bits not in (8, None):
            raise ValueError(f"qat_config.activation_bits must be 8 or None, got {self.qat_config.activation_bits!r}.")
        group = self.qat_config.group_size
        if group not in ("tensor", "row") and not (isinstance(group, int) and group > 0):
            raise ValueError(f"qat_config.group_size must be 'tensor', 'row' or a number of columns, got {group!r}.")

    def to_dict(self) -> dict:
        # every saved folder carries the code, so the map points at files beside it, wherever this config came from
        return {**super().to_dict(), "auto_map": dict(AUTO_MAP)}

    @property
    def num_prefix_tokens(self) -> int:
        """Image placeholders per picture."""
        return self.adapter_config.num_prefix_tokens


MicroVLMConfig.register_for_auto_class()

__all__ = [
    "MicroVLMAdapterConfig",
    "MicroVLMAlignmentConfig",
    "MicroVLMConfig",
    "MicroVLMMemoryConfig",
    "MicroVLMQuantizationConfig",
]
