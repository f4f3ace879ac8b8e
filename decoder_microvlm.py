"""The decoder of a packed checkpoint in few, large steps, with the caches and masks of transformers.

A decode step of transformers' Qwen2 starts 40 operations a layer, each over a few kilobytes. Here a layer is four
products on packed weights: queries, keys and values as one matrix, attention's output, gate and up as one, down. Their
inputs leave the norms rounded already, and their outputs come with the residual added. Hidden states are float32.

    one row, no padding    compiled attention (`Layer.native`); a single token as one recorded call (`TokenStep`)
    anything else          torch's attention with a mask (`Layer.__call__`)

M counts tokens of all rows, D the hidden size, d the width of a head.
"""

import threading
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

from .cache_microvlm import CACHE_NAME, GrowingLayer, memory_mask, one_cache
from .configuration_microvlm import require
from .kernels_microvlm import DTYPES, Attention, Eager, Matrix, Program, new
from .llvm_microvlm import native_available
from .quantization_microvlm import PackedLinear, matrix_of, versions
from .threads_microvlm import kernel_threads

MODEL_TYPES = ("qwen2", "llama", "bitnet")
# tokens times what they see in a pass with the compiled attention: beyond, torch's matrix products are no slower
MOST_PAIRS = 2**18


class Product(NamedTuple):
    """Packed linear layers of one input, as one matrix."""

    matrix: Matrix
    bias: torch.Tensor | None

    @classmethod
    def of(cls, *linears: PackedLinear) -> "Product":
        """Stack layers with row or tensor scales and the same columns and width."""
        bias = None
        if any(m.bias is not None for m in linears):
            none = [torch.zeros(m.rows, dtype=torch.float32, device="cpu") for m in linears]
            biases = [zero if m.bias is None else m.bias.detach().float() for m, zero in zip(linears, none)]
            bias = torch.cat(biases)
        return cls(matrix_of(linears), bias)


class Norm(NamedTuple):
    """An RMSNorm, or nothing, whose output is rounded for a product."""

    weight: torch.Tensor | None
    eps: float

    @classmethod
    def of(cls, module: nn.Module | None) -> "Norm":
        if module is None:
            return cls(None, 0.0)
        return cls(module.weight.detach().float().contiguous(), module.variance_epsilon)


