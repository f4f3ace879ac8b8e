"""Open a checkpoint in float32 for an export."""

import os
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from ..model import QUANT_METHOD, MicroVLMConfig, MicroVLMForConditionalGeneration


def load_checkpoint(source: str, revision: str | None = None):
    """The model in float32, unpacked, and its tokenizer.

    Raises:
        ValueError: no MicroVLM checkpoint, or one that is stored quantised.
    """
    if not os.path.exists(source) and (source.count("/") != 1 or source.startswith((".", "/"))):
        raise ValueError(f"CHECKPOINT {source!r} is neither a folder on this machine nor a Hub id (owner/name).")
    try:
        values, _ = MicroVLMConfig.get_config_dict(source, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(f"CHECKPOINT {source!r} has no readable config.json: {error}") from error
    if values.get("model_type") != "microvlm":
        raise ValueError(
            f"CHECKPOINT {source!r} is of model_type {values.get('model_type')!r}, expected 'microvlm' (microvlm compose makes one)."
        )
    if "text_config" not in values:
        raise ValueError(f"CHECKPOINT {source!r} has no text_config, so no language model to export.")
    method = (values.get("quantization_config") or {}).get("quant_method")
    if method not in (None, QUANT_METHOD):
        raise ValueError(
            f"CHECKPOINT {source!r} is stored with quant_method {method!r}: export the checkpoint it was made from."
        )
    model, info = MicroVLMForConditionalGeneration.from_pretrained(
        source, revision=revision, dtype=torch.float32, output_loading_info=True
    )
    if info["missing_keys"] or info["mismatched_keys"]:
        names = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
        raise ValueError(f"CHECKPOINT {source!r} lacks {len(names)} of its tensors, such as {names[0]}.")
    if method is not None:
        model = model.dequantize(torch.float32)
    return model.eval(), PreTrainedTokenizerFast.from_pretrained(source, revision=revision)


def check_new(out: Path, force: bool) -> None:
    """Raise ValueError when something at `out` would be overwritten."""
    if out.exists() and not force:
        raise ValueError(f"OUT {out} exists: choose another name, or replace it with --force.")


def quiet() -> None:
    """Turn off what transformers prints while it opens a checkpoint."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
