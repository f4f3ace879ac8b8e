"""Everything runs offline, on the CPU, on models small enough to build in a moment."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

from microvlm import model as microvlm_model
from microvlm.cli import app

MicroVLMConfig = microvlm_model.MicroVLMConfig
MicroVLMForConditionalGeneration = microvlm_model.MicroVLMForConditionalGeneration

CHAT_TEMPLATE = (ROOT / "chat_template.jinja").read_text()
IMAGE_ID, VOCAB = 4, 128

TEXT = {
    "qwen2": {"model_type": "qwen2"},
    "bitnet": {"model_type": "bitnet"},
    "llama": {"model_type": "llama"},
}
# a layer of another kind, then one of full attention
WINDOW = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6, "head_dim": 8}
RECURRENT = {"layer_types": ["linear_attention", "full_attention"], "head_dim": 8}
HEADS = dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2)
HEADS |= dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8)
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 4}
TEXT |= {
    "gemma3_text": {"model_type": "gemma3_text", **WINDOW},
    "olmo3": {"model_type": "olmo3", **WINDOW},
    "lfm2": {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
    "qwen3_5_text": {"model_type": "qwen3_5_text", **RECURRENT, **HEADS},
    "granitemoehybrid": {"model_type": "granitemoehybrid", **RECURRENT, **MAMBA}
    | {"num_local_experts": 0, "shared_intermediate_size": 64, "logits_scaling": 4.0},
}


def microvlm(*arguments) -> int:
    """Run a command in this process; returns its exit code."""
    with pytest.raises(SystemExit) as end:
        app([str(argument) for argument in arguments], prog_name="microvlm")
    return end.value.code or 0


def text_section(text: str, **kwargs) -> dict:
    """`text_config` of a decoder with two layers."""
    section = TEXT[text] | {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "tie_word_embeddings": True,
    }
    return section | kwargs


def tiny_config(text: str = "qwen2", **kwargs) -> MicroVLMConfig:
    """A two-layer model at 32 x 32 pictures (16 patches of 8 x 8, 5 prefix tokens)."""
    defaults = {
        "text_config": text_section(text),
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": "deit_tiny_patch16_224",
            "do_pooling": False,
            "model_args": {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3},
        },
        "adapter_config": {
            "vision_hidden_size": 24,
            "num_patches": 16,
            "num_prefix_tokens": 5,
            "mlp_hidden_size": 16,
            "num_attention_heads": 4,
            "dropout": 0.0,
        },
        "alignment_config": {"projection_size": 16, "fusion_num_attention_heads": 4},
        "image_token_id": IMAGE_ID,
    }
    return MicroVLMConfig(**(defaults | kwargs))


def tiny_model(text: str = "qwen2", **kwargs) -> MicroVLMForConditionalGeneration:
    torch.manual_seed(0)
    model = MicroVLMForConditionalGeneration(tiny_config(text, **kwargs)).eval()
    model.generation_config.suppress_tokens = [IMAGE_ID]
    with torch.no_grad():  # at the default 0.02 a tiny random decoder says one word for ever: give it something to say
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(6)
    return model


def outspoken_model(text: str, **kwargs) -> MicroVLMForConditionalGeneration:
    """A model whose words depend on the picture and on all that was said, and which never stops by itself."""
    model = tiny_model(text, **kwargs)
    model.generation_config.eos_token_id = None
    pictures = torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features, adapter = model.get_image_features(pictures).last_hidden_state, model.model.adapter
        adapter.calibrate(features[:, 1:])
        adapter.query_tokens.mul_(0.2)
        if model.model.memory is not None:
            key_encoder = model.model.memory.key_encoder
            key_encoder.calibrate(key_encoder.pool(features, 1))
        for layer in (model.model.language_model.layers[i] for i in model.config.full_attention_layers):
            attention = layer.self_attn
            attention.q_proj.weight.mul_(6)
            if hasattr(attention, "q_norm"):  # which undoes that
                attention.q_norm.weight.add_(6)
            (attention.out_proj if hasattr(attention, "out_proj") else attention.o_proj).weight.mul_(3)
    return model


def tiny_inputs(rows: int = 2, length: int = 12, pictures: int = 1, seed: int = 0) -> dict:
    """Rows of `pictures` pictures and some text; no padding."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCAB, (rows, length), generator=g)
    prefix = torch.full((rows, 5 * pictures), IMAGE_ID)
    ids = torch.cat([ids[:, :2], prefix, ids[:, 2:]], 1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(rows * pictures, 3, 32, 32, generator=g),
    }


@pytest.fixture(params=["qwen2", "bitnet", "llama"])
def text_type(request) -> str:
    return request.param
