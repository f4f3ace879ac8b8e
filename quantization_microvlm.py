"""Ternary training and packed weights (BitNet b1.58, arXiv 2402.17764).

Trained with the straight-through estimator: the latent weights stay in floating point and are rounded in every forward
pass, so one checkpoint trains and runs the same way:

    scale = mean |W|,   W_q = round(W / scale) clipped to {-1, 0, 1},   y = x_q (W_q scale)^T + b

with x_q the input rounded per token to `activation_bits` bits. Same arithmetic as the online `AutoBitLinear` of
transformers, without its need for a C compiler at run time.

Packed: whole numbers and scales in the checkpoint, products in `kernels_microvlm.py`. `PackedQuantizer` opens such
checkpoints in `from_pretrained`.
"""

import re
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .configuration_microvlm import require
from .kernels_microvlm import DTYPES, Matrix, low_bit_linear, low_bit_linear_mixed
from .llvm_microvlm import BUILDING
from .packing_microvlm import EPS, FORMATS, Scheme, panels_from_bytes, quantize_weight, spread, ternary_quantize

QUANT_METHOD = "microvlm"
# dtypes of numbers and scales -> their names in safetensors
STORED_DTYPES = {torch.uint8: "U8", torch.float16: "F16", torch.float32: "F32"}


# --------------------------------------------------------------------------------------------------- ternary training


def fake_ternary(weight: torch.Tensor, group_size: int | str = "tensor") -> torch.Tensor:
    """Round a weight to three values, in its own dtype, with the identity's gradient."""
    values, scale = ternary_quantize(weight.detach(), group_size)
    rounded = (values * spread(scale, group_size, weight.shape[1])).to(weight.dtype)
    return rounded + (weight - weight.detach())  # an exact zero that carries the gradient


