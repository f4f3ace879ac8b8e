"""Open checkpoints: the only module of the tools that names the model's own modules.

Importing it registers the classes with transformers. From then on `from_pretrained` gives these classes, with
and without `trust_remote_code`; a folder saved from them carries its code and opens anywhere as remote code.
"""

import os

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)
from transformers.utils import logging

from .cache_microvlm import CACHE_NAME
from .configuration_microvlm import AUTO_MAP, MicroVLMConfig, require
from .memory_microvlm import in_float32
from .memory_state_microvlm import MemoryState
from .modeling_microvlm import MicroVLMForConditionalGeneration
from .processing_microvlm import PIXEL_LIMIT, MicroVLMImageProcessor, MicroVLMProcessor, open_image, to_rgb
from .quantization_microvlm import (
    QUANT_METHOD,
    PackedConfig,
    PackedEmbedding,
    PackedQuantizer,
    PackedWeight,
    TernaryLinear,
    fake_quantize_activation,
    fake_ternary,
    replace_with_packed,
    replace_with_ternary,
    ternary_quantize,
)

AutoConfig.register("microvlm", MicroVLMConfig, exist_ok=True)
for _auto in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    _auto.register(MicroVLMConfig, MicroVLMForConditionalGeneration, exist_ok=True)
AutoProcessor.register(MicroVLMConfig, MicroVLMProcessor, exist_ok=True)
AutoImageProcessor.register(MicroVLMConfig, fast_image_processor_class=MicroVLMImageProcessor, exist_ok=True)


def load(name: str | os.PathLike, revision: str = "main", dtype: str = "auto", device: str | None = None):
    """Open a checkpoint, a folder or a Hub id: the model in evaluation mode and its processor."""
    processor = AutoProcessor.from_pretrained(name, revision=revision)
    device = device or ("cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu")
    model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, device_map=device, revision=revision)
    return model.eval(), processor


def quiet() -> None:
    """Turn off what transformers prints while it opens a checkpoint."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_plain(folder: str | os.PathLike):
    """Open a model in float32 and unpack its weights."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    packed = getattr(model.config, "quantization_config", None) is not None
    return model.dequantize(torch.float32) if packed else model
