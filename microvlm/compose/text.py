"""Open a language model and its tokenizer as a part of a composed checkpoint."""

import re
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AddedToken,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.bitnet import AutoBitLinear, BitLinear, unpack_weights

from ..model import fake_quantize_activation, fake_ternary
from .parts import IMAGE_TOKEN, TERNARY_MODULES, is_local
from .verify import LAYER_TOLERANCE


@dataclass
class TextPart:
    """A causal language model of transformers.

    Args:
        model: computes the logits that the composed model has to match.
        weights: what the composed model stores, under the names of the text model; without `lm_head.weight` when tied.
        dtype: of the composed checkpoint.
        qat: the entries of `qat_config` with which `weights` compute what `model` does.
        layout: what was found, for people.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    weights: dict[str, torch.Tensor]
    dtype: torch.dtype
    qat: dict
    layout: str


def load_text(
    source: str, revision: str | None = None, gguf_file: str | None = None, dtype: torch.dtype | None = None
) -> TextPart:
    """Read a causal language model and its tokenizer.

    Args:
        source: a folder or Hub repo of transformers.
        revision: of the Hub repo.
        gguf_file: name of a GGUF file in `source`, which is dequantised.
        dtype: of the weights; None keeps the checkpoint's.

    Raises:
        ValueError: cannot be read, incomplete, not a decoder that MicroVLM can hold, or stored in a quantisation other
            than BitNet's.
    """
    is_local(source, "--text")
    where = {"revision": revision or "main", "trust_remote_code": False}
    if gguf_file is not None:
        where["gguf_file"] = gguf_file
    try:
        config = AutoConfig.from_pretrained(source, **where)
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", **where)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"--text {source!r} cannot be read as a text model of transformers: {error}") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"--text {source!r} is of the family {config.model_type!r}, which is no causal language model. "
            "Expected one such as 'qwen2', 'bitnet' or 'llama'."
        )
    stored = getattr(config, "quantization_config", None) or {}
    method = (stored if isinstance(stored, dict) else stored.to_dict()).get("quant_method")
    if gguf_file is not None:
        where["quantization_config"] = GgufConfig(dequantize=True)
    elif method not in (None, "bitnet"):
        raise ValueError(
            f"--text {source!r} is stored with quant_method {method!r}. Expected plain weights or BitNet's; "
            "quantise the composed checkpoint instead."
        )
    # packed layers compute in the dtype of their scales only
    load_dtype = "auto" if dtype is None or method == "bitnet" else dtype
    with torch.compiler.set_stance("force_eager"):  # BitNet's layers in transformers need a C++ compiler otherwise
        model, info = AutoModelForCausalLM.from_pretrained(source, dtype=load_dtype, output_loading_info=True, **where)
    incomplete = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if incomplete:
        raise ValueError(
            f"--text {source!r} lacks {len(incomplete)} of its tensors, such as {incomplete[0]}: "
            "is the download complete?"
        )
    dtype = dtype or model.dtype
    weights = dict(model.state_dict())
    qat, layout = unpack_bitnet(model, weights, source)
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    check_names(model, weights, source)
    layout = f"{config.model_type}, {layout}" + (f" ({gguf_file}, dequantised)" if gguf_file else "")
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    return TextPart(model.eval(), tokenizer, weights, dtype, qat, layout)


def unpack_bitnet(model: PreTrainedModel, weights: dict[str, torch.Tensor], source: str) -> tuple[dict, str]:
    """Replace packed BitNet weights in `weights` by plain ones, float32.

    Returns:
        The `qat_config` entries, and the layout found.

    Raises:
        ValueError: a layout that `TernaryLinear` cannot compute.
    """
    bit_linears = {n: m for n, m in model.named_modules() if isinstance(m, (AutoBitLinear, BitLinear))}
    if not bit_linears:
        return {"ternary_modules": None}, "plain weights"
    linears = {n for n, m in model.named_modules() if isinstance(m, (nn.Linear, BitLinear))}
    projections = {n for n in linears if re.fullmatch(TERNARY_MODULES, n.replace("model.", "language_model.", 1))}
    if projections != set(bit_linears):
        raise ValueError(
            f"--text {source!r}: BitNet's quantisation is expected on all projections of the decoder layers and on "
            f"nothing else, but {min(projections ^ set(bit_linears))} is an exception."
        )
    if any(m.rms_norm is not None for m in bit_linears.values()):
        raise ValueError(f"--text {source!r} has use_rms_norm set in its quantization_config, which is not supported.")
    online = getattr(next(iter(bit_linears.values())), "online_quant", False)
    generator = torch.Generator().manual_seed(0)
    for name, module in bit_linears.items():
        with torch.compiler.set_stance("force_eager"), torch.no_grad():
            if isinstance(module, BitLinear):  # y = (x W) / scale
                weight = unpack_weights(module.weight, dtype=torch.float32) / module.weight_scale.float()
            elif online:  # y = x round(W)
                weight = module.weight.float()
            else:  # y = (x W) scale
                weight = module.weight.float() * module.weight_scale.float()
            dtype = module.dtype if isinstance(module, BitLinear) else module.weight.dtype
            x = torch.randn(4, module.in_features, generator=generator).to(dtype)
            expected = module(x)
            used = fake_ternary(weight.to(dtype)) if online else weight.to(dtype)
            given = nn.functional.linear(fake_quantize_activation(x, 8), used, module.bias)
        error = ((given - expected).float().norm() / expected.float().norm()).item()
        if not error <= LAYER_TOLERANCE:
            raise ValueError(
                f"--text {source!r}: {name} computes something else once unpacked, by {error:.2e} of its norm."
            )
        weights[f"{name}.weight"] = weight
        weights.pop(f"{name}.weight_scale", None)
    qat = {
        "ternary_modules": [TERNARY_MODULES],
        "ternary_weights": "absmean" if online else "none",
        "activation_bits": 8,
    }
    return qat, "latent weights, rounded online" if online else "packed ternary weights, unpacked"


def check_names(model: PreTrainedModel, weights: dict[str, torch.Tensor], source: str) -> None:
    """Raise ValueError unless the weights are a decoder `model.*` and one linear head, in floating point."""
    foreign = [n for n in weights if not n.startswith("model.") and n != "lm_head.weight"]
    head = model.get_output_embeddings()
    if "model.embed_tokens.weight" not in weights or foreign or type(head) is not nn.Linear:
        raise ValueError(
            f"--text {source!r} is of the family {model.config.model_type!r}, whose tensors are not laid out as "
            f"'model.embed_tokens', 'model.layers' and 'lm_head'{f' (found {foreign[0]!r})' if foreign else ''}. "
            "Expected a text model such as 'qwen2', 'bitnet' or 'llama'."
        )
    odd = [n for n, t in weights.items() if not t.is_floating_point()]
    if odd:
        raise ValueError(f"--text {source!r}: {odd[0]} is stored as {weights[odd[0]].dtype}, expected floating point.")


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> int:
    """Add `<image>`; pad with the end-of-text token if there is no pad token. Returns the id of `<image>`."""
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError("--text: the tokenizer has neither a pad token nor an end-of-text token.")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)


def grow_vocabulary(weights: dict[str, torch.Tensor], rows: int) -> None:
    """Give embedding and (when not tied) head `rows` rows, in place; new rows are the mean of the old ones."""
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in weights and len(weights[name]) < rows:
            old = weights[name]
            mean = old.float().mean(0, keepdim=True).to(old.dtype)
            weights[name] = torch.cat([old, mean.expand(rows - len(old), -1)])
