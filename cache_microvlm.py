"""MemoryCache: keys and values of the episodic memory next to the text's. GrowingLayer: room for tokens to come.

The layers hold text only, so every length, position, crop and mask size is that of the text. `update()` returns
`[text, memory]`, memory last and without rotary position; `memory_mask` appends the memory's gate to the text's mask.
That is in layers of full attention; windows and recurrent states stay the text's. With no row on, nothing is attached,
and the cache is the plain one.
"""

import warnings

import torch
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer
from transformers.masking_utils import create_causal_mask, create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPast

from .configuration_microvlm import require
from .memory_microvlm import MemoryReadout, MemoryWords

# transformers 5.24 calls the cache `cache`, in calls and in outputs; 5.23 `past_key_values`
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def one_cache(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """Return the cache of a call that takes it by either of its names.

    PEFT's prefix tuning gives its prefix beside the cache of `generate`: the longer one holds the other's text.
    """
    if past_key_values is not None and CACHE_NAME == "cache":
        warnings.warn("`past_key_values` is deprecated: transformers calls it `cache`.", FutureWarning, stacklevel=2)
    if past_key_values is None or cache is None:
        return cache if past_key_values is None else past_key_values
    shorter, longer = sorted((past_key_values, cache), key=lambda one: one.get_seq_length())
    both = "You cannot specify both cache and past_key_values: they are two names of one thing."
    require(shorter.get_seq_length() < longer.get_seq_length(), both)
    require(not isinstance(shorter, MemoryCache), "a memory and prefix tuning cannot be had in one call.")
    return longer


def check_rows(memory: int, text: int) -> None:
    """Refuse a memory that was read for another number of rows than the text has."""
    advice = "batch_repeat_interleave or batch_select_indices the cache along with the text."
    require(memory == text, "the memory was read for {} rows, the text has {}: " + advice, memory, text)


class GrowingLayer(DynamicLayer):
    """A dynamic layer with room for more tokens: a new one is written without copying the text.

    `keys` and `values` (B, heads, length, head_dim) are views into longer tensors; assigning to them replaces these.
    """

    @classmethod
    def of(cls, layer: DynamicLayer) -> "GrowingLayer":
        """Take over what a dynamic layer holds."""
        new = cls()
        if layer.is_initialized:
            new.lazy_initialization(layer.keys, layer.values)
            new.keys, new.values = layer.keys, layer.values
        return new

    @staticmethod
    def _view(name: str, buffer: str) -> property:
        def get(self) -> torch.Tensor | None:
            tensor = getattr(self, buffer)
            return tensor if tensor is None or tensor.ndim < 4 else tensor[:, :, : self.length]

        def put(self, tensor: torch.Tensor | None) -> None:
            setattr(self, buffer, tensor)
            self.length = tensor.shape[2] if tensor is not None and tensor.ndim == 4 else 0

        return property(get, put, doc=f"{name} so far, (B, heads, length, head_dim)")

    keys, values = _view("keys", "kept_keys"), _view("values", "kept_values")

    @property
    def capacity(self) -> int:
        return self.kept_keys.shape[2] if self.is_initialized and self.kept_keys.ndim == 4 else 0

    def reserve(self, count: int) -> None:
        """Make room for `count` more tokens, and for half as many again as there will be."""
        writable = torch.is_inference_mode_enabled() or not self.kept_keys.is_inference()
        if self.length + count <= self.capacity and writable:
            return
        # longer tensors, with the text so far
        capacity = (self.length + count) * 3 // 2 + 64
        for name in ("kept_keys", "kept_values"):
            old = getattr(self, name)[:, :, : self.length]
            new = old.new_empty(*old.shape[:2], capacity, old.shape[3])
            new[:, :, : self.length] = old
            setattr(self, name, new)

    def get_seq_length(self) -> int:
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove >= 0 or not self.is_initialized:
            return super().crop(tokens_to_remove)
        self.length = max(0, self.length + tokens_to_remove)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.kept_keys.ndim < 4:
            self.kept_keys, self.kept_values = key_states[:, :, :0], value_states[:, :, :0]
        # after the text so far
        count = key_states.shape[2]
        self.reserve(count)
        for buffer, new in ((self.kept_keys, key_states), (self.kept_values, value_states)):
            buffer[:, :, self.length : self.length + count] = new
        self.length += count
        return self.keys, self.values


class ReadOnlyLayer(LinearAttentionAndFullAttentionLayer):
    """A layer of any kind that returns what it gets and keeps nothing.

    Checkpointed training replays a forward pass, which must not append its text twice.
    """

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        return key_states, value_states

    def update_conv_state(self, conv_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return conv_states

    update_recurrent_state = update_conv_state


class MemoryCache(Cache):
    """A text cache with the memory of B rows attached."""

    def __init__(self, text: Cache, readout: MemoryReadout | None = None):
        self.__dict__.update(text.__dict__)  # layers, offloading and what a subclass of Cache may have
        self.text = text
        self.detach()
        if readout is not None:
            self.attach(readout)

    @classmethod
    def read_only(cls, num_layers: int, readout: MemoryReadout) -> "MemoryCache":
        """Make a cache that adds the memory and keeps no text: for training, and for passes without a cache."""
        return cls(Cache(layers=[ReadOnlyLayer() for _ in range(num_layers)]), readout)

    def attach(self, readout: MemoryReadout) -> None:
        """Put a read-out of B rows in place of what was attached; with all rows off, attach nothing."""
        self.detach()
        # rows that are on
        log_gate = readout.log_gate
        on = log_gate > -torch.inf
        if not on.any():
            return
        self.log_gate, self.words = log_gate, readout.words
        self.hard = not log_gate.requires_grad and bool((~on | (log_gate == 0)).all())
        # an off row may hold anything, NaN included: zero times NaN would leak through the mask
        key_values = torch.where(on.view(-1, 1, 1, 1, 1, 1), readout.key_values, 0)
        self.memory = {i: (layer[:, 0], layer[:, 1]) for i, layer in zip(readout.layers, key_values.unbind(1))}

    def detach(self) -> None:
        """Take the memory off; the text stays."""
        # keys and values (B, heads, S, head_dim) by layer
        self.memory: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.log_gate: torch.Tensor | None = None  # added to the scores of the memory tokens, (B,): 0 is on, -inf off
        self.words: MemoryWords | None = None  # for the pointer
        self.hard = True  # no row is between on and off

    @property
    def is_read_only(self) -> bool:
        """Whether the layers store no text."""
        return any(isinstance(layer, ReadOnlyLayer) for layer in self.layers)

    @property
    def num_memory_tokens(self) -> int:
        """S, or 0 when nothing is attached."""
        return next(iter(self.memory.values()))[0].shape[-2] if self.memory else 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """Store the text's; return keys and values (B, heads, text + S, head_dim) for the attention of a layer."""
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx not in self.memory:
            return keys, values
        parts = [part.to(keys.device, keys.dtype) for part in self.memory[layer_idx]]
        check_rows(len(parts[0]), len(keys))
        heads = "the memory has {} heads, the text {}: a text model that is split over devices has no memory."
        require(parts[0].shape[1] == keys.shape[1], heads, parts[0].shape[1], keys.shape[1])
        return torch.cat([keys, parts[0]], dim=-2), torch.cat([values, parts[1]], dim=-2)

    def extend_mask(self, mask: torch.Tensor) -> torch.Tensor:
        """Append the memory's S columns to the text's mask (B, 1, Q, text), boolean or additive."""
        B, S = len(self.log_gate), self.num_memory_tokens
        check_rows(B, B if len(mask) == 1 else len(mask))
        mask = mask.expand(B, -1, -1, -1)
        # the gate as columns, of the mask's kind
        log_gate = self.log_gate.to(mask.device).view(B, 1, 1, 1).expand(-1, 1, mask.shape[2], S)
        if mask.dtype == torch.bool:
            return torch.cat([mask, log_gate > -torch.inf], dim=-1)
        floor = torch.finfo(mask.dtype).min  # -inf in a whole row of scores would make it NaN
        return torch.cat([mask, log_gate.to(mask.dtype).clamp(min=floor)], dim=-1)

    def _map(self, function) -> None:
        self.memory = {i: (function(k), function(v)) for i, (k, v) in self.memory.items()}
        if self.log_gate is not None:
            self.log_gate = function(self.log_gate)
        self.words = self.words and self.words.map(function)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._map(lambda t: t[indices.to(t.device)])

    def reset(self) -> None:
        """Empty the text and take the memory off: it was read for the prompt that is gone."""
        super().reset()
        self.detach()

    def offload(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        super().offload(layer_idx, only_non_sliding)
        if layer_idx in self.memory:
            self.memory[layer_idx] = tuple(t.to("cpu", non_blocking=True) for t in self.memory[layer_idx])


def memory_mask(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: MemoryCache,
    position_ids: torch.LongTensor | None = None,
) -> torch.Tensor | dict[str, torch.Tensor | None]:
    """Make the mask (B, 1, T, text + S) of inputs (B, T, D): the text's, and the columns of the memory.

    With layers of several kinds, one mask for each kind; that of full attention has these columns.
    """
    mask = create_causal_mask(
        config, inputs_embeds, attention_mask, cache, position_ids=position_ids, allow_is_causal_skip=False
    )
    if mask.dtype == torch.bool and not cache.hard:
        floor = torch.finfo(inputs_embeds.dtype).min
        mask = torch.zeros_like(mask, dtype=inputs_embeds.dtype).masked_fill(~mask, floor)
    mask = cache.extend_mask(mask)
    if not {*(getattr(config, "layer_types", None) or ())} - {"full_attention"}:
        return mask
    others = create_masks_for_generate(config, inputs_embeds, attention_mask, cache, position_ids=position_ids)
    return others | {"full_attention": mask}


def positions_without_padding(
    attention_mask: torch.Tensor | None, length: int, cache: Cache | None
) -> torch.LongTensor | None:
    """Number the text by a mask (B, past + T), so that padding takes no position; None for any other mask.

    Memory tokens have no position: how far the text stands from its beginning matters, now or in a later pass.
    """
    if attention_mask is None or attention_mask.ndim != 2:
        return None
    past = 0 if cache is None else cache.get_seq_length()
    place = past + torch.arange(length, device=attention_mask.device)  # the mask may be as long as the cache can get
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, place]  # (B, T)
