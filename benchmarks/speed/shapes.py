"""Shapes of the models that are timed: V, its stand-in and other captioners."""

import json
from collections.abc import Callable
from dataclasses import dataclass

import transformers
from transformers import PreTrainedConfig

from benchmarks.parameters import ROOT, MicroVLMConfig

THREADS = 2
STANDIN = {
    "text_config": {"hidden_size": 1024, "num_attention_heads": 16},
    "adapter_config": {"num_attention_heads": 16},
}
SMALL = {
    "vision_config": {"model_args": {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 64, "num_heads": 2}},
    "text_config": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "adapter_config": {
        "vision_hidden_size": 64,
        "num_patches": 16,
        "num_prefix_tokens": 5,
        "mlp_hidden_size": 32,
        "num_attention_heads": 4,
    },
    "alignment_config": {"projection_size": 32},
}
SMALL_STANDIN = {"text_config": {"hidden_size": 256, "intermediate_size": 256}}


def v_config(small: bool = False, standin: bool = False) -> MicroVLMConfig:
    """V without its memory module, or the 1024-wide stand-in; tiny with `small`."""
    config = json.loads((ROOT / "configs" / "microvlm-v.json").read_text(encoding="utf-8")) | {"use_memory": False}
    changes = [STANDIN] if standin else []
    if small:
        changes = [SMALL, SMALL_STANDIN] if standin else [SMALL]
        config["image_token_id"] = 1
    for change in changes:
        for section, values in change.items():
            config[section] |= values
    return MicroVLMConfig.from_dict(config)


def smolvlm_config(small: bool) -> PreTrainedConfig:
    """SmolVLM-256M-Instruct: SigLIP base at 512 x 512 with patches of 16, SmolLM2-135M, untied head."""
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    text = {
        "model_type": "llama",
        "vocab_size": 49280,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "tie_word_embeddings": False,
    }
    side, token = 512, 49190
    if small:
        small_text = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        text |= small_text | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
        vision |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        side, token = 64, 500
    return transformers.Idefics3Config(
        vision_config=vision | {"image_size": side, "patch_size": 16},
        text_config=text,
        scale_factor=4,
        image_token_id=token,
        pad_token_id=2,
        tie_word_embeddings=False,
    )


def blip_config(small: bool) -> PreTrainedConfig:
    """BLIP-base for captioning: ViT-B/16 at 384 x 384 and a 12-layer BERT with cross-attention and a tied head."""
    text, vision = {"num_attention_heads": 12}, {"image_size": 384}
    if small:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        text, vision = sizes, sizes | {"image_size": 32}
    return transformers.BlipConfig(text_config=text, vision_config=vision)


def git_config(small: bool) -> PreTrainedConfig:
    """GIT-base: CLIP ViT-B/16 at 224 x 224 and a 6-layer decoder."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes, vision = (sizes, sizes | {"image_size": 32}) if small else ({}, {})
    return transformers.GitConfig(vision_config=vision, **sizes)


def vit_gpt2_config(small: bool) -> PreTrainedConfig:
    """ViT-GPT2: ViT-B/16 at 224 x 224 and GPT-2 with cross-attention."""
    vision, text = {}, {}
    if small:
        vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        vision, text = vision | {"image_size": 32}, {"n_embd": 64, "n_layer": 2, "n_head": 4}
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
