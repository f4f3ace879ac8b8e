"""Build models for the benchmarks, without storage or with random weights, and their inputs."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel

from microvlm.files import ROOT
from microvlm.model import MicroVLMConfig, MicroVLMForConditionalGeneration, MicroVLMImageProcessor

CONFIGS = ROOT / "configs"
TEXT_TOKENS = 16  # of a prompt, after the image
# V's architecture so small that a run takes seconds: 64 columns suit NF4, 4,096 tokens nano's tokenizer
SMALL = {
    "vision_config": {"model_args": {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 64, "num_heads": 2}},
    "text_config": {"vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "bos_token_id": 0, "eos_token_id": 0},
    "adapter_config": {"vision_hidden_size": 64, "num_patches": 16, "num_prefix_tokens": 5, "mlp_hidden_size": 32}
    | {"num_attention_heads": 4},
    "alignment_config": {"projection_size": 32},
}


def load_config(path: str | Path) -> MicroVLMConfig:
    """Read a configuration from a JSON file."""
    return MicroVLMConfig.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))


def v_config(small: bool = False, **values) -> MicroVLMConfig:
    """Configure V without its memory module, with `values` changed; tiny with `small`."""
    config = json.loads((CONFIGS / "microvlm-v.json").read_text(encoding="utf-8")) | {"use_memory": False}
    if small:
        config["image_token_id"] = 1
    for section, changes in SMALL.items() if small else ():
        config[section] |= changes
    return MicroVLMConfig.from_dict(config | values)


def build_on_meta(config: MicroVLMConfig) -> PreTrainedModel:
    """Build a model without storage."""
    with torch.device("meta"):
        return MicroVLMForConditionalGeneration(config).eval()


def write_random(config: MicroVLMConfig, folder: str | Path) -> None:
    """Write a bf16 checkpoint of random weights; like `microvlm compose`, it never generates the placeholder."""
    torch.manual_seed(0)
    model = MicroVLMForConditionalGeneration(config).to(torch.bfloat16)
    model.generation_config.suppress_tokens = [config.image_token_id]
    model.save_pretrained(folder)


def load_weights(folder: str | Path) -> PreTrainedModel:
    """Open a checkpoint in the dtype it is stored in; it needs no processor."""
    return AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").eval()


def make_image_processor(model: PreTrainedModel) -> MicroVLMImageProcessor:
    """Make the image processor for the model's image size."""
    height, width = model.model.vision_tower.timm_model.patch_embed.img_size
    return MicroVLMImageProcessor(size={"height": height, "width": width})


def make_prompt(model: PreTrainedModel) -> torch.Tensor:
    """Make token ids (1, P + TEXT_TOKENS): the placeholders of one image, then text."""
    token, vocab_size = model.config.image_token_id, model.config.text_config.vocab_size
    g = torch.Generator().manual_seed(0)
    text = torch.randint(vocab_size - 1, (1, TEXT_TOKENS), generator=g)
    text += text >= token  # every id but the placeholder
    return torch.cat([torch.full((1, model.config.num_prefix_tokens), token), text], dim=1)
