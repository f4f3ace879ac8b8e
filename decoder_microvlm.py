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

from .kernels_microvlm import (
    Program,
    kernel_threads,
    low_bit_linear_quantized,
    native_available,
    quantize_rows,
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
        self.hidden_norm = Norm(mlp.ffn_sub_norm) if sub_norms else None
        self.act = mlp.act_fn

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        gate_up = self.gate_up(self.mlp_norm(x))
        if self.hidden_norm is None:
            return self.down(silu_mul_quantize(gate_up), x)
        gate, up = gate_up.chunk(2, -1)
        return self.down(self.hidden_norm(self.act(gate) * up), x)

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

    def attend_one(self, qkv, cos, sin, mask, cache: Cache | None, dtype: torch.dtype) -> torch.Tensor:
        """`attention` of one token, qkv (1, rows); cos and sin (rows / d, 2, d / 2), signs included -> (1, heads x d)."""
        H, KV, d = self.heads, self.kv_heads, self.head_dim
        halves = qkv.view(H + 2 * KV, 2, d // 2)
        heads = torch.addcmul(halves * cos, halves.flip(1), sin).to(dtype).view(1, H + 2 * KV, 1, d)
        k, v = heads[:, H : H + KV], heads[:, H + KV :]
        if cache is not None:
            k, v = cache.update(k, v, self.index)
        return self.attend(heads[:, :H], k, v, mask).view(1, H * d)

    def __call__(self, x, *args) -> torch.Tensor:
        """x (B T, D) -> the same; the rest as `attention`."""
        out = self.attention(self.qkv(self.input_norm(x)), *args)
        x = self.out(self.attention_norm(out.flatten(0, 1).float().contiguous()), x)
        return self.mlp(x)


class TokenStep:
    """One token of one row, its products recorded as programs on tensors that stay: between two attentions there is one call.

    Args:
        decoder: a `PackedDecoder`.
    """

    def __init__(self, decoder: "PackedDecoder"):
        layers, D = decoder.layers, decoder.layers[0].out.rows
        self.layers, self.x = layers, torch.zeros(1, D)
        self.attended = [torch.zeros(1, layer.heads * layer.head_dim) for layer in layers]
        self.hidden = [torch.zeros(1, layer.down.columns) for layer in layers]
        self.qkv, self.gate_up = [], []
        # programs[i] runs before layer i's attention, programs[-1] behind the last; BitNet's MLP is cut by its activation
        self.programs, self.rests = [Program()], []
        x = self.x
        for i, layer in enumerate(layers):
            program = self.programs[-1]
            self.qkv.append(layer.input_norm.record(program, x, layer.qkv))
            program = Program()
            quantized = program.quantize(self.attended[i], layer.attention_weight, layer.attention_eps)
            x = layer.out.record(program, quantized, x)
            gate_up = layer.mlp_norm.record(program, x, layer.gate_up)
            self.gate_up.append(gate_up)
            if layer.hidden_norm is None:
                x = layer.down.record(program, program.silu_mul(gate_up), x)
                self.rests.append(None)
            else:
                self.rests.append(program)
                program = Program()
                quantized = program.quantize(self.hidden[i], layer.hidden_norm.weight, layer.hidden_norm.eps)
                x = layer.down.record(program, quantized, x)
            self.programs.append(program)
        self.out = x

    def __call__(self, x: torch.Tensor, cos, sin, mask, cache: Cache | None, dtype: torch.dtype) -> torch.Tensor:
        """x (1, D) -> the same, before the last norm."""
        self.x.copy_(x)
        first = self.layers[0]
        # one turn for queries, keys and values: by nothing for the values
        turned, still = first.heads + first.kv_heads, first.kv_heads
        cos = torch.cat([cos.expand(turned, 2, -1), cos.new_ones(still, 2, cos.shape[-1])])
        sin = torch.cat([torch.cat([-sin, sin], 1).expand(turned, -1, -1), sin.new_zeros(still, 2, sin.shape[-1])])
        self.programs[0]()
        for i, layer in enumerate(self.layers):
            self.attended[i].copy_(layer.attend_one(self.qkv[i], cos, sin, mask, cache, dtype))
            if self.rests[i] is not None:
                self.rests[i]()
                gate, up = self.gate_up[i].chunk(2, -1)
                torch.mul(layer.act(gate), up, out=self.hidden[i])
            self.programs[i + 1]()
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

    @staticmethod
    def supports(model: nn.Module) -> bool:
        """Whether all linear layers of a language model are packed with whole-number products, on a CPU, in an architecture known here."""
        if model.config.model_type not in MODEL_TYPES or set(
            getattr(model.config, "layer_types", None) or ["full_attention"]
        ) != {"full_attention"}:
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
        """As the language model's own forward: (B, T, D) -> hidden states (B, T, D), float32."""
        B, T, D = inputs_embeds.shape
        dtype = inputs_embeds.dtype
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(past, past + T).unsqueeze(0)
        if isinstance(attention_mask, dict):  # of generate() with a static cache
            attention_mask = attention_mask["full_attention"]
        dynamic = past_key_values is None or all(isinstance(layer, DynamicLayer) for layer in past_key_values.layers)
        plain = attention_mask is None or (attention_mask.ndim == 2 and bool(attention_mask.all()))
        single = T == 1 and plain and dynamic  # sees all that is kept
        mask = None
        if not single:
            mask = create_causal_mask(
                self.config, inputs_embeds, attention_mask, past_key_values, position_ids=position_ids
            )
        cos, sin = self.model.rotary_emb(inputs_embeds.float(), position_ids)
        half = cos.shape[-1] // 2
        cos, sin = (t[..., :half].expand(B, -1, -1).reshape(B * T, 1, half) for t in (cos, sin))
        x = inputs_embeds.reshape(B * T, D).float()
        if B == T == 1 and native_available():
            if not hasattr(self.local, "step"):
                self.local.step = TokenStep(self)
            x = self.local.step(x, cos, sin, mask, past_key_values, dtype)
        else:
            for layer in self.layers:
                x = layer(x, cos, sin, mask, past_key_values, (B, T), dtype)
        x = F.rms_norm(x, (D,), self.norm.weight, self.norm.eps)
        return BaseModelOutputWithPast(last_hidden_state=x.view(B, T, D), past_key_values=past_key_values)
