"""Open a checkpoint in float32 for an export."""

import torch
from transformers import PreTrainedTokenizerFast

from ..hub import check_source
from ..model import QUANT_METHOD, MicroVLMConfig, MicroVLMForConditionalGeneration, require


def load_checkpoint(source: str, revision: str | None = None):
    """Open the model in float32, unpacked, and its tokenizer."""
    check_source(source)
    # the config says what it is
    values, _ = MicroVLMConfig.get_config_dict(source, revision=revision)
    kind, method = values.get("model_type"), (values.get("quantization_config") or {}).get("quant_method")
    name, is_ours = f"CHECKPOINT {source!r}", method in (None, QUANT_METHOD)
    require(kind == "microvlm", f"{name} is of model_type {kind!r}, expected 'microvlm'.")
    # the default one has 2.4 billion parameters
    require("text_config" in values, f"{name} has no text_config, so no language model to export.")
    require(is_ours, f"{name} is stored with quant_method {method!r}: export what it was made from.")
    # transformers only warns of weights that are not there
    model, info = MicroVLMForConditionalGeneration.from_pretrained(
        source, revision=revision, dtype=torch.float32, output_loading_info=True
    )
    missing = sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"])))
    require(not missing, f"{name} lacks {len(missing)} of its tensors, such as {min(missing, default='none')}.")
    if method is not None:
        model = model.dequantize(torch.float32)
    return model.eval(), PreTrainedTokenizerFast.from_pretrained(source, revision=revision)


def head_size(text) -> int:
    """Compute the width of an attention head of a text config."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
