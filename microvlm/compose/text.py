"""Open a language model and its tokenizer as a part of a composed checkpoint."""

import re
import textwrap
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    AddedToken,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.bitnet import AutoBitLinear, BitLinear, unpack_weights

from ..hub import check_source
from ..model import fake_quantize_activation, fake_ternary, require

TERNARY_MODULES = r"language_model\.layers\..*_proj"
IMAGE_TOKEN, TEXT_PREFIX = "<image>", "model.language_model."
LAYER_TOLERANCE = 0.01  # of a BitNet layer's norm: what the rounding of a product may change


@dataclass
class TextPart:
    """A causal language model of transformers."""

    model: PreTrainedModel  # computes the logits that the composed model has to match
    tokenizer: PreTrainedTokenizerBase
    weights: dict[str, torch.Tensor]  # of the composed model, by the text model's names; no `lm_head.weight` when tied
    dtype: torch.dtype
    qat: dict  # entries of `qat_config` with which `weights` compute what `model` does
    layout: str  # of the source, for people

    @property
    def vocab_size(self) -> int:
        """Count the rows of the embedding."""
        return len(self.weights["model.embed_tokens.weight"])


def load_text(
    source: str, revision: str | None = None, gguf_file: str | None = None, dtype: torch.dtype | None = None
) -> TextPart:
    """Read a causal language model and its tokenizer; `dtype=None` keeps the checkpoint's."""
    try:
        check_source(source)
        model, tokenizer, info = open_model(source, revision or "main", gguf_file, dtype)
        incomplete = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
        example = min(incomplete, default="none")
        require(not incomplete, f"it lacks {len(incomplete)} of its tensors, such as {example}. Is it complete?")
        # weights as the composed model computes with them
        dtype, weights = dtype or model.dtype, dict(model.state_dict())
        qat, layout = unpack_bitnet(model, weights)
        if model.config.tie_word_embeddings:
            weights.pop("lm_head.weight", None)
        check_names(model, weights)
    except (OSError, ValueError, KeyError) as error:
        reason = textwrap.shorten(str(error), 500)
        raise ValueError(f"--text {source!r} cannot be read as a text model: {reason}") from error
    layout = f"{model.config.model_type}, {layout}" + (f" ({gguf_file}, dequantised)" if gguf_file else "")
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    return TextPart(model.eval(), tokenizer, weights, dtype, qat, layout)


def open_model(source: str, revision: str, gguf_file: str | None, dtype: torch.dtype | None):
    """Open model, tokenizer and loading info with transformers."""
    where = {"revision": revision, "trust_remote_code": False} | ({"gguf_file": gguf_file} if gguf_file else {})
    config = AutoConfig.from_pretrained(source, **where)
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", **where)
    stored = getattr(config, "quantization_config", None) or {}
    method = (stored if isinstance(stored, dict) else stored.to_dict()).get("quant_method")
    if gguf_file:
        where["quantization_config"] = GgufConfig(dequantize=True)
    else:
        expected = "Expected plain weights or BitNet's; quantise the composed checkpoint instead."
        require(method in (None, "bitnet"), f"it is stored with quant_method {method!r}. {expected}")
    # packed layers compute in the dtype of their scales only
    dtype = "auto" if dtype is None or method == "bitnet" else dtype
    with torch.compiler.set_stance("force_eager"):  # BitNet's layers in transformers need a C++ compiler otherwise
        model, info = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True, **where)
    return model, tokenizer, info


def unpack_bitnet(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> tuple[dict, str]:
    """Replace packed BitNet weights in `weights` by plain ones, float32; returns `qat_config` and layout in words."""
    bit_linears = {n: m for n, m in model.named_modules() if isinstance(m, (AutoBitLinear, BitLinear))}
    if not bit_linears:
        return {"ternary_modules": None}, "plain weights"
    linears = {n for n, m in model.named_modules() if isinstance(m, (nn.Linear, BitLinear))}
    projections = {n for n in linears if re.fullmatch(TERNARY_MODULES, n.replace("model.", "language_model.", 1))}
    exception, expected = min(projections ^ set(bit_linears), default=None), "all projections of the decoder layers"
    message = f"BitNet's quantisation is expected on {expected} and on nothing else, but {exception} is an exception."
    require(exception is None, message)
    online = getattr(next(iter(bit_linears.values())), "online_quant", False)
    generator = torch.Generator().manual_seed(0)
    for name, module in bit_linears.items():
        weight, error = unpack_layer(module, online, generator)
        message = f"{name} computes something else once unpacked, by {error:.2e} of its norm."
        require(error <= LAYER_TOLERANCE, message)
        weights[f"{name}.weight"] = weight
        weights.pop(f"{name}.weight_scale", None)
    rounding = "absmean" if online else "none"
    qat = {"ternary_modules": [TERNARY_MODULES], "ternary_weights": rounding, "activation_bits": 8}
    return qat, "latent weights, rounded online" if online else "packed ternary weights, unpacked"


@torch.no_grad()
def unpack_layer(module: nn.Module, online: bool, generator: torch.Generator) -> tuple[torch.Tensor, float]:
    """Unpack the weight of a BitNet layer, float32; returns it and the relative error of what it computes."""
    with torch.compiler.set_stance("force_eager"):
        if isinstance(module, BitLinear):  # y = (x W) / scale
            weight = unpack_weights(module.weight, dtype=torch.float32) / module.weight_scale.float()
        elif online:  # y = x round(W)
            weight = module.weight.float()
        else:  # y = (x W) scale
            weight = module.weight.float() * module.weight_scale.float()
        dtype = module.dtype if isinstance(module, BitLinear) else module.weight.dtype
        # not of unit size: a layer with a norm inside (use_rms_norm) is seen
        x = 4 * torch.randn(4, module.in_features, generator=generator).to(dtype)
        expected = module(x)
        plain = fake_ternary(weight.to(dtype)) if online else weight.to(dtype)
        result = nn.functional.linear(fake_quantize_activation(x, 8), plain, module.bias)
    return weight, ((result - expected).float().norm() / expected.float().norm()).item()


def check_names(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> None:
    """Refuse weights that are not a decoder `model.*` and one linear head."""
    foreign = [
        name
        for name, tensor in weights.items()
        if not (name.startswith("model.") or name == "lm_head.weight") or not tensor.is_floating_point()
    ]
    is_known = "model.embed_tokens.weight" in weights and type(model.get_output_embeddings()) is nn.Linear
    example = f" (found {foreign[0]!r})" if foreign else ""
    require(
        is_known and not foreign,
        f"its family {model.config.model_type!r} has tensors that are not laid out as 'model.embed_tokens', "
        f"'model.layers' and 'lm_head' in floating point{example}. "
        "Expected a text model such as 'qwen2', 'bitnet' or 'llama'.",
    )


def add_image_token(text: TextPart) -> int:
    """Add `<image>` to the tokenizer and, as the mean of all rows, to an embedding that is full; return its id."""
    tokenizer, weights = text.tokenizer, text.weights
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    require(tokenizer.pad_token, "--text: the tokenizer has neither a pad token nor an end-of-text token.")
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    missing = image_token_id + 1 - text.vocab_size
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in weights and missing > 0:
            mean = weights[name].float().mean(0, keepdim=True).to(weights[name].dtype)
            weights[name] = torch.cat([weights[name], mean.expand(missing, -1)])
    return image_token_id