def fake_quantize_activation(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Round (..., C) with one scale per token, in its own dtype, with the identity's gradient."""
    top = 2 ** (bits - 1) - 1
    y = x.detach().float()
    scale = top / y.abs().amax(dim=-1, keepdim=True).clamp(min=EPS)
    y = (y * scale).round().clamp(-top - 1, top) / scale
    return y.to(x.dtype) + (x - x.detach())


class TernaryLinear(nn.Linear):
    """A linear layer that computes with ternary weights and keeps latent ones.

    Args:
        ternary_weights: round the weights; off for weights that are ternary as stored.
        activation_bits: width of the per-token input rounding, or None.
        group_size: of the rounding, see `ternary_quantize`.
    """

    def __init__(
        self,
        *args,
        ternary_weights: bool = True,
        activation_bits: int | None = 8,
        group_size: int | str = "tensor",
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.ternary_weights = ternary_weights
        self.activation_bits = activation_bits
        self.group_size = group_size

    def rounded_weight(self) -> torch.Tensor:
        """Return the weight that `forward` computes with."""
        return fake_ternary(self.weight, self.group_size) if self.ternary_weights else self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.rounded_weight()
        if self.activation_bits is not None:
            x = fake_quantize_activation(x, self.activation_bits)
        return F.linear(x, weight, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ternary_weights={self.ternary_weights}, activation_bits={self.activation_bits}"


def replace_with_ternary(model: nn.Module, patterns: list[str], **options) -> list[str]:
    """Swap the linear layers whose names fully match a pattern for `TernaryLinear`; returns their names."""
    linears = {name: m for name, m in model.named_modules() if type(m) is nn.Linear}
    replaced = []
    for pattern in patterns:
        names = [name for name in linears if re.fullmatch(pattern, name)]
        require(bool(names), f"ternary_modules: {pattern!r} matches no linear layer of the model.")
        # the new layer has the old one's parameters
        for name in names:
            old = linears.pop(name)
            place = {"device": old.weight.device, "dtype": old.weight.dtype}
            new = TernaryLinear(old.in_features, old.out_features, bias=old.bias is not None, **place, **options)
            new.weight, new.bias = old.weight, old.bias
            model.set_submodule(name, new)
        replaced += names
    return replaced


# ------------------------------------------------------------------------------------------------------- packed layers


def kernel_input(x: torch.Tensor) -> torch.Tensor:
    """Convert what the kernels do not take to float32."""
    return x if x.dtype in DTYPES else x.float()


def versions(tensors: Iterable[torch.Tensor]) -> list[tuple]:
    """Return where tensors lie and how often they were written to.

    Equal lists mean equal values, but for what was written through `.data`.
    """
    advice = "torch.export cannot follow packed weights: export model.dequantize()."
    require(not torch.compiler.is_exporting(), advice)
    return [(t.data_ptr(), None if t.is_inference() else t._version) for t in tensors]


class Derived:
    """What is made of tensors and options, and made again when one of them was replaced or written to."""

    def __init__(self):
        self.kept = (), None, None  # tensors, their versions and the options, what was made of them

    def is_current(self, tensors: tuple[torch.Tensor, ...], options: tuple) -> bool:
        before, state, _ = self.kept
        return state == (versions(tensors), options) and all(a is b for a, b in zip(before, tensors))

    def get(self, tensors: tuple[torch.Tensor, ...], make: Callable[[], Any], *options) -> Any:
        """Return what `make` makes of the tensors as they are now; one thread makes it for all."""
        if not self.is_current(tensors, options):
            with BUILDING:
                if not self.is_current(tensors, options):
                    self.kept = tensors, (versions(tensors), options), make()
        return self.kept[2]


class PackedWeight(nn.Module):
    """A matrix (R, C) of whole numbers, stored packed, and its scales.

    The first product lays the numbers out for the kernels, in 2, 4 or 8 bits each; `state_dict` keeps the packed bytes.
    """

    def __init__(self, rows: int, columns: int, scheme: Scheme, device=None):
        super().__init__()
        self.rows, self.columns, self.scheme, self.format = rows, columns, scheme, FORMATS[scheme.format]
        shape = (rows, -(-columns // self.format.per_byte))
        self.register_buffer("weight", torch.zeros(shape, dtype=torch.uint8, device=device))
        scales = torch.ones(scheme.groups(rows, columns), dtype=scheme.scale_dtype, device=device)
        self.register_buffer("weight_scale", scales)
        self._matrix = Derived()

    @torch.no_grad()
    def store(self, weight: torch.Tensor, as_trained: bool = False) -> None:
        """Quantize a matrix (R, C) into this one; `as_trained` rounds like a `TernaryLinear`."""
        if as_trained:
            values, scale = ternary_quantize(weight, self.scheme.group_size)
            values, self.weight_scale = values.to(torch.int8), scale.view(-1, 1) if scale.ndim < 2 else scale
        else:
            values, self.weight_scale = quantize_weight(weight, self.scheme)
        self.weight = self.format.pack(values)

    def check(self, name: str) -> None:
        """Raise a ValueError that names the tensor if its bytes are not of this format, or scales no numbers."""
        if not self.weight.is_meta:
            self.format.check(self.weight, self.columns, f"{name}.weight: ")
            require(bool(self.weight_scale.isfinite().all()), f"{name}.weight_scale has values that are not finite.")

    def values(self, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Return the numbers of some rows, or of all, int8 (N, C)."""
        return self.format.unpack(self.weight if rows is None else F.embedding(rows, self.weight), self.columns)

    def dequantize(self, rows: torch.Tensor | None = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return numbers times scales, of some rows or of all, (N, C)."""
        scale = self.weight_scale.float()
        if rows is not None and len(scale) > 1:
            scale = scale[rows]
        return (self.values(rows).float() * spread(scale, self.scheme.group_size, self.columns)).to(dtype)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Multiply x (..., C) by the transposed matrix and add the bias, (..., R)."""
        # in floating point: unpack the weight
        if not self.whole_numbers:
            if self.scheme.activation_bits is not None:
                x = fake_quantize_activation(x, self.scheme.activation_bits)
            return F.linear(x, self.dequantize(dtype=x.dtype), None if bias is None else bias.to(x.dtype))
        return self.whole_product(x, bias)

    @torch.compiler.disable
    def whole_product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Multiply in whole numbers."""
        bias = None if bias is None else bias.detach().float()
        return low_bit_linear(kernel_input(x), self.matrix(), bias).to(x.dtype)

    @property
    def whole_numbers(self) -> bool:
        """Whether the kernels make the products: rounded inputs, and a scale per tensor or row."""
        return self.scheme.activation_bits == 8 and not isinstance(self.scheme.group_size, int)

    def matrix(self) -> Matrix:
        """Return the weight as the kernels read it, laid out at the first call."""
        return self._matrix.get((self.weight, self.weight_scale), lambda: matrix_of([self]))

    def _apply(self, fn, recurse=True):
        scale = self.weight_scale
        super()._apply(fn, recurse)
        self.weight_scale = scale.to(self.weight.device)  # a new dtype is not for scales
        return self

    def extra_repr(self) -> str:
        return f"{self.columns}, {self.rows}, {self.scheme}"


def matrix_of(weights: list[PackedWeight]) -> Matrix:
    """Stack weights of one format and width, as the kernels read them."""
    first = weights[0]
    packed = torch.cat([w.weight for w in weights]) if len(weights) > 1 else first.weight
    scales = [w.weight_scale.float().flatten().expand(w.rows) for w in weights]
    panels = panels_from_bytes(packed, first.columns, first.format)
    return Matrix(panels, torch.cat(scales), len(packed), first.columns, first.format.bits)


class PackedLinear(PackedWeight):
    """A linear layer (..., in) -> (..., out) with a packed weight."""

    def __init__(self, in_features: int, out_features: int, bias: bool, scheme: Scheme, device=None, dtype=None):
        super().__init__(out_features, in_features, scheme, device)
        self.in_features, self.out_features = in_features, out_features
        self.trained: dict | None = None  # options of the `TernaryLinear` that this one replaces
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x, self.bias)

    @torch.no_grad()
    def unpacked(self, dtype: torch.dtype) -> nn.Linear:
        """Return a floating-point layer with the same weights, a `TernaryLinear` where there was one."""
        weight = self.dequantize()
        kwargs = {"bias": self.bias is not None, "device": weight.device, "dtype": dtype}
        if self.trained is None:
            new = nn.Linear(self.columns, self.rows, **kwargs)
        else:
            new = TernaryLinear(self.columns, self.rows, **kwargs, **self.trained)
            if new.ternary_weights:  # values times scale / mean |values|, whose absmean is the scale
                _, share = ternary_quantize(self.values().float(), new.group_size)
                weight = weight / spread(share, new.group_size, self.columns)
        new.weight.data = weight.to(dtype)
        if self.bias is not None:
            new.bias.data = self.bias.detach().to(dtype)
        return new


@contextmanager
def present(*parts: nn.Module):
    """Have the weights of modules in place, which accelerate's hooks bring for a module's own `forward` alone."""
    away = [m for part in parts for m in part.modules() if "_hf_hook" in vars(m)]
    away = [m for m in away if any(t.is_meta for t in (*m.parameters(False), *m.buffers(False)))]
    for m in away:
        m._hf_hook.pre_forward(m)
    forwards = [vars(m).pop("forward") for m in away]  # which would take them away again
    try:
        yield
    finally:
        for m, forward in zip(away, forwards):
            m.forward = forward
            m._hf_hook.post_forward(m, None)


class PackedEmbedding(nn.Module):
    """A vocabulary (V, D) of packed rows, also the head's matrix when they are tied.

    Frequent rows may have a format of their own. `forward` gives `dtype`.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, scheme: Scheme, device=None, dtype=None):
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.dtype = dtype or torch.get_default_dtype()
        self.rest = PackedWeight(num_embeddings - scheme.frequent_rows, embedding_dim, scheme, device)
        self.frequent = None
        if scheme.frequent_rows:
            own = replace(scheme, format=scheme.frequent_format, frequent_rows=0)
            self.frequent = PackedWeight(scheme.frequent_rows, embedding_dim, own, device)
            bits = torch.zeros(-(-num_embeddings // 8), dtype=torch.uint8, device=device)
            self.register_buffer("is_frequent", bits)  # a bit per row, the first row's lowest
        self._places = Derived()

    @torch.no_grad()
    def store(self, weight: torch.Tensor, counts: torch.Tensor | None = None) -> None:
        """Quantize a vocabulary (V, D); `counts` (V,) say how often its rows are used."""
        if self.frequent is None:
            return self.rest.store(weight)
        require(counts is not None, "frequent_rows needs counts of the tokens.")
        # the most frequent rows, the first of equals
        chosen = torch.zeros(len(weight), dtype=torch.bool)
        chosen[counts.argsort(descending=True, stable=True)[: self.frequent.rows]] = True
        self.frequent.store(weight[chosen])
        self.rest.store(weight[~chosen])
        self.is_frequent = FORMATS["binary"].pack(torch.where(chosen, 1, -1).unsqueeze(0))[0]

    @torch.compiler.disable
    def places(self) -> tuple[torch.Tensor, ...]:
        """Return which rows are frequent (V,), every row's place in its part (V,), and the rows of both parts."""

        def make():
            chosen = FORMATS["binary"].unpack(self.is_frequent.unsqueeze(0), self.num_embeddings)[0] > 0
            place = torch.where(chosen, chosen.cumsum(0), (~chosen).cumsum(0)) - 1
            return chosen, place, *(mask.nonzero().squeeze(1) for mask in (chosen, ~chosen))

        return self._places.get((self.is_frequent,), make)

    def _apply(self, fn, recurse=True):
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        return super()._apply(fn, recurse)

    def check(self, name: str) -> None:
        """Raise a ValueError that names the tensor whose bytes do not fit."""
        self.rest.check(f"{name}.rest")
        if self.frequent is not None and not self.is_frequent.is_meta:
            self.frequent.check(f"{name}.frequent")
            count, expected = int(self.places()[0].sum()), self.frequent.rows
            require(count == expected, f"{name}.is_frequent marks {count} rows of {expected}.")

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return all rows, (V, D)."""
        return self.rows_of(torch.arange(self.num_embeddings, device=self.rest.weight_scale.device), dtype)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Look up the rows (..., D) of tokens (...)."""
        with present(self):
            return self.rows_of(input_ids.flatten(), self.dtype).view(*input_ids.shape, -1)

    def rows_of(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return rows (N, D) of tokens (N,)."""
        if self.frequent is None:
            return self.rest.dequantize(ids, dtype)
        chosen, place = (F.embedding(ids, t.unsqueeze(1)).squeeze(1) for t in self.places()[:2])
        rows = torch.empty(len(ids), self.embedding_dim, dtype=dtype, device=ids.device)
        for part, mask in ((self.frequent, chosen), (self.rest, ~chosen)):
            if len(where := mask.nonzero().squeeze(1)):
                rows[where] = part.dequantize(place[where], dtype)
        return rows

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Compute logits (..., V) of hidden states (..., D)."""
        if self.frequent is None:
            return self.rest.product(x)
        if not self.rest.whole_numbers:
            logits = x.new_empty(*x.shape[:-1], self.num_embeddings)
            for part, where in self.parts():
                logits[..., where] = part.product(x)
            return logits
        return self.whole_product(x)

    @torch.compiler.disable
    def whole_product(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply both parts in whole numbers, in one pass of the kernels."""
        parts = [(part.matrix(), where) for part, where in self.parts()]
        return low_bit_linear_mixed(kernel_input(x), parts).to(x.dtype)

    def parts(self) -> list[tuple[PackedWeight, torch.Tensor]]:
        """Return the two parts, and which rows each holds."""
        return list(zip((self.frequent, self.rest), self.places()[2:]))


class PackedHead(nn.Module):
    """The head of a model with a `PackedEmbedding`, which it shares and does not own."""

    def __init__(self, embedding: PackedEmbedding):
        super().__init__()
        self.shared = (embedding,)  # a tuple: not a submodule, so not saved twice

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with present(*self.shared):
            return self.shared[0].product(x)


# ------------------------------------------------------------------------------------------------- in from_pretrained


class PackedConfig(QuantizationConfigMixin):
    """The `quantization_config` of a packed checkpoint.

    Args:
        modules: regular expression on a module's dotted name, matched whole -> entries of `Scheme`. The first that
            matches counts; a module that none matches stays as it is.
        order: the expressions in the order in which they are tried, as config.json sorts the names of `modules`;
            default: the order of `modules`.
    """

    def __init__(self, modules: dict[str, dict] | None = None, order: list[str] | None = None, **kwargs):
        self.quant_method, where = QUANT_METHOD, "quantization_config"
        objects = isinstance(modules, dict) and all(isinstance(values, dict) for values in modules.values())
        require(objects, f"{where}.modules must be an object of expressions with an object each, got {modules!r}.")
        for pattern in modules:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{where}.modules: {pattern!r} is not a regular expression: {error}.") from error
        ordered = order is None or isinstance(order, list) and sorted(order, key=str) == sorted(modules)
        require(ordered, f"{where}.order must hold every expression of {where}.modules once.")
        # config.json sorts names: another order is kept next to them
        self.modules = {pattern: modules[pattern] for pattern in order or modules}
        if list(self.modules) != sorted(self.modules):
            self.order = list(self.modules)
        self.schemes()

    def schemes(self) -> dict[str, Scheme]:
        """Return the scheme of every expression."""
        known = sorted(f.name for f in fields(Scheme))
        for pattern, values in self.modules.items():
            unknown = sorted(set(values) - set(known))
            require(not unknown, f"{pattern}: unknown key {', '.join(unknown)}. Known: {', '.join(known)}.")
        return {pattern: Scheme(**values) for pattern, values in self.modules.items()}


def packed_module(name: str, module: nn.Linear | nn.Embedding, scheme: Scheme, dtype: torch.dtype | None) -> nn.Module:
    """Make the packed module of the same shape."""
    kwargs = {"device": module.weight.device, "dtype": dtype or module.weight.dtype}
    known = type(module).forward in (nn.Linear.forward, nn.Embedding.forward, TernaryLinear.forward)
    more = f"{name} is a {type(module).__name__}, which does more than look up or multiply its weight"
    require(known, f"{more}: it cannot be packed, leave it out of the modules.")
    if isinstance(module, nn.Embedding):
        return PackedEmbedding(*module.weight.shape, scheme, **kwargs)
    require(not scheme.frequent_rows, f"{name} is a linear layer: frequent_rows is for embeddings.")
    new = PackedLinear(module.in_features, module.out_features, module.bias is not None, scheme, **kwargs)
    if isinstance(module, TernaryLinear):
        options = ("ternary_weights", "activation_bits", "group_size")
        new.trained = {option: getattr(module, option) for option in options}
    return new


def replace_with_packed(
    model: nn.Module, config: PackedConfig, dtype: torch.dtype | None = None
) -> dict[str, nn.Module]:
    """Swap the layers that `config` names for packed ones; returns these by name.

    A tied head follows its embedding. `dtype` is that of the packed embeddings' output and of biases; default: that of
    the weight. The model may be on `meta`. Names are those of the whole model, also for its base model alone.
    """
    new, schemes, unused = {}, config.schemes(), list(config.modules)
    base = getattr(model, "base_model_prefix", "")
    prefix = f"{base}." if base and not hasattr(model, base) else ""
    # make the new modules, the first pattern that matches counts
    for name, module in model.named_modules():
        pattern = next((p for p in schemes if re.fullmatch(p, prefix + name)), None)
        if pattern is not None and isinstance(module, (nn.Linear, nn.Embedding)):
            new[name] = packed_module(name, module, schemes[pattern], dtype)
            unused = [p for p in unused if p != pattern]
    no_layer = "quantization_config.modules: {!r} matches no linear layer or embedding of the model."
    require(not unused, no_layer, *unused)
    for name, module in new.items():
        model.set_submodule(name, module)
    # the head shares a packed vocabulary
    embedding = model.get_input_embeddings()
    if isinstance(embedding, PackedEmbedding) and model.get_output_embeddings() is not None:
        tied = model.config.get_text_config().tie_word_embeddings
        require(tied, "the vocabulary can be packed when the head is tied to it.")
        model.set_output_embeddings(PackedHead(embedding))
        model._tied_weights_keys = model.all_tied_weights_keys = {}
    return new


class PackedQuantizer(HfQuantizer):
    """Opens packed checkpoints in `from_pretrained` and saves them as they are."""

    requires_calibration = True  # `from_pretrained` quantizes nothing: `microvlm pack` writes the checkpoint

    def _process_model_before_weight_loading(self, model, dtype=None, checkpoint_files=None, **kwargs):
        new = replace_with_packed(model, self.quantization_config, dtype)
        packed = {f"{name}.{key}" for name, module in new.items() for key in module.state_dict()}
        state, missing = model.state_dict(), set(packed) if checkpoint_files else set()
        # compare shapes and dtypes with the files, of the whole or the base model, before transformers casts them
        base = f"{getattr(model, 'base_model_prefix', '')}."
        for file in checkpoint_files or []:
            with safe_open(file, framework="pt") as tensors:
                stored = {name.removeprefix(base): name for name in tensors.keys()}
                for name in (name for name in sorted(state) if name.removeprefix(base) in stored):
                    tensor = tensors.get_slice(stored[name.removeprefix(base)])
                    self.check_stored(name, tensor, state[name], name in packed)
                    missing.discard(name)
        require(not missing, "{} is missing in the packed checkpoint.", *sorted(missing))

    @staticmethod
    def check_stored(name: str, stored, expected: torch.Tensor, packed: bool) -> None:
        """Raise a ValueError if a tensor, of a `packed` module or another, is stored otherwise."""
        shape, dtype, wanted = tuple(stored.get_shape()), stored.get_dtype(), tuple(expected.shape)
        require(not packed or shape == wanted, f"{name} has the shape {shape}, expected {wanted}.")
        if packed and not name.endswith(".bias"):
            known = STORED_DTYPES[expected.dtype]
            require(dtype == known, f"{name} is stored as {dtype}, expected {known}.")
        else:  # transformers casts those
            fits = not expected.is_floating_point() or dtype.startswith(("F", "BF"))
            require(fits, f"{name} is stored as {dtype}, expected a floating point type.")

    def _process_model_after_weight_loading(self, model, **kwargs):
        for name, module in model.named_modules():
            if isinstance(module, (PackedEmbedding, PackedLinear)):
                module.check(name)

    def _dequantize(self, model, dtype=None):
        """Swap packed layers for plain ones; ternary layers round to the same numbers again."""
        dtype = dtype or model.dtype
        for name, module in list(model.named_modules()):
            if isinstance(module, PackedEmbedding):
                new = nn.Embedding(module.num_embeddings, module.embedding_dim, dtype=dtype)
                new.weight.data = module.dequantize().to(dtype)
            elif isinstance(module, PackedLinear):
                new = module.unpacked(dtype)
            elif isinstance(module, PackedHead):
                V, D = module.shared[0].num_embeddings, module.shared[0].embedding_dim
                new = nn.Linear(D, V, bias=False, device="meta")  # tied below
            else:
                module.__dict__.pop("_decoder", None)  # of a MicroVLMModel
                continue
            model.set_submodule(name, new.requires_grad_().train(module.training))
        # tie the head again
        model.__dict__.pop("_tied_weights_keys", None)
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
        model.tie_weights()
        # rotary frequencies stay as they are: from_pretrained does not round them either
        frequencies = {name: buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
        model.to(dtype)
        for name, buffer in frequencies.items():
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner).register_buffer(leaf, buffer, persistent=False)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_qat_trainable(self) -> bool:  # `Trainer` asks
        raise ValueError("packed weights do not train: call model.dequantize(torch.float32) first.")


def register_quantizer() -> None:
    """Give transformers the classes of this file for packed checkpoints.

    Every checkpoint brings a copy of this file. `from_pretrained` of the model calls this first, so a model gets the
    classes of its own copy, whichever copy was imported last.
    """
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = PackedConfig
    AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = PackedQuantizer