class Layer:
    """One decoder layer's packed parts.

    BitNet also has norms after the attention and inside the MLP.
    """

    def __init__(self, layer: nn.Module):
        attention, mlp = layer.self_attn, layer.mlp
        self.index, self.head_dim, self.scaling = attention.layer_idx, attention.head_dim, attention.scaling
        self.heads = attention.q_proj.rows // self.head_dim
        self.kv_heads = attention.k_proj.rows // self.head_dim
        # norms
        self.input_norm, self.mlp_norm = Norm.of(layer.input_layernorm), Norm.of(layer.post_attention_layernorm)
        self.attention_norm = Norm.of(getattr(attention, "attn_sub_norm", None))
        self.hidden_norm = Norm.of(getattr(mlp, "ffn_sub_norm", None))
        # products
        self.qkv = Product.of(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = Product.of(attention.o_proj)
        self.gate_up, self.down = Product.of(mlp.gate_proj, mlp.up_proj), Product.of(mlp.down_proj)

    def before_attention(self, x: torch.Tensor, run: Eager | Program) -> torch.Tensor:
        """Compute queries, keys and values (M, rows) of (M, D), now or in a program."""
        return run.linear(run.quantize(x, *self.input_norm), *self.qkv)

    def after_attention(self, attended: torch.Tensor, x: torch.Tensor, run: Eager | Program) -> torch.Tensor:
        """Compute what follows the attention: (M, heads d) and (M, D) -> (M, D)."""
        x = run.linear(run.quantize(attended, *self.attention_norm), *self.out, x)
        gate_up = run.linear(run.quantize(x, *self.mlp_norm), *self.gate_up)
        return run.linear(run.quantize(gate_up, *self.hidden_norm, gated=True), *self.down, x)

    def attend(self, q, keys, values, mask) -> torch.Tensor:
        """Attend with torch.

        q (B, heads, T, d), keys and values (B, kv heads, K, d) -> (B, T, heads d)
        """
        B, H, T, d = q.shape
        groups = H // self.kv_heads
        # one token: the heads that share keys stand in for positions, so nothing is repeated
        if T == 1:
            q = q.view(B, self.kv_heads, groups, d)
            out = F.scaled_dot_product_attention(q, keys, values, mask, scale=self.scaling)
            return out.reshape(B, 1, H * d)
        if groups > 1:
            keys, values = (t.repeat_interleave(groups, 1) for t in (keys, values))
        causal = mask is None
        q, keys, values = q.float(), keys.float(), values.float()  # faster than bfloat16 without AMX
        mask = mask.float() if mask is not None and mask.is_floating_point() else mask
        out = F.scaled_dot_product_attention(q, keys, values, mask, is_causal=causal, scale=self.scaling)
        return out.transpose(1, 2).reshape(B, T, H * d)

    def attention(
        self, qkv, cos_sin, mask, cache: Cache | None, size: tuple[int, int], dtype: torch.dtype
    ) -> torch.Tensor:
        """Turn, append to the cache and attend.

        qkv (B T, rows of q, k and v), cos and sin (B T, 1, d / 2) -> (B, T, heads d)
        """
        (B, T), (cos, sin) = size, cos_sin
        H, KV, d = self.heads, self.kv_heads, self.head_dim
        qkv = qkv.view(B * T, H + 2 * KV, d)
        # rotary positions of queries and keys
        first, second = qkv[:, : H + KV].chunk(2, -1)
        rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
        heads = torch.cat([rotated, qkv[:, H + KV :]], 1).to(dtype).view(B, T, H + 2 * KV, d).transpose(1, 2)
        q, k, v = heads.split([H, KV, KV], 1)
        if cache is not None:
            k, v = cache.update(k, v, self.index)
        return self.attend(q, k, v, mask)

    def __call__(self, x: torch.Tensor, *args) -> torch.Tensor:
        """Run the layer with torch's attention: x (B T, D) -> the same."""
        out = self.attention(self.before_attention(x, Eager), *args)
        return self.after_attention(out.flatten(0, 1).float().contiguous(), x, Eager)

    def native_attention(self, dtype: torch.dtype) -> Attention:
        return Attention(self.heads, self.kv_heads, self.head_dim, self.scaling, dtype)

    def native(self, x: torch.Tensor, turns: torch.Tensor, length: torch.Tensor, view: "CacheView") -> torch.Tensor:
        """Run the layer with the compiled attention over one row, (T, D) -> (T, D).

        `turns` (T, d) are theirs, `length` () int64 tokens lie before them in the cache.
        """
        attention = self.native_attention(view.dtype)
        out = attention.tokens(self.before_attention(x, Eager), turns, length)
        bound = view.layer(self.index, len(x), (self.kv_heads, self.head_dim))  # alive until the run is over
        attention.bind(*bound)
        attention()
        return self.after_attention(out, x, Eager)


class TokenStep:
    """One token of one row through all layers as one call; `dtype` is the cache's."""

    def __init__(self, decoder: "PackedDecoder", dtype: torch.dtype):
        first = decoder.layers[0]
        self.program = program = Program()
        self.x = x = new(1, first.out.matrix.rows)
        self.turn, self.length = new(1, first.head_dim), new(dtype=torch.int64)
        self.attentions = []
        for layer in decoder.layers:
            attention = layer.native_attention(dtype)
            self.attentions.append(attention)
            attended = attention.tokens(layer.before_attention(x, program), self.turn, self.length)
            program.attention(attention)
            x = layer.after_attention(attended, x, program)
        self.out = x

    def __call__(self, x: torch.Tensor, turns: torch.Tensor, view: "CacheView") -> torch.Tensor:
        """Run the token and grow the cache: x (1, D), turns (1, d) -> (1, D), before the last norm."""
        self.x.copy_(x)
        self.turn.copy_(turns)
        self.length.fill_(view.length)
        bound = [view.layer(i, 1) for i in range(len(self.attentions))]  # alive until the run is over
        for attention, arguments in zip(self.attentions, bound):
            attention.bind(*arguments)
        self.program()
        view.grow(1)
        return self.out


class CacheView:
    """What one row's tokens attend to: growing layers of a cache that `fits`, its memory."""

    @staticmethod
    def fits(cache: Cache, layers: list[Layer], dtype: torch.dtype) -> bool:
        """Check that all layers grow and hold one row's tokens in `dtype`, the memory too."""
        if getattr(cache, "offloading", False) or len(cache.layers) != len(layers):
            return False
        if any(type(layer) is not GrowingLayer or layer.length != cache.layers[0].length for layer in cache.layers):
            return False
        text = [layer.kept_keys for layer in cache.layers if layer.capacity]
        memory = [keys for keys, _ in list(getattr(cache, "memory", {}).values())[:1]]
        stored = text + memory
        return all(len(t) == 1 for t in stored) and all(t.dtype == dtype for t in stored[: len(layers)])

    def __init__(self, cache: Cache, dtype: torch.dtype):
        self.cache, self.dtype, self.length = cache, dtype, cache.layers[0].length
        self.memory, self.gate = [None] * len(cache.layers), 0.0
        if source := getattr(cache, "memory", None):
            self.memory = [tuple(t.to("cpu", dtype).contiguous() for t in pair) for pair in source.values()]
            self.gate = float(cache.log_gate)

    def layer(self, i: int, count: int, shape: tuple[int, int] = (0, 0)):
        """Return the arguments of `Attention.bind`, with room for `count` more tokens.

        shape: heads and width of keys, for a layer that has none yet.
        """
        layer = self.cache.layers[i]
        if layer.capacity == 0:
            empty = new(1, shape[0], 0, shape[1], dtype=self.dtype)
            layer.update(empty, empty)
        layer.reserve(count)
        keys, values = layer.kept_keys, layer.kept_values
        fits = self.length + count <= min(keys.shape[2], values.shape[2])
        require(fits, "the cache was shortened by another thread during the call.")
        return keys, values, self.memory[i], self.gate

    def grow(self, count: int) -> None:
        for layer in self.cache.layers:
            layer.length += count


class PackedDecoder:
    """A language model of packed linears, for inference on a CPU; see `supports`."""

    def __init__(self, model: nn.Module):
        self.model, self.config = model, model.config
        self.layers = [Layer(layer) for layer in model.layers]
        self.norm = Norm.of(model.norm)
        self.source = self.weights()
        # of its modules, which only its own forward calls
        self.hooks = [h for m in model.modules() for h in (m._forward_hooks, m._forward_pre_hooks)]
        self.local = threading.local()  # a step writes to tensors of its own: one for each thread
        self.table = None

    @staticmethod
    def supports(model: nn.Module) -> bool:
        """Check that a model of a known architecture is packed with whole-number products, on a CPU."""
        config = model.config
        layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
        activation = "relu2" if config.model_type == "bitnet" else "silu"
        if config.model_type not in MODEL_TYPES or layer_types != {"full_attention"} or config.hidden_act != activation:
            return False
        linears = [m for name, m in model.layers.named_modules() if name.endswith("_proj")]
        here = {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cpu"}  # and not offloaded
        return here and all(isinstance(m, PackedLinear) and m.whole_numbers for m in linears)

    def weights(self) -> list[tuple]:
        """Return the `versions` of the weights."""
        parts = (self.model.layers, self.model.norm)
        return versions(t for part in parts for t in (*part.parameters(), *part.buffers()))

    def is_current(self) -> bool:
        """Check that the model still has the weights that this was made of, see `versions`."""
        return self.weights() == self.source

    def turns(self, positions: torch.Tensor) -> torch.Tensor:
        """Return cosines, then sines, of positions (M,): (M, d).

        They come from a table, unless they depend on the length of the text.
        """
        rotary, last = self.model.rotary_emb, int(positions.max())
        if rotary.rope_type in ("dynamic", "longrope"):
            return self.make_turns(positions)
        table = self.table
        if table is None or last >= len(table):
            self.table = table = self.make_turns(torch.arange(max(256, 2 * last), device="cpu"))
        return table[positions]

    def make_turns(self, positions: torch.Tensor) -> torch.Tensor:
        cos, sin = self.model.rotary_emb(self.norm.weight, positions.unsqueeze(0))
        return torch.cat([t[0, :, : t.shape[-1] // 2] for t in (cos, sin)], -1)

    @torch.compiler.disable
    @kernel_threads()
    @torch.inference_mode(False)  # a cache that is filled in that mode must be writable outside
    @torch.no_grad()
    def __call__(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
    ) -> BaseModelOutputWithPast:
        """Run like the language model's own forward: (B, T, D) -> (B, T, D) float32.

        Plain dynamic layers of the cache are replaced by growing ones.
        """
        (B, T, D), dtype = inputs_embeds.shape, inputs_embeds.dtype
        cache = one_cache(past_key_values, cache)
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache(config=self.config)
        returned = cache
        if isinstance(attention_mask, dict):  # of generate() with a static cache
            attention_mask = attention_mask["full_attention"]
        # one row without padding can take the compiled attention, which needs a cache of its own
        full = attention_mask is None or (attention_mask.ndim == 2 and bool(attention_mask.all()))
        native = B == 1 and native_available() and dtype in DTYPES and full
        if native and cache is None:
            cache = DynamicCache(config=self.config)
        past = self.prepare(cache)
        if position_ids is None:
            position_ids = torch.arange(past, past + T, device="cpu").unsqueeze(0)
        turns = self.turns(position_ids.expand(B, -1).flatten())
        # all layers
        x = inputs_embeds.reshape(B * T, D).float()
        small = T == 1 or T * (T + past) <= MOST_PAIRS
        if native and small and CacheView.fits(cache, self.layers, dtype):
            x = self.native(x, turns, CacheView(cache, dtype))
        else:
            make_mask = memory_mask if getattr(cache, "memory", None) else create_causal_mask
            mask = make_mask(self.config, inputs_embeds, attention_mask, cache, position_ids=position_ids)
            cos_sin = turns.unsqueeze(1).chunk(2, -1)
            for layer in self.layers:
                x = layer(x, cos_sin, mask, cache, (B, T), dtype)
        x = F.rms_norm(x, (D,), self.norm.weight, self.norm.eps)
        return BaseModelOutputWithPast(last_hidden_state=x.view(B, T, D), **{CACHE_NAME: returned})

    @staticmethod
    def prepare(cache: Cache | None) -> int:
        """Let the plain layers of a cache grow; returns how many tokens it holds."""
        if cache is None:
            return 0
        if not getattr(cache, "offloading", False):
            for i, layer in enumerate(cache.layers):
                if type(layer) is DynamicLayer:
                    cache.layers[i] = GrowingLayer.of(layer)
        return cache.get_seq_length()

    def native(self, x: torch.Tensor, turns: torch.Tensor, view: CacheView) -> torch.Tensor:
        """Run all layers over one row: x (T, D), turns (T, d) -> (T, D), before the last norm."""
        if len(x) == 1 and view.length:
            steps = vars(self.local)
            if view.dtype not in steps:
                steps[view.dtype] = TokenStep(self, view.dtype)
            return steps[view.dtype](x, turns, view)
        length = torch.tensor(view.length, device="cpu")
        for layer in self.layers:
            x = layer.native(x, turns, length, view)
        view.grow(len(x))
        return x
