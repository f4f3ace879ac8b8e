"""The decoder of a packed checkpoint with few, large steps: the same layers, caches and masks as transformers', less of what a token pays for.

A decode step of transformers' own Qwen2 starts some 40 operations a layer, each over a few kilobytes. Here a layer is four products on packed
weights (queries, keys and values as one matrix, gate and up as one), whose inputs leave the norms rounded already and whose outputs come with the residual
added. Hidden states are float32.
"""

import threading
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

from .cache_microvlm import CACHE_NAME, GrowingLayer, memory_mask, one_cache
from .kernels_microvlm import (
    DTYPES,
    Attention,
    Program,
    kernel_threads,
    low_bit_linear_quantized,
    native_available,
    quantize_rows,
    relu2_norm_quantize,
    rms_norm_quantize,
    silu_mul_quantize,
)
from .quantization_microvlm import PackedLinear, panels_of

MODEL_TYPES = ("qwen2", "llama", "bitnet")
# of tokens and what they see in a pass with the compiled attention: beyond, torch's products of matrices are no slower
MOST_PAIRS = 2**18


def versions(tensors: Iterable[torch.Tensor]) -> list[tuple]:
    """Where tensors lie and how often they were written to: equal lists, equal values, but for what was written through `.data`."""
    return [(t.data_ptr(), None if t.is_inference() else t._version) for t in tensors]


