"""Composing: source folders in the layouts of the Hub, small; what is written equals them and runs."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from conftest import ROOT, microvlm
from microvlm.configuration_microvlm import MicroVLMConfig
from microvlm.memory_microvlm import MemoryKeyEncoder
from microvlm.modeling_microvlm import MicroVLMForConditionalGeneration, MicroVLMVisionTower
from microvlm.processing_microvlm import MicroVLMProcessor
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitNetForCausalLM,
    GraniteConfig,
    Lfm2Config,
    LlamaForCausalLM,
    Qwen2ForCausalLM,
)
from transformers.integrations.bitnet import pack_weights
from transformers.utils.chat_template_utils import render_jinja_template

from microvlm.compose.compose import compose
from microvlm.compose.prompt import FLATTEN_MESSAGES, chat_template_for
from microvlm.compose.text import load_text
from microvlm.compose.verify import verify
from microvlm.compose.vision import load_vision
from microvlm.export.onnx import export_onnx
from microvlm.visualize.attention import grid, pooling_attention, word_attention

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
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
BITNET_CHAT = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = message['role'] | capitalize + ': ' + message['content'] | trim + '<|eot_id|>' %}"
    "{{ content }}{% endfor %}"
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
    """A text model as its Hub repo has it: Qwen2.5-0.5B, a Llama in two shards, BitNet 2B-4T latent, packed, plain."""
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
        compose(str(sources / "vision"), str(sources / layout), root / layout)
    return root


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


def processor_of(folder: Path) -> MicroVLMProcessor:
    return MicroVLMProcessor.from_pretrained(folder, trust_remote_code=True)  # for the image processor inside


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
    if (
        rounds
    ):  # bfloat16 sums of another order flip the 8-bit rounding of activations; float32 sums do not in two layers
        source, model = torch.nn.Module.float(source), model.float()
    expected = logits_of(source, ids)
    logits = logits_of(model, ids)[..., : expected.shape[-1]]
    assert expected.std() > 0.05
    if rounds:
        assert (logits - expected).norm() < 1e-4 * expected.norm()
    else:
        assert torch.equal(logits, expected)


FRESH_PROCESS = """
import json, sys
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor

results = []
for folder in sys.argv[1:]:
    model, info = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    picture = Image.new("RGB", (40, 30), "red")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "Describe the picture."}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    asked = model.generate(**inputs, **settings)
    alone, start = model.generate(pixel_values=inputs["pixel_values"], **settings), inputs["input_ids"].shape[1]
    results.append(
        {
            "info": [len(info[k]) for k in ("missing_keys", "unexpected_keys", "mismatched_keys")],
            "classes": [type(model).__name__, type(processor).__name__, config.model_type],
            "new": asked.shape[1] - start,
            "same": asked[:, start:].tolist() == alone[:, start:].tolist(),
            "prompt": "Describe" in processor.decode(alone[0], skip_special_tokens=True),
            "text": isinstance(processor.batch_decode(asked)[0], str),
        }
    )
