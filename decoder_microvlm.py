"""The decoder of a packed checkpoint with few, large steps: the same layers, caches and masks as transformers', less of what a token pays for.

A decode step of transformers' own Qwen2 starts some 40 operations a layer, each over a few kilobytes. Here a layer is four products on packed
weights (queries, keys and values as one matrix, gate and up as one), whose inputs leave the norms rounded already and whose outputs come with the residual
added. Hidden states are float32.
"""

import threading

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

from .cache_microvlm import GrowingLayer, memory_mask
from .kernels_microvlm import (
    DTYPES,
    Program,
    TokenAttention,
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

    def __call__(self, x, *args) -> torch.Tensor:
        """x (B T, D) -> the same; the rest as `attention`."""
        out = self.attention(self.qkv(self.input_norm(x)), *args)
        x = self.out(self.attention_norm(out.flatten(0, 1).float().contiguous()), x)
        return self.mlp(x)


class TokenStep:
    """One token of one row as a single call: all layers, attention included, recorded as a program on tensors that stay.

    Args:
        decoder: a `PackedDecoder`.
        dtype: of keys and values, float32 or bfloat16.
    """

    def __init__(self, decoder: "PackedDecoder", dtype: torch.dtype):
        first = decoder.layers[0]
        self.program, self.dtype = Program(), dtype
        self.x = x = torch.zeros(1, first.out.rows)
        self.turn, self.length = torch.zeros(first.head_dim), torch.zeros((), dtype=torch.int64)
        self.attentions, self.source = [], None
        for layer in decoder.layers:
            qkv = layer.input_norm.record(self.program, x, layer.qkv)
            attention = TokenAttention(layer.heads, layer.kv_heads, layer.head_dim, layer.scaling, dtype)
            self.attentions.append(attention)
            attended = self.program.attention(qkv, self.turn, self.length, attention)
            quantized = self.program.quantize(attended, layer.attention_weight, layer.attention_eps)
            x = layer.out.record(self.program, quantized, x)
            gate_up = layer.mlp_norm.record(self.program, x, layer.gate_up)
            hidden = self.program.gate(gate_up, layer.hidden_weight, layer.hidden_eps)
            x = layer.down.record(self.program, hidden, x)
        self.out = x

    def __call__(self, x: torch.Tensor, turn: torch.Tensor, cache: Cache) -> torch.Tensor:
        """x (1, D), turn (d,) -> (1, D), before the last norm; the cache's layers take the token."""
        self.x.copy_(x)
        self.turn.copy_(turn)
        self.length.fill_(cache.layers[0].length)
        source, gate = getattr(cache, "memory", None), 0.0
        if not source:
            memory = [None] * len(self.attentions)
        else:
            if source is not self.source:
                self.source = source
                self.memory = [tuple(t.to("cpu", self.dtype).contiguous() for t in pair) for pair in source]
            memory, gate = self.memory, float(cache.log_gate)
        for layer, attention, items in zip(cache.layers, self.attentions, memory):
            layer.reserve(1)
            attention.bind(layer.kept_keys, layer.kept_values, items, gate)
        self.program()
        for layer in cache.layers:
            layer.length += 1
        return self.out


class PackedDecoder:
    """A language model of packed linears, for inference on a CPU.

    Args:
        model: see `supports`.
    """

    def __init__(self, model: nn.Module):
        self.model, self.config = model, model.config
        self.layers = [Layer(layer) for layer in model.layers]
        self.norm = Norm(model.norm)
        self.local = threading.local()  # a step writes to tensors of its own: one for each thread
        self.turns = None

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

    def tensors(self) -> list[torch.Tensor]:
        """What a token reads of the weights, as it lies in memory."""
        parts = [part for layer in self.layers for part in vars(layer).values() if isinstance(part, (Product, Norm))]
        return [t for part in (*parts, self.norm) for t in vars(part).values() if isinstance(t, torch.Tensor)]

    def turn(self, position: int) -> torch.Tensor:
        """Cosines, then sines, of a position, (d,), from a table where they do not depend on how long the text is."""
        rotary = self.model.rotary_emb
        if rotary.rope_type in ("dynamic", "longrope"):
            first, count = position, 1
        elif self.turns is not None and position < len(self.turns):
            return self.turns[position]
        else:
            first, count = 0, max(256, 2 * position)
        cos, sin = (t[0, :, : t.shape[-1] // 2] for t in rotary(self.norm.weight, torch.arange(count)[None] + first))
        turns = torch.cat([cos, sin], -1)
        if first == 0:
            self.turns = turns
        return turns[position - first]

    @kernel_threads()
    @torch.no_grad()
    def __call__(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """As the language model's own forward: (B, T, D) -> hidden states (B, T, D), float32.

        Plain dynamic layers of the cache are replaced by growing ones.
        """
        B, T, D = inputs_embeds.shape
        dtype, cache = inputs_embeds.dtype, past_key_values
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache(config=self.config)
        layers = [] if cache is None or getattr(cache, "offloading", False) else cache.layers
        for i, layer in enumerate(layers):
            if type(layer) is DynamicLayer:
                layers[i] = GrowingLayer.of(layer)
        if position_ids is None:
            past = 0 if cache is None else cache.get_seq_length()
            position_ids = torch.arange(past, past + T).unsqueeze(0)
        if isinstance(attention_mask, dict):  # of generate() with a static cache
            attention_mask = attention_mask["full_attention"]
        x = inputs_embeds.reshape(B * T, D).float()
        if (
            B == T == 1
            and native_available()
            and dtype in DTYPES
            and len(layers) == len(self.layers)
            and all(type(layer) is GrowingLayer and layer.length for layer in layers)
            and all(len(keys) == 1 for keys, _ in getattr(cache, "memory", ())[:1])
            and (attention_mask is None or (attention_mask.ndim == 2 and bool(attention_mask.all())))
        ):
            steps = vars(self.local)
            if dtype not in steps:
                steps[dtype] = TokenStep(self, dtype)
            x = steps[dtype](x, self.turn(int(position_ids)), cache)
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
        return BaseModelOutputWithPast(last_hidden_state=x.view(B, T, D), past_key_values=cache)
