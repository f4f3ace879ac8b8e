"""Composing: source folders in the layouts of the Hub, small; what is written equals them and runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import compose_hf
import pytest
import timm
import torch
from conftest import ROOT
from microvlm.configuration_microvlm import MicroVLMConfig
from microvlm.modeling_microvlm import MicroVLMForConditionalGeneration
from microvlm.processing_microvlm import MicroVLMProcessor
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, BitNetForCausalLM, LlamaForCausalLM, Qwen2ForCausalLM
from transformers.integrations.bitnet import pack_weights

LAYOUTS = ("qwen2", "llama", "bitnet-online", "bitnet-packed", "bitnet-plain")
TEXT_PREFIX, VISION_PREFIX = "model.language_model.", "model.vision_tower.timm_model."
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
BITNET_CHAT = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = message['role'] | capitalize + ': '"
    "+ message['content'] | trim + '<|eot_id|>' %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)


def write_json(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data, indent=2))


def write_tokenizer(folder: Path, special: list[str], settings: dict, bos: str | None = None) -> int:
    """A byte-level BPE tokenizer in the files of the Hub; returns the number of its tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        ["a red circle", "describe the picture", "what is the capital of france"] * 4, trainer
    )
    tokenizer.add_special_tokens(special)
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))  # vocab.json, merges.txt
    write_json(folder / "tokenizer_config.json", settings)
    return tokenizer.get_vocab_size()


