"""Open a checkpoint in float32 for an export."""

import os

import torch
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from ..model import QUANT_METHOD, MicroVLMConfig, MicroVLMForConditionalGeneration


def load_checkpoint(source: str, revision: str | None = None):
    """Open the model in float32, unpacked, and its tokenizer.

    Raises:
        ValueError: no MicroVLM checkpoint, or one in another library's quantized format.
    """
    if not os.path.exists(source) and (source.count("/") != 1 or source.startswith((".", "/"))):
        raise ValueError(f"CHECKPOINT {source!r} is neither a folder on this machine nor a Hub id (owner/name).")
    # the config says what it is
    values, _ = MicroVLMConfig.get_config_dict(source, revision=revision)
    kind, method = values.get("model_type"), (values.get("quantization_config") or {}).get("quant_method")
    if kind != "microvlm":
        raise ValueError(f"CHECKPOINT {source!r} is of model_type {kind!r}, expected 'microvlm'.")
    if "text_config" not in values:
        raise ValueError(f"CHECKPOINT {source!r} has no text_config, so no language model to export.")
    if method not in (None, QUANT_METHOD):
        raise ValueError(f"CHECKPOINT {source!r} is stored with quant_method {method!r}: export what it was made from.")
    # transformers only warns of weights that are not there
    model, info = MicroVLMForConditionalGeneration.from_pretrained(
        source, revision=revision, dtype=torch.float32, output_loading_info=True
    )
    if names := sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"]))):
        raise ValueError(f"CHECKPOINT {source!r} lacks {len(names)} of its tensors, such as {names[0]}.")
    if method is not None:
        model = model.dequantize(torch.float32)
    return model.eval(), PreTrainedTokenizerFast.from_pretrained(source, revision=revision)


def quiet() -> None:
    """Turn off what transformers prints while it opens a checkpoint."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