class Product:
    """Packed linear layers of one input, as one matrix.

    Args:
        linears: with row or tensor scales and the same columns and width.
    """

    def __init__(self, *linears: PackedLinear):
        first = linears[0]
        self.rows, self.columns = sum(m.rows for m in linears), first.columns
        self.bits = first.format.bits
        self.panels = panels_of(linears)
        self.scale = torch.cat([m.row_scale() for m in linears])
        self.bias = None
        if any(m.bias is not None for m in linears):
            biases = [torch.zeros(m.rows) if m.bias is None else m.bias.detach().float() for m in linears]
            self.bias = torch.cat(biases)

    def record(self, program: Program, quantized, residual: torch.Tensor | None = None) -> torch.Tensor:
        """The same as a step of a program."""
        return program.linear(quantized, self.panels, self.scale, self.bias, self.rows, self.bits, residual)

    def __call__(self, quantized, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Rounded inputs of M tokens -> float32 (M, rows)."""
        shape = (self.rows, self.columns, self.bits)
        return low_bit_linear_quantized(*quantized, self.panels, self.scale, self.bias, *shape, torch.float32, residual)


class Norm:
    """An RMSNorm whose output is rounded for a product."""

    def __init__(self, module: nn.Module):
        self.weight, self.eps = module.weight.detach().float().contiguous(), module.variance_epsilon

    def record(self, program: Program, x: torch.Tensor, product: Product) -> torch.Tensor:
        return product.record(program, program.quantize(x, self.weight, self.eps))

    def __call__(self, x: torch.Tensor):
        return rms_norm_quantize(x, self.weight, self.eps)


class Layer:
    """One decoder layer's packed parts."""

    def __init__(self, layer: nn.Module):
        attention, mlp = layer.self_attn, layer.mlp
        self.index, self.head_dim = attention.layer_idx, attention.head_dim
        self.heads = attention.q_proj.rows // self.head_dim
        self.kv_heads = attention.k_proj.rows // self.head_dim
        self.scaling = attention.scaling
        self.input_norm, self.mlp_norm = Norm(layer.input_layernorm), Norm(layer.post_attention_layernorm)
        self.qkv = Product(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out, self.gate_up, self.down = (
            Product(attention.o_proj),
            Product(mlp.gate_proj, mlp.up_proj),
            Product(mlp.down_proj),
        )
        sub_norms = hasattr(attention, "attn_sub_norm")  # BitNet
        self.attention_norm = Norm(attention.attn_sub_norm) if sub_norms else quantize_rows
        self.attention_weight = self.attention_norm.weight if sub_norms else None
        self.attention_eps = self.attention_norm.eps if sub_norms else 0.0
        hidden_norm = Norm(mlp.ffn_sub_norm) if sub_norms else None
        self.hidden_weight = hidden_norm.weight if sub_norms else None
        self.hidden_eps = hidden_norm.eps if sub_norms else 0.0

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        gate_up = self.gate_up(self.mlp_norm(x))
        if self.hidden_weight is None:
            return self.down(silu_mul_quantize(gate_up), x)
        return self.down(relu2_norm_quantize(gate_up, self.hidden_weight, self.hidden_eps), x)

    def attend(self, q, keys, values, mask):
        """q (B, heads, T, d), keys and values (B, kv heads, K, d) -> (B, T, heads x d)."""
        B, H, T, d = q.shape
        groups = H // self.kv_heads
        if T == 1:  # the heads that share keys stand in for positions: nothing is repeated
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
        self, qkv, cos, sin, mask, cache: Cache | None, size: tuple[int, int], dtype: torch.dtype
    ) -> torch.Tensor:
        """qkv (B T, rows of q, k and v), cos and sin (B T, 1, d / 2) -> (B, T, heads x d)."""
        B, T = size
        H, KV, d = self.heads, self.kv_heads, self.head_dim
        qkv = qkv.view(B * T, H + 2 * KV, d)
        first, second = qkv[:, : H + KV].chunk(2, -1)
        rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
        heads = torch.cat([rotated, qkv[:, H + KV :]], 1).to(dtype).view(B, T, H + 2 * KV, d).transpose(1, 2)
        q, k, v = heads.split([H, KV, KV], 1)
        if cache is not None:
            k, v = cache.update(k, v, self.index)
        return self.attend(q, k, v, mask)

    def native_attention(self, dtype: torch.dtype) -> Attention:
        return Attention(self.heads, self.kv_heads, self.head_dim, self.scaling, dtype)

    def rest(self, attended: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """What follows the attention: (M, heads d) and (M, D) -> (M, D)."""
        return self.mlp(self.out(self.attention_norm(attended), x))

    def __call__(self, x, *args) -> torch.Tensor:
        """x (B T, D) -> the same; the rest as `attention`."""
        out = self.attention(self.qkv(self.input_norm(x)), *args)
        return self.rest(out.flatten(0, 1).float().contiguous(), x)

    def native(self, x: torch.Tensor, turns: torch.Tensor, length: torch.Tensor, kept: "Kept") -> torch.Tensor:
        """The same of one row's tokens, with the compiled attention: x (T, D), turns (T, d), length () of the tokens before."""
        attention = self.native_attention(kept.dtype)
        out = attention.tokens(self.qkv(self.input_norm(x)), turns, length)
        attention.bind(*kept.layer(self.index, len(x), (self.kv_heads, self.head_dim)))
        attention()
        return self.rest(out, x)


class TokenStep:
    """One token of one row as a single call: all layers, attention included, recorded as a program on tensors that stay.

    Args:
        decoder: a `PackedDecoder`.
        dtype: of keys and values, float32 or bfloat16.
    """

    def __init__(self, decoder: "PackedDecoder", dtype: torch.dtype):
        first = decoder.layers[0]
        self.program = Program()
        self.x = x = torch.zeros(1, first.out.rows)
        self.turn, self.length = torch.zeros(1, first.head_dim), torch.zeros((), dtype=torch.int64)
        self.attentions = []
        for layer in decoder.layers:
            qkv = layer.input_norm.record(self.program, x, layer.qkv)
            attention = layer.native_attention(dtype)
            self.attentions.append(attention)
            attended = attention.tokens(qkv, self.turn, self.length)
            self.program.attention(attention)
            quantized = self.program.quantize(attended, layer.attention_weight, layer.attention_eps)
            x = layer.out.record(self.program, quantized, x)
            gate_up = layer.mlp_norm.record(self.program, x, layer.gate_up)
            hidden = self.program.gate(gate_up, layer.hidden_weight, layer.hidden_eps)
            x = layer.down.record(self.program, hidden, x)
        self.out = x

    def __call__(self, x: torch.Tensor, turns: torch.Tensor, kept: "Kept") -> torch.Tensor:
        """x (1, D), turns (1, d) -> (1, D), before the last norm; the cache's layers take the token."""
        self.x.copy_(x)
        self.turn.copy_(turns)
        self.length.fill_(kept.length)
        for i, attention in enumerate(self.attentions):
            attention.bind(*kept.layer(i, 1))
        self.program()
        kept.grow(1)
        return self.out


class Kept:
    """What the tokens of one row attend to: the growing layers of a cache, and the memory attached to it.

    Args:
        cache: see `fits`.
        dtype: of keys and values.
    """

    @staticmethod
    def fits(cache: Cache, layers: list[Layer], dtype: torch.dtype) -> bool:
        """Whether a cache's layers all grow and hold the same tokens of one row in `dtype`, and its memory is of one row."""
        if getattr(cache, "offloading", False) or len(cache.layers) != len(layers):
            return False
        if any(type(layer) is not GrowingLayer or layer.length != cache.layers[0].length for layer in cache.layers):
            return False
        kept = [layer.kept_keys for layer in cache.layers if layer.capacity]
        kept += [keys for keys, _ in getattr(cache, "memory", ())[:1]]
        return all(len(t) == 1 for t in kept) and all(t.dtype == dtype for t in kept[: len(layers)])

    def __init__(self, cache: Cache, dtype: torch.dtype):
        self.cache, self.dtype, self.length = cache, dtype, cache.layers[0].length
        self.memory, self.gate = [None] * len(cache.layers), 0.0
        if source := getattr(cache, "memory", None):
            self.memory = [tuple(t.to("cpu", dtype).contiguous() for t in pair) for pair in source]
            self.gate = float(cache.log_gate)

    def layer(self, i: int, count: int, shape: tuple[int, int] = (0, 0)):
        """Arguments of `Attention.bind`, with room for so many tokens more; shape: heads and width of keys, where there are none yet."""
        layer = self.cache.layers[i]
        if layer.capacity == 0:
            empty = torch.empty(1, shape[0], 0, shape[1], dtype=self.dtype)
            layer.update(empty, empty)
        layer.reserve(count)
        return layer.kept_keys, layer.kept_values, self.memory[i], self.gate

    def grow(self, count: int) -> None:
        for layer in self.cache.layers:
            layer.length += count


class PackedDecoder:
    """A language model of packed linears, for inference on a CPU.

    Args:
        model: see `supports`.
    """

    def __init__(self, model: nn.Module):
        self.model, self.config = model, model.config
        self.layers = [Layer(layer) for layer in model.layers]
        self.norm = Norm(model.norm)
        self.made_of = self.weights()
        self.local = threading.local()  # a step writes to tensors of its own: one for each thread
        self.table = None

    @staticmethod
    def supports(model: nn.Module) -> bool:
        """Whether all linear layers of a language model are packed with whole-number products, on a CPU, in an architecture known here."""
        if model.config.model_type not in MODEL_TYPES or set(
            getattr(model.config, "layer_types", None) or ["full_attention"]
        ) != {"full_attention"}:
            return False
        if model.config.hidden_act != ("relu2" if model.config.model_type == "bitnet" else "silu"):
            return False
        linears = [m for name, m in model.layers.named_modules() if name.endswith("_proj")]
        return all(
            isinstance(m, PackedLinear)
            and m.scheme.activation_bits == 8
            and m.scheme.group_size in ("tensor", "row")
            and m.weight.device.type == "cpu"
            for m in linears
        )

    def weights(self) -> list[tuple]:
        """The `versions` of the weights."""
        return versions(
            t for part in (self.model.layers, self.model.norm) for t in (*part.parameters(), *part.buffers())
        )

    def is_current(self) -> bool:
        """Whether the model's weights are still those that this was made of; what was written through `.data` is not seen."""
        return self.weights() == self.made_of

    def tensors(self) -> list[torch.Tensor]:
        """What a token reads of the weights, as it lies in memory."""
        parts = [part for layer in self.layers for part in vars(layer).values() if isinstance(part, (Product, Norm))]
        return [t for part in (*parts, self.norm) for t in vars(part).values() if isinstance(t, torch.Tensor)]

    def turns(self, positions: torch.Tensor) -> torch.Tensor:
        """Cosines, then sines, of positions (T,): (T, d), from a table where they do not depend on how long the text is."""
        rotary, last = self.model.rotary_emb, int(positions.max())
        if rotary.rope_type in ("dynamic", "longrope"):
            return self.make_turns(positions)
        if self.table is None or last >= len(self.table):
            self.table = self.make_turns(torch.arange(max(256, 2 * last)))
        return self.table[positions]

    def make_turns(self, positions: torch.Tensor) -> torch.Tensor:
        cos, sin = self.model.rotary_emb(self.norm.weight, positions.unsqueeze(0))
        return torch.cat([t[0, :, : t.shape[-1] // 2] for t in (cos, sin)], -1)

    @torch.compiler.disable
    @kernel_threads()
    @torch.inference_mode(False)  # what is kept from a pass in that mode must be writable outside
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
        """As the language model's own forward: (B, T, D) -> hidden states (B, T, D), float32.

        Plain dynamic layers of the cache are replaced by growing ones.
        """
        B, T, D = inputs_embeds.shape
        dtype, cache = inputs_embeds.dtype, one_cache(past_key_values, cache)
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache(config=self.config)
        returned = cache
        if isinstance(attention_mask, dict):  # of generate() with a static cache
            attention_mask = attention_mask["full_attention"]
        native = (
            B == 1
            and native_available()
            and dtype in DTYPES
            and (attention_mask is None or (attention_mask.ndim == 2 and bool(attention_mask.all())))
        )
        if native and cache is None:
            cache = DynamicCache(config=self.config)
        if cache is not None and not getattr(cache, "offloading", False):
            for i, layer in enumerate(cache.layers):
                if type(layer) is DynamicLayer:
                    cache.layers[i] = GrowingLayer.of(layer)
        if position_ids is None:
            past = 0 if cache is None else cache.get_seq_length()
            position_ids = torch.arange(past, past + T).unsqueeze(0)
        x = inputs_embeds.reshape(B * T, D).float()
        if (
            native
            and Kept.fits(cache, self.layers, dtype)
            and (T == 1 or T * (T + cache.get_seq_length()) <= MOST_PAIRS)
        ):
            x = self.native(x, self.turns(position_ids[0]), Kept(cache, dtype))
        else:
            mask = (memory_mask if getattr(cache, "memory", None) else create_causal_mask)(
                self.config, inputs_embeds, attention_mask, cache, position_ids=position_ids
            )
            cos, sin = self.model.rotary_emb(inputs_embeds.float(), position_ids)
            half = cos.shape[-1] // 2
            cos, sin = (t[..., :half].expand(B, -1, -1).reshape(B * T, 1, half) for t in (cos, sin))
            for layer in self.layers:
                x = layer(x, cos, sin, mask, cache, (B, T), dtype)
        x = F.rms_norm(x, (D,), self.norm.weight, self.norm.eps)
        return BaseModelOutputWithPast(last_hidden_state=x.view(B, T, D), **{CACHE_NAME: returned})

    def native(self, x: torch.Tensor, turns: torch.Tensor, kept: Kept) -> torch.Tensor:
        """All layers over the tokens of one row: x (T, D), turns (T, d) -> (T, D), before the last norm."""
        if len(x) == 1 and kept.length:
            steps = vars(self.local)
            if kept.dtype not in steps:
                steps[kept.dtype] = TokenStep(self, kept.dtype)
            return steps[kept.dtype](x, turns, kept)
        length = torch.tensor(kept.length)
        for layer in self.layers:
            x = layer.native(x, turns, length, kept)
        kept.grow(len(x))
        return x