def write_text(folder: Path, layout: str, **sizes) -> Path:
    """A text model as its Hub repo has it: Qwen2.5-0.5B, a Llama in two shards, BitNet 2B-4T latent, packed and plain."""
    folder.mkdir()
    family = layout.split("-")[0]
    if family == "qwen2":
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        settings = {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "chat_template": CHATML,
        }
        tokens = write_tokenizer(folder, special, settings)
        model_class, dtype, rows, bos, eos = Qwen2ForCausalLM, torch.bfloat16, tokens + 9, tokens - 3, tokens - 3
        extra = {"tie_word_embeddings": True, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "hidden_act": "silu"}
        generation = {"bos_token_id": bos, "eos_token_id": eos, "do_sample": False, "max_new_tokens": 2048}
    elif family == "bitnet":
        special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|end_of_text|>",
            "chat_template": BITNET_CHAT,
        }
        rows = write_tokenizer(folder, special, settings, bos="<|begin_of_text|>")
        model_class, dtype, bos, eos = BitNetForCausalLM, torch.bfloat16, rows - 3, rows - 2
        extra = {"tie_word_embeddings": True, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "relu2"}
        extra["auto_map"] = {"AutoConfig": "configuration_bitnet.BitNetConfig"}
        mode = {"bitnet-online": "online", "bitnet-packed": "offline"}.get(layout)
        if mode:
            quantization = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": mode}
            extra["quantization_config"] = quantization
        generation = {"bos_token_id": bos, "eos_token_id": [eos, rows - 1], "do_sample": True, "temperature": 0.6}
    else:
        special = ["<s>", "</s>"]
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
        rows = write_tokenizer(folder, special, settings, bos="<s>")
        model_class, dtype, bos, eos = LlamaForCausalLM, torch.float32, rows - 2, rows - 1
        extra = {"tie_word_embeddings": False, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu"}
        generation = None
    config = {
        "architectures": [model_class.__name__],
        "model_type": family,
        "vocab_size": rows,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **SIZES,
        **extra,
        **sizes,
    }
    write_json(folder / "config.json", config)
    if generation:
        write_json(folder / "generation_config.json", generation)

    torch.manual_seed(0)
    plain = {k: v for k, v in config.items() if k not in ("quantization_config", "auto_map", "torch_dtype")}
    model = model_class(model_class.config_class(**plain)).to(dtype)
    weights = {n: t for n, t in model.state_dict().items() if n != "lm_head.weight" or not extra["tie_word_embeddings"]}
    if layout == "bitnet-packed":
        for name in [n for n in weights if n.endswith("_proj.weight")]:
            values, scale = ternary(weights[name])
            weights[name] = pack_weights(values.clone())
            weights[name.replace(".weight", ".weight_scale")] = scale.reshape(1).to(dtype)
    if family == "llama":
        names = sorted(weights)
        shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
        for file, part in shards.items():
            save_file({n: weights[n] for n in part}, folder / file, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": {n: file for file, part in shards.items() for n in part}}
        write_json(folder / "model.safetensors.index.json", index)
    else:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def ternary(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = weight.float().abs().mean()
    return (weight.float() / scale).round().clamp(-1, 1), scale


def write_vision(folder: Path, **config) -> Path:
    """DeiT-Tiny as `timm/deit_tiny_patch16_224.fb_in1k` has it, classifier included."""
    folder.mkdir()
    torch.manual_seed(0)
    save_file(timm.create_model("deit_tiny_patch16_224").state_dict(), folder / "model.safetensors")
    hub = {
        "architecture": "deit_tiny_patch16_224",
        "num_classes": 1000,
        "num_features": 192,
        "pretrained_cfg": {
            "tag": "fb_in1k",
            "input_size": [3, 224, 224],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 0.9,
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
            "num_classes": 1000,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    write_json(folder / "config.json", hub | config)
    return folder


@pytest.fixture(scope="module", autouse=True)
def eager():
    """BitNet's layers in transformers are compiled functions: run them as they stand."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sources")
    write_vision(root / "vision")
    for layout in LAYOUTS:
        write_text(root / layout, layout)
    return root


@pytest.fixture(scope="module")
def composed(sources, tmp_path_factory) -> Path:
    """A folder with one composed checkpoint per layout."""
    root = tmp_path_factory.mktemp("composed")
    for layout in LAYOUTS:
        compose_hf.compose(str(sources / "vision"), str(sources / layout), root / layout)
    return root


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


@torch.inference_mode()
def logits_of(model, ids: torch.Tensor) -> torch.Tensor:
    return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("layout", LAYOUTS)
def test_written_tensors_equal_the_files_they_come_from(sources, composed, layout):
    written, text, vision = read(composed / layout), read(sources / layout), read(sources / "vision")
    vision = {n: t for n, t in vision.items() if not n.startswith("head.")}
    for name, tensor in vision.items():
        assert torch.equal(written.pop(VISION_PREFIX + name), tensor.to(written["model.adapter.fc1.weight"].dtype)), (
            name
        )
    if layout == "bitnet-packed":
        latent = read(sources / "bitnet-plain")
        for name in [n for n in latent if n.endswith("_proj.weight")]:
            values, scale = ternary(latent[name])
            assert text.pop(name.replace(".weight", ".weight_scale")).dtype == torch.bfloat16
            text[name] = values.bfloat16() * scale.bfloat16()
    for name, tensor in text.items():
        stored = written.pop(name.replace("model.", TEXT_PREFIX, 1) if name.startswith("model.") else name)
        assert torch.equal(stored[: len(tensor)], tensor), name
    assert {n.split(".")[1] for n in written} == {"adapter", "alignment"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_text_logits_equal_the_source_model(sources, composed, layout):
    ids = torch.randint(250, (2, 30), generator=torch.Generator().manual_seed(1))
    source = AutoModelForCausalLM.from_pretrained(sources / layout, dtype="auto")
    model = MicroVLMForConditionalGeneration.from_pretrained(composed / layout)
    assert source.dtype == model.dtype == (torch.float32 if layout == "llama" else torch.bfloat16)
    rounds = model.config.qat_config.ternary_modules is not None
    assert rounds == (layout in ("bitnet-online", "bitnet-packed"))
    if rounds:  # bfloat16 sums of another order flip the 8-bit rounding of activations; float32 sums do not in two layers
        source, model = source.float(), model.float()
    expected = logits_of(source, ids)
    logits = logits_of(model, ids)[..., : expected.shape[-1]]
    assert expected.std() > 0.05
    if rounds:
        assert (logits - expected).norm() < 1e-4 * expected.norm()
    else:
        assert torch.equal(logits, expected)
