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

from . import (
    cache_microvlm as cache,
    configuration_microvlm as configuration,
    kernels_microvlm as kernels,
    memory_microvlm as memory,
    memory_state_microvlm as memory_state,
    modeling_microvlm as modeling,
    processing_microvlm as processing,
    quantization_microvlm as quantization,
)

__all__ = [
    "cache",
    "configuration",
    "kernels",
    "memory",
    "memory_state",
    "modeling",
    "processing",
    "quantization",
    "load",
    "load_plain",
]

MicroVLMConfig = configuration.MicroVLMConfig
MicroVLMForConditionalGeneration = modeling.MicroVLMForConditionalGeneration
MicroVLMImageProcessor = processing.MicroVLMImageProcessor
MicroVLMProcessor = processing.MicroVLMProcessor

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


def load_plain(folder: str | os.PathLike):
    """Open a model in float32 and unpack its weights."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    packed = getattr(model.config, "quantization_config", None) is not None
    return model.dequantize(torch.float32) if packed else model
