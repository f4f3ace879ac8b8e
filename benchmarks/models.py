"""Build models for the benchmarks, without storage or with random weights, and their inputs."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

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


def nf4_config(skipped: list[str]) -> BitsAndBytesConfig:
    """Configure NF4 of all linear layers but the skipped ones."""
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    options |= {"bnb_4bit_compute_dtype": torch.bfloat16, "llm_int8_skip_modules": skipped}
    return BitsAndBytesConfig(load_in_4bit=True, **options)


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


# --- other captioners

TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def smolvlm_config(small: bool) -> PreTrainedConfig:
    """Configure SmolVLM-256M-Instruct: SigLIP base at 512 x 512, SmolLM2-135M, untied head."""
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    text = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    text |= {"model_type": "llama", "vocab_size": 49280, "num_key_value_heads": 3, "head_dim": 64}
    text |= {"max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 100000.0}
    side, token = 512, 49190
    if small:
        text |= TINY | {"vocab_size": 512, "num_key_value_heads": 2, "head_dim": 16}
        vision, side, token = TINY, 64, 500
    return transformers.Idefics3Config(
        vision_config=vision | {"image_size": side, "patch_size": 16},
        text_config=text,
        scale_factor=4,
        image_token_id=token,
        pad_token_id=2,
        tie_word_embeddings=False,
    )


def blip_config(small: bool) -> PreTrainedConfig:
    """Configure BLIP-base for captioning: ViT-B/16 at 384 x 384, a 12-layer BERT, a tied head."""
    text, vision = (TINY, TINY | {"image_size": 32}) if small else ({"num_attention_heads": 12}, {"image_size": 384})
    return transformers.BlipConfig(text_config=text, vision_config=vision)


def git_config(small: bool) -> PreTrainedConfig:
    """Configure GIT-base: CLIP ViT-B/16 at 224 x 224 and a 6-layer decoder."""
    text, vision = (TINY, TINY | {"image_size": 32}) if small else ({}, {})
    return transformers.GitConfig(vision_config=vision, **text)


def vit_gpt2_config(small: bool) -> PreTrainedConfig:
    """Configure ViT-GPT2: ViT-B/16 at 224 x 224 and GPT-2 with cross-attention."""
    text, vision = ({"n_embd": 64, "n_layer": 2, "n_head": 4}, TINY | {"image_size": 32}) if small else ({}, {})
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(**vision), transformers.GPT2Config(**text)
    )
    config.decoder_start_token_id = config.pad_token_id = config.decoder.bos_token_id
    config.eos_token_id = config.decoder.eos_token_id
    return config


@dataclass(frozen=True)
class Shape:
    """A published captioner: its model class, its image processor and a function for its config."""

    model: str
    image_processor: str
    config: Callable[[bool], PreTrainedConfig]


SHAPES = {
    "SmolVLM-256M": Shape("Idefics3ForConditionalGeneration", "Idefics3ImageProcessor", smolvlm_config),
    "BLIP-base": Shape("BlipForConditionalGeneration", "BlipImageProcessor", blip_config),
    "GIT-base": Shape("GitForCausalLM", "CLIPImageProcessor", git_config),
    "ViT-GPT2": Shape("VisionEncoderDecoderModel", "ViTImageProcessor", vit_gpt2_config),
}