AutoModel.from_pretrained(folder, trust_remote_code=True)
AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
print(json.dumps(results))
"""


def test_opens_and_captions_in_a_fresh_offline_process(composed, tmp_path):
    folders = [str(composed / layout) for layout in ("qwen2", "llama", "bitnet-packed")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    run = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, *folders], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    for layout, result in zip(("qwen2", "llama", "bitnet-packed"), json.loads(run.stdout)):
        assert result["info"] == [0, 0, 0]
        assert result["classes"] == ["MicroVLMForConditionalGeneration", "MicroVLMProcessor", "microvlm"]
        assert result["new"] == 4 and result["text"] and not result["prompt"]
        assert result["same"] == (layout != "llama")  # a base model has no request in its default prompt


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folder_is_complete_and_names_no_source(sources, composed, layout):
    folder = composed / layout
    names = {p.name for p in folder.iterdir()}
    assert names >= {
        "config.json",
        "generation_config.json",
        "processor_config.json",
        "tokenizer.json",
        "model.safetensors",
    }
    assert names >= {
        "chat_template.jinja",
        "modeling_microvlm.py",
        "processing_microvlm.py",
        "configuration_microvlm.py",
    }
    for path in folder.iterdir():
        assert path.stat().st_mode & 0o044 == folder.stat().st_mode & 0o044
        if path.suffix != ".safetensors":
            assert str(sources) not in path.read_text(encoding="utf-8"), path.name
    config = json.loads((folder / "config.json").read_text())
    models = {"AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"}
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel"} | models
    assert "quantization_config" not in config and "quantization_config" not in config["text_config"]
    assert [p.name for p in composed.iterdir() if p.name.startswith(".")] == []


def test_ternary_layers_follow_the_layout(composed):
    found = {}
    for layout in LAYOUTS:
        qat = MicroVLMConfig.from_pretrained(composed / layout).qat_config
        found[layout] = (bool(qat.ternary_modules), qat.ternary_weights, qat.activation_bits)
    assert found["bitnet-online"] == (True, "absmean", 8)
    assert found["bitnet-packed"] == (True, "none", 8)
    assert not any(found[layout][0] for layout in ("qwen2", "llama", "bitnet-plain"))


def test_packed_weights_that_divide_by_their_scale(sources, composed, tmp_path):
    """`linear_class: bitlinear` (HF1BitLLM's Llama) stores the inverse of AutoBitLinear's scale."""
    source = tmp_path / "source"
    shutil.copytree(sources / "bitnet-packed", source)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["linear_class"] = "bitlinear"
    write_json(source / "config.json", config)
    weights = load_file(source / "model.safetensors")
    save_file({n: 1 / t if n.endswith("weight_scale") else t for n, t in weights.items()}, source / "model.safetensors")
    compose(str(sources / "vision"), str(source), tmp_path / "out")
    expected, written = read(composed / "bitnet-packed"), read(tmp_path / "out")
    for name in written:
        torch.testing.assert_close(written[name], expected[name], rtol=2**-7, atol=0, msg=name)


def test_image_token_takes_a_spare_row(sources, composed):
    source, written = read(sources / "qwen2")["model.embed_tokens.weight"], read(composed / "qwen2")
    config = MicroVLMConfig.from_pretrained(composed / "qwen2")
    tokens = len(AutoTokenizer.from_pretrained(sources / "qwen2"))
    assert config.image_token_id == tokens < len(source) == config.text_config.vocab_size
    assert torch.equal(written[TEXT_PREFIX + "embed_tokens.weight"], source)
    assert config.tie_word_embeddings and "lm_head.weight" not in written


def test_image_token_adds_a_row_to_a_full_embedding(sources, composed):
    source, written = read(sources / "llama"), read(composed / "llama")
    config = MicroVLMConfig.from_pretrained(composed / "llama")
    assert config.image_token_id == len(source["lm_head.weight"]) == config.text_config.vocab_size - 1
    assert not config.tie_word_embeddings
    for mine, theirs in (("lm_head.weight", "lm_head.weight"), (TEXT_PREFIX + "embed_tokens.weight",) * 2):
        theirs = source[theirs.replace(TEXT_PREFIX, "model.")]
        assert written[mine].shape == (len(theirs) + 1, theirs.shape[1])
        torch.testing.assert_close(written[mine][-1], theirs.mean(0))
    assert not torch.equal(written["lm_head.weight"], written[TEXT_PREFIX + "embed_tokens.weight"])
    tied = MicroVLMForConditionalGeneration.from_pretrained(composed / "bitnet-plain")
    assert tied.lm_head.weight is tied.model.language_model.embed_tokens.weight


def test_tokenizer_and_generation_config(composed):
    for layout in LAYOUTS:
        processor = processor_of(composed / layout)
        model = MicroVLMForConditionalGeneration.from_pretrained(composed / layout)
        tokenizer, generation, image = processor.tokenizer, model.generation_config, model.config.image_token_id
        assert tokenizer.padding_side == "left"
        assert tokenizer("a<image>b", add_special_tokens=False).input_ids.count(image) == 1
        assert tokenizer.decode([image], skip_special_tokens=True) == ""
        assert generation.suppress_tokens == [image]
        assert generation.pad_token_id == tokenizer.pad_token_id is not None
        eos = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
        assert tokenizer.eos_token_id in eos
        assert len(eos) == (2 if layout.startswith("bitnet") else 1)  # the source's own list


def test_image_processor_is_as_the_vision_tower_was_trained(composed):
    image_processor = processor_of(composed / "qwen2").image_processor
    assert list(image_processor.image_mean) == [0.485, 0.456, 0.406]
    assert list(image_processor.image_std) == [0.229, 0.224, 0.225]
    assert (image_processor.resample, dict(image_processor.size)) == (3, {"height": 224, "width": 224})


TALK = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": " Paris. "},
    {"role": "user", "content": "And of Spain?"},
]


@pytest.mark.parametrize("layout", ["qwen2", "bitnet-plain"])
def test_own_chat_template_is_kept_and_learns_pictures(sources, composed, layout):
    original, processor = (
        AutoTokenizer.from_pretrained(sources / layout),
        processor_of(composed / layout),
    )
    for prompt in (True, False):
        expected = original.apply_chat_template(TALK, tokenize=False, add_generation_prompt=prompt)
        assert processor.apply_chat_template(TALK, add_generation_prompt=prompt) == expected
        assert processor.tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=prompt) == expected
    parts = [
        {"type": "image"},
        {"type": "text", "text": "Describe"},
        {"type": "image"},
        {"type": "text", "text": " both."},
    ]
    flat = [{"role": "user", "content": "<image>Describe<image> both."}]
    assert processor.apply_chat_template([{"role": "user", "content": parts}]) == original.apply_chat_template(
        flat, tokenize=False
    )
    with pytest.raises(Exception, match="got video"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}])


def test_templates_that_begin_with_a_newline_or_text_are_not_eaten():
    for template in (
        "\n  {{ messages[0].content }}",
        "  text\n{{ messages[0].content }}",
        "{{ bos }}\n{{ messages[0].content }}",
    ):
        both = [
            render_jinja_template([TALK], chat_template=t, bos="<s>")[0]
            for t in (template, FLATTEN_MESSAGES + template)
        ]
        assert both[0] == both[1]


def test_plain_chat_template_for_a_base_model(composed):
    processor = processor_of(composed / "llama")
    parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": parts}, TALK[1], TALK[2]], add_generation_prompt=True
    )
    assert text == "User: <image>What is it?\nAssistant: Paris.</s>\nUser: And of Spain?\nAssistant:"
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    out = processor.apply_chat_template([{"role": "system", "content": "Be brief."}, *TALK], **options)
    (ids,), (mask,) = out["input_ids"], out["assistant_masks"]
    assert processor.decode([i for i, on in zip(ids, mask) if on]) == "Paris.</s>"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_messages_of_openai_clients_are_taken(composed, layout):
    """A system message and a picture by its address, with the template that compose writes."""
    file = io.BytesIO()
    Image.new("RGB", (20, 20), "red").save(file, "png")
    url = {"url": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()}
    content = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": url}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
    processor = processor_of(composed / layout)
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, **options)
    said = processor.decode(inputs["input_ids"][0])
    assert said.index("Be brief.") < said.index("What is it?") < said.index("<image>")
    model = MicroVLMForConditionalGeneration.from_pretrained(composed / layout)
    settings = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
    assert model.generate(**inputs.to(model.dtype), **settings).shape[1] == inputs["input_ids"].shape[1] + 2


def test_a_template_that_takes_no_system_message_is_kept(sources, tmp_path, capsys):
    text = shutil.copytree(sources / "qwen2", tmp_path / "text")
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    settings = json.loads((text / "tokenizer_config.json").read_text())
    write_json(text / "tokenizer_config.json", settings | {"chat_template": refusal + CHATML})
    compose(str(sources / "vision"), str(text), tmp_path / "out")
    assert "\nchat template: the text model's own, which takes the roles it takes\n" in capsys.readouterr().out
    processor = processor_of(tmp_path / "out")
    with pytest.raises(Exception, match="^System role not supported$"):
        processor.apply_chat_template([{"role": "system", "content": "Be brief."}, *TALK])
    assert "Spain" in processor.apply_chat_template(TALK)


def test_default_prompt(composed):
    picture = Image.new("RGB", (20, 20))
    for layout, request in (("qwen2", True), ("bitnet-online", True), ("llama", False)):
        processor = processor_of(composed / layout)
        model = MicroVLMForConditionalGeneration.from_pretrained(composed / layout)
        if request:
            content = [{"type": "image", "image": picture}, {"type": "text", "text": "Describe the picture."}]
            expected = processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        else:
            expected = processor(text="<image>", images=picture, return_tensors="pt")
        assert model.default_prompt(1).tolist() == expected["input_ids"].tolist()
    assert model.config.default_prompt_ids == [processor.tokenizer.bos_token_id, processor.image_token_id]


def test_repository_template_is_nanos():
    template = (ROOT / "chat_template.jinja").read_text()

    def render(messages, **kwargs):
        return render_jinja_template([messages], chat_template=template, **kwargs)[0][0]

    parts = [{"type": "image"}, {"type": "text", "text": " What is it?\n"}]
    picture = {"role": "user", "content": parts}
    assert render([picture], add_generation_prompt=True) == "<|user|><image>What is it?<|assistant|>"
    assert render([picture, TALK[1]]) == "<|user|><image>What is it?<|assistant|>Paris.<|endoftext|>"
    assert render(TALK[:2]) == "<|user|>What is the capital of France?<|assistant|>Paris.<|endoftext|>"
    assert render([{"role": "system", "content": "Be brief."}, TALK[0]]) == "<|user|>What is the capital of France?"
    for wrong in ({"role": "tool", "content": "x"}, {"role": "user", "content": [{"type": "video"}]}):
        with pytest.raises(Exception, match="got (tool|video)"):
            render([wrong])
    assert chat_template_for(SimpleNamespace(chat_template=template)) == template  # knows images already


@pytest.mark.parametrize("variant", ["m", "v"])
def test_variant_configs_load_and_survive_saving(variant, tmp_path):
    data = json.loads((ROOT / "configs" / f"microvlm-{variant}.json").read_text())
    config = MicroVLMConfig.from_dict(data)
    text, adapter, memory = config.text_config, config.adapter_config, config.memory_config
    numbers = {
        "m": (2560, 30, 20, 5, 6912, 128256, 4096, 500000.0, 1e-5, "relu2", 128000, 128001),
        "v": (896, 24, 14, 2, 4864, 151936, 32768, 1000000.0, 1e-6, "silu", 151643, 151643),
    }[variant]
    assert numbers == (
        text.hidden_size,
        text.num_hidden_layers,
        text.num_attention_heads,
        text.num_key_value_heads,
        text.intermediate_size,
        text.vocab_size,
        text.max_position_embeddings,
        text.rope_parameters["rope_theta"],
        text.rms_norm_eps,
        text.hidden_act,
        text.bos_token_id,
        text.eos_token_id,
    )
    assert (adapter.mlp_hidden_size, adapter.dropout, adapter.num_prefix_tokens) == (512, 0.1, 25)
    assert (memory.num_slots, memory.code_size) == {"m": (128, 2560), "v": (512, 896)}[variant]
    assert config.tie_word_embeddings and not config.use_fusion
    for section in ("vision", "text", "adapter", "memory", "alignment", "qat"):  # no key that its section does not know
        known = getattr(config, f"{section}_config").to_dict()
        assert {k: known.get(k) for k in data[f"{section}_config"]} == data[f"{section}_config"]
    config.save_pretrained(tmp_path)
    assert MicroVLMConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    with torch.device("meta"):
        model = MicroVLMForConditionalGeneration(config)
    ternary_names = [n for n, m in model.named_modules() if type(m).__name__ == "TernaryLinear"]
    assert len(ternary_names) == {"m": 30 * 7, "v": 0}[variant]


def test_variant_gives_its_sections(sources, tmp_path):
    sizes = {"hidden_size": 896, "intermediate_size": 32, "num_attention_heads": 14, "num_hidden_layers": 1}
    text = write_text(tmp_path / "text", "qwen2", **sizes)
    compose(str(sources / "vision"), str(text), tmp_path / "out", variant="v", dtype=torch.float32)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    wanted = json.loads((ROOT / "configs" / "microvlm-v.json").read_text())
    for section in ("adapter_config", "memory_config", "alignment_config"):
        assert wanted[section].items() <= written[section].items()
    assert written["text_config"]["num_hidden_layers"] == 1 and written["dtype"] == "float32"
    assert {t.dtype for t in read(tmp_path / "out").values()} == {torch.float32}


def test_seed_draws_the_new_modules(sources, composed, tmp_path):
    for seed in (0, 1):
        compose(str(sources / "vision"), str(sources / "qwen2"), tmp_path / str(seed), seed=seed)
    first, second, reference = read(tmp_path / "0"), read(tmp_path / "1"), read(composed / "qwen2")
    for name, tensor in reference.items():
        assert torch.equal(first[name], tensor), name
        new = name.startswith(("model.adapter", "model.alignment")) and tensor.float().std() > 0  # not zeros, not ones
        assert torch.equal(second[name], tensor) != new, name


def test_bare_weight_file_is_our_own_tower(sources, tmp_path):
    weights = {n: t for n, t in read(sources / "vision").items() if not n.startswith("head.")}
    save_file(weights, tmp_path / "tower.safetensors")
    vision = load_vision(str(tmp_path / "tower.safetensors"))
    assert (vision.architecture, vision.mean, vision.std) == ("deit_tiny_patch16_224", [0.5] * 3, [0.5] * 3)
    assert vision.weights.keys() == weights.keys()
    beside = load_vision(str(sources / "vision" / "model.safetensors"))
    assert beside.mean == [0.485, 0.456, 0.406]


def test_vision_weights_as_a_pickle(sources, tmp_path):
    shutil.copy(sources / "vision" / "config.json", tmp_path)
    torch.save(read(sources / "vision"), tmp_path / "pytorch_model.bin")
    assert load_vision(str(tmp_path)).weights.keys() == load_vision(str(sources / "vision")).weights.keys()


@pytest.fixture
def convnet(sources, tmp_path):
    """A convnet, and the folder of a checkpoint with it as vision tower."""
    torch.manual_seed(0)
    convnet = timm.create_model("test_efficientnet", num_classes=0).eval()
    (tmp_path / "vision").mkdir()
    save_file(convnet.state_dict(), tmp_path / "vision" / "model.safetensors")
    write_json(tmp_path / "vision" / "config.json", {"architecture": "test_efficientnet", "num_classes": 0})
    compose(str(tmp_path / "vision"), str(sources / "qwen2"), tmp_path / "out")
    return convnet, tmp_path / "out"


def test_a_convnet_is_a_vision_tower(convnet, tmp_path):
    """Places of the last map are the patches; frozen, its running statistics stay; what is composed saves, loads and
    remembers."""
    convnet, folder = convnet
    model = MicroVLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    side = convnet.default_cfg["input_size"][-1]
    pixel_values = torch.randn(2, 3, side, side)
    with torch.inference_mode():
        expected = convnet.forward_features(pixel_values)
        image = model.get_image_features(pixel_values, return_dict=True)
    N, W, rows, columns = expected.shape
    assert model.config.adapter_config.num_patches == rows * columns
    torch.testing.assert_close(
        image.last_hidden_state, expected.permute(0, 2, 3, 1).reshape(N, rows * columns, W), rtol=1e-3, atol=1e-3
    )
    assert torch.equal(  # nothing of it is taken for a class token
        torch.stack(image.pooler_output), model.model.adapter(image.last_hidden_state)[0]
    )
    model.train()
    assert model.model.vision_tower.timm_model.training
    model.model.vision_tower.requires_grad_(False)
    model.train()
    assert model.training and not any(m.training for m in model.model.vision_tower.modules())
    generated = model.eval().generate(pixel_values=pixel_values, max_new_tokens=3)
    model.save_pretrained(tmp_path / "saved")
    again = MicroVLMForConditionalGeneration.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    assert torch.equal(again.generate(pixel_values=pixel_values, max_new_tokens=3), generated)


SMALL_SWIN = {"img_size": 64, "window_size": 2, "embed_dim": 12, "depths": (1,) * 4, "num_heads": (1,) * 4}


@pytest.mark.parametrize(
    ("architecture", "args", "patches"),
    [
        ("test_vit", {}, 100),
        ("test_convnext", {"num_classes": 7}, 25),
        ("swin_tiny_patch4_window7_224", SMALL_SWIN, 4),
        ("hiera_tiny_224", {"embed_dim": 8, "num_heads": 1, "stages": (1,) * 4}, 49),
        ("repvit_m0_9", {}, 49),
    ],
)
def test_what_timm_saves_is_a_vision_tower(architecture, args, patches, tmp_path):
    """Maps with the width last, tokens without a class token, classifiers with layers of their own."""
    model = timm.create_model(architecture, **args).eval()
    timm.models.save_for_hf(model, tmp_path / "vision")
    part = load_vision(str(tmp_path / "vision"))
    pixel_values = torch.randn(2, 3, *part.image_size)
    config = {"model_type": "timm_wrapper", "architecture": architecture, "model_args": part.model_args}
    tower = MicroVLMVisionTower._from_config(MicroVLMConfig(vision_config=config).vision_config).eval()
    tower.timm_model.load_state_dict(part.weights)
    with torch.inference_mode():
        expected = model.forward_features(pixel_values)
        hidden = tower(pixel_values, do_pooling=False).last_hidden_state
    if expected.ndim == 4 and expected.shape[1] == part.width:
        expected = expected.movedim(1, -1)
    assert part.num_patches == patches and hidden.shape[1] == patches + tower.num_prefix_tokens
    assert torch.equal(hidden, expected.reshape(hidden.shape))


def test_a_convnets_attention_is_drawn_over_its_map(convnet, tmp_path):
    convnet, folder = convnet
    model = MicroVLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = MicroVLMProcessor.from_pretrained(folder, trust_remote_code=True)
    pictures = [Image.effect_noise((70, 50), 90).convert("RGB")]
    pixel_values = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        places = convnet.forward_features(pixel_values).shape[-2:]
    maps = pooling_attention(model, pixel_values)
    assert maps.shape == (1, model.config.num_prefix_tokens, *places)
    words = word_attention(model, processor, pixel_values, processor.tokenizer(["a cat"])["input_ids"])[0]
    assert words.maps.shape[1:] == places


def test_a_convnet_goes_to_onnx(convnet, tmp_path):
    """The graphs are compared with the model in the export itself."""
    for module in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(module)
    out = export_onnx(str(convnet[1]), tmp_path / "onnx")
    assert (out / "onnx" / "vision_encoder.onnx").exists()


@pytest.mark.parametrize(("patches", "size", "rows", "columns"), [(196, 224, 14, 14), (49, 112, 7, 7), (48, 224, 6, 8)])
def test_rows_and_columns_of_patches(patches, size, rows, columns):
    pixel_values = torch.zeros(1, 3, size, size * columns // rows)
    assert grid(patches, pixel_values) == (rows, columns)


def test_keys_without_a_class_token():
    features = torch.randn(2, 6, 4)
    assert torch.equal(MemoryKeyEncoder.pool(features, 0), torch.cat([features.amax(1), features.mean(1)], -1))


def edited(source: Path, target: Path, **changes) -> str:
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text()) | changes
    write_json(target / "config.json", {k: v for k, v in config.items() if v is not None})
    return str(target)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s, t: str(t / "nowhere"), "--vision .* neither a folder on this machine nor a Hub id"),
        (lambda s, t: "owner/never-downloaded", "--vision 'owner/never-downloaded' cannot be .* couldn't connect"),
        (lambda s, t: str(t), "no config.json"),
        (lambda s, t: str(s / "qwen2"), "cannot be read as a timm model: Unknown model"),
        (
            lambda s, t: edited(s / "vision", t / "v", architecture="deit_gigantic"),
            r"Unknown model \(deit_gigantic\)",
        ),
        (
            lambda s, t: edited(s / "vision", t / "v", architecture="pit_ti_224"),
            "neither a vision transformer",
        ),
        (
            lambda s, t: edited(s / "vision", t / "v", architecture="deit_small_patch16_224"),
            "size mismatch for",
        ),
        (
            lambda s, t: edited(s / "vision", t / "v", model_args={"depth": 11}),
            'Unexpected key.*"blocks.11.norm1.weight"',
        ),
        (lambda s, t: edited(s / "vision", t / "v", model_args={"depth": 13}), 'Missing key.*"blocks.12.norm1.weight"'),
    ],
)
def test_wrong_vision_parts_are_refused(sources, tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        load_vision(make(sources, tmp_path))


def incomplete(source: Path, target: Path) -> str:
    edited(source, target)
    weights = load_file(target / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return str(target)


def foreign_family(source: Path, target: Path) -> str:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=300)).save_pretrained(target)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, target)
    return str(target)


PACKED = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s, t: str(t / "nowhere"), "--text .* neither a folder on this machine nor a Hub id"),
        (lambda s, t: str(t), "cannot be read as a text model"),
        (
            lambda s, t: edited(s / "llama", t / "x", model_type="vit"),
            "cannot be read as a text model: Unrecognized configuration class .*ViTConfig",
        ),
        (
            lambda s, t: edited(s / "qwen2", t / "x", quantization_config={"quant_method": "gptq", "bits": 4}),
            "quant_method 'gptq'",
        ),
        (lambda s, t: foreign_family(s / "llama", t / "x"), "family 'gpt2' has tensors that are not laid out"),
        (lambda s, t: incomplete(s / "qwen2", t / "x"), "lacks 1 of its tensors, such as model.layers.1.mlp.up_proj"),
        (
            lambda s, t: edited(
                s / "bitnet-online",
                t / "x",
                quantization_config=PACKED | {"modules_to_not_convert": ["down_proj", "lm_head"]},
            ),
            "model.layers.0.mlp.down_proj is an exception",
        ),
    ],
)
def test_wrong_text_parts_are_refused(sources, tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        load_text(make(sources, tmp_path))


def text_family(folder: Path, source: Path, config_class, **sizes) -> str:
    """A text model of another family, with a tokenizer of `source`."""
    config = config_class(**SIZES | {"vocab_size": 320} | sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return str(folder)


def test_lfm2_composes_and_takes_a_memory(sources, tmp_path, capsys):
    """Its norm has another name, and half of its layers keep no keys and values."""
    text = text_family(tmp_path / "t", sources / "llama", Lfm2Config, layer_types=["conv", "full_attention"])
    compose(str(sources / "vision"), text, tmp_path / "out")
    assert "memory: none. --variant gives one to its parts, `config: {use_memory: true}`" in capsys.readouterr().out
    model = MicroVLMForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    pixel_values = torch.rand(1, 3, 224, 224)
    said = model.generate(pixel_values=pixel_values, max_new_tokens=4, min_new_tokens=4)
    assert torch.equal(said, model.generate(pixel_values=pixel_values, max_new_tokens=4, min_new_tokens=4))
    config = MicroVLMConfig.from_dict(model.config.to_dict() | {"use_memory": True})
    opened = MicroVLMForConditionalGeneration.from_pretrained(tmp_path / "out", config=config).eval()
    assert opened.new_memory().num_rows == 1 and config.full_attention_layers == [1]
    assert torch.equal(said, opened.generate(pixel_values=pixel_values, max_new_tokens=4, min_new_tokens=4))


def test_a_head_that_divides_composes_bit_by_bit(sources, tmp_path, capsys):
    text = text_family(tmp_path / "t", sources / "llama", GraniteConfig, logits_scaling=8.0)
    compose(str(sources / "vision"), text, tmp_path / "out")
    assert "equal bit by bit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("variant", "message"),
    [("v", "text model of width 896 and .*, got a text model of width 64 "), ("xl", "Variants: m, ")],
)
def test_variant_for_other_parts_is_refused(sources, tmp_path, variant, message):
    with pytest.raises(ValueError, match=message):
        compose(str(sources / "vision"), str(sources / "qwen2"), tmp_path / "out", variant=variant)
    assert list(tmp_path.iterdir()) == []


def test_out_is_not_overwritten_by_accident(sources, tmp_path):
    vision, text, out = str(sources / "vision"), str(sources / "qwen2"), tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not empty"):
        compose(vision, text, out)
    with pytest.raises(ValueError, match="has no config.json, so --force does not replace it"):
        compose(vision, text, out, force=True)
    for kept in (vision, str(sources), ROOT, ROOT.parent):
        with pytest.raises(ValueError, match="would overwrite"):
            compose(vision, text, kept, force=True)
    (out / "config.json").write_text("{}")
    compose(vision, text, out, force=True)
    assert not (out / "notes.txt").exists() and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_does_not_verify_is_not_published(sources, composed, tmp_path, monkeypatch):
    weights = {TEXT_PREFIX + "norm.weight": read(sources / "llama")["model.norm.weight"]}
    ids = torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(0))
    right = logits_of(AutoModelForCausalLM.from_pretrained(sources / "llama"), ids)
    for bad, logits, message in (
        ({TEXT_PREFIX + "norm.weight": weights[TEXT_PREFIX + "norm.weight"] + 1e-3}, right, "not equal to its source"),
        ({"model.language_model.other": right}, right, "1 tensors were not written"),
        (weights, right * (1 + 1e-6), "must be equal bit by bit"),
    ):
        with pytest.raises(ValueError, match=message):
            verify(composed / "llama", bad, logits, exact=True)

    for module in ("compose", "verify"):
        monkeypatch.setattr(
            f"microvlm.compose.{module}.text_logits",
            lambda model, size, calls=[]: calls.append(1) or torch.rand(2, 3, size),
        )
    with pytest.raises(ValueError, match="the logits differ"):
        compose(str(sources / "vision"), str(sources / "qwen2"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_command_line(sources, tmp_path, monkeypatch, capsys):
    arguments = ["compose", "--vision", str(sources / "vision"), "--text", str(sources / "qwen2"), "--out"]
    arguments += [str(tmp_path / "out"), "--dtype", "float32", "--seed", "3"]
    assert microvlm(*arguments) == 0
    printed = capsys.readouterr().out
    assert "ok: vision: 150 tensors equal to the source" in printed
    assert "equal bit by bit" in printed and "a spare row" in printed
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.endswith(tuple("0123456789"))}
    size = sum(t.nbytes for t in read(tmp_path / "out").values())
    assert rows["total"][2] == f"{size:,}" and rows["vision_tower"][:2] == ["150", "5,524,416"]
    assert microvlm(*arguments) == 1
    assert re.search("^microvlm: OUT .* exists and is not empty", capsys.readouterr().err, re.MULTILINE)
