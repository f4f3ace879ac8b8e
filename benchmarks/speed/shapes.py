"""Shape the other captioners that are timed."""

from collections.abc import Callable
from dataclasses import dataclass

import transformers
from transformers import PreTrainedConfig

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
