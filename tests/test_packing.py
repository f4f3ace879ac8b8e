"""Packed weights: bytes by hand, round trips, checkpoints that open and save as they are, and the packed decoder."""

import copy
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from conftest import microvlm, outspoken_model, tiny_inputs, tiny_model
from microvlm.decoder_microvlm import PackedDecoder
from microvlm.modeling_microvlm import MicroVLMModel
from safetensors.torch import load_file, save_file
from toy_data import pairs, toy_checkpoint, use_cache, write_parquet
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments

from microvlm import packing_microvlm as packing, quantization_microvlm as quantization
from microvlm.pack import load_pack_recipe, pack
from microvlm.train.recipe import DataConfig, Recipe
from microvlm.train.setup import load_model

TERNARY = {"ternary_modules": [r"language_model\.layers\..*_proj"]}
LINEARS = r"model\.language_model\.layers\..*_proj"
EVERYTHING = {
    LINEARS: {"format": "ternary"},
    r"model\.language_model\.embed_tokens": {"format": "int8", "group_size": "row", "scale_type": "float16"},
    r"model\.vision_tower\..*": {"format": "int4", "group_size": "row"},
}


# --- bytes


def test_trits_by_hand():
    values = torch.tensor([[-1, 0, 1, 1, -1, 0], [1, 1, 1, 1, 1, 1]])
    packed = packing.FORMATS["ternary"].pack(values)
    first = 0 + 1 * 3 + 2 * 9 + 2 * 27 + 0 * 81
    filled = 3 + 9 + 27 + 81  # four zeros after the sixth column
    assert packed.tolist() == [[first, 1 + filled], [242, 2 + filled]]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("format", list(packing.FORMATS))
def test_round_trip_of_every_length(format, rows):
    form = packing.FORMATS[format]
    for columns in range(1, 42):
        g = torch.Generator().manual_seed(columns)
        values = torch.randint(form.low, form.high + 1, (rows, columns), generator=g, dtype=torch.int8)
        values = values.where((values != 0) | (format != "binary"), 1)
        packed = form.pack(values)
        assert packed.dtype == torch.uint8 and packed.shape == (rows, -(-columns // form.per_byte))
        assert torch.equal(form.unpack(packed, columns), values)


def test_bytes_that_are_no_trits():
    with pytest.raises(ValueError, match="^a byte of five trits is at most 242, got 243.$"):
        packing.FORMATS["ternary"].check(torch.tensor([[0, 243]], dtype=torch.uint8), 10)
    with pytest.raises(ValueError, match=re.escape("11 weights a row take uint8 (rows, 3), got torch.uint8 (1, 2).")):
        packing.FORMATS["ternary"].check(torch.zeros(1, 2, dtype=torch.uint8), 11)


# --- rounding


@pytest.mark.parametrize("group_size", ["tensor", "row", 16])
@pytest.mark.parametrize("format", list(packing.FORMATS))
def test_numbers_are_the_nearest_ones(format, group_size):
    scheme, form = packing.Scheme(format, group_size), packing.FORMATS[format]
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7).view(-1, 1)
    values, scale = packing.quantize_weight(weight, scheme)
    assert values.shape == (6, 40) and scale.shape == {"tensor": (1, 1), "row": (6, 1), 16: (6, 3)}[group_size]
    size = 40 if isinstance(group_size, str) else group_size
    if format == "binary":
        assert torch.equal(values, torch.where(weight < 0, -1, 1).to(torch.int8))
        first = weight[0, :16] if group_size == 16 else weight[0] if group_size == "row" else weight
        assert scale[0, 0] == pytest.approx(first.abs().mean().item(), rel=1e-5)  # the best by least squares
        return
    wide = np.broadcast_to(np.repeat(scale.double().numpy(), size, 1)[:, :40], (6, 40))
    expected = np.clip(np.round(weight.double().numpy() / wide), form.low, form.high)
    assert (values.numpy() == expected).mean() > 0.99  # float64 rounds a tie otherwise
    error = np.abs(values.numpy() * wide - weight.numpy())
    inside = np.abs(weight.numpy() / wide) <= form.high
    assert (error[inside] <= wide[inside] / 2 * 1.001).all()
    if format == "int8":
        assert error.max() < 0.02 * np.abs(weight.numpy()).max()


@pytest.mark.parametrize("group_size", ["tensor", "row", 8])
def test_what_was_trained_is_packed_as_it_was(group_size):
    weight = torch.randn(8, 20)
    scheme = packing.Scheme("ternary", group_size)
    module = quantization.PackedWeight(8, 20, scheme)
    module.store(weight, as_trained=True)
    assert torch.equal(module.dequantize(), quantization.fake_ternary(weight, group_size))
    again = quantization.PackedWeight(8, 20, scheme)
    again.store(module.dequantize())  # ternary already
    torch.testing.assert_close(again.dequantize(), module.dequantize(), rtol=1e-6, atol=0)
    fitted = quantization.PackedWeight(8, 20, scheme)
    fitted.store(weight)
    assert (fitted.dequantize() - weight).square().sum() < (module.dequantize() - weight).square().sum()


@pytest.mark.parametrize(
    "values,message",
    [
        ({"format": "int3"}, "format must be one of binary, ternary, int4, int8, got 'int3'."),
        ({"group_size": 0}, "group_size must be 'tensor', 'row' or a number of columns, got 0."),
        ({"activation_bits": 4}, "activation_bits must be 8 or null, got 4."),
        ({"scale_type": "int8"}, "scale_type must be float16 or float32, got 'int8'."),
        (
            {"colour": 1},
            "x: unknown key colour. "
            "Known: activation_bits, format, frequent_format, frequent_rows, group_size, scale_type.",
        ),
    ],
)
def test_schemes_are_checked(values, message):
    with pytest.raises(ValueError) as error:
        quantization.PackedConfig({"x": values})
    assert str(error.value) == message


# --- modules


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "format,group_size",
    [("binary", "row"), ("ternary", "tensor"), ("int4", "row"), ("int8", "row"), ("int4", 16), ("ternary", 8)],
)
def test_a_packed_linear_layer(format, group_size, bias):
    torch.manual_seed(0)
    for activation_bits in (8, None):
        scheme = packing.Scheme(format, group_size, activation_bits)
        layer = quantization.PackedLinear(40, 24, bias, scheme)
        layer.store(torch.randn(24, 40))
        if bias:
            torch.nn.init.normal_(layer.bias)
        x = torch.randn(2, 3, 40)
        rounded = x if activation_bits is None else quantization.fake_quantize_activation(x, 8)
        expected = rounded.double() @ layer.dequantize().double().mT
        expected = expected if layer.bias is None else expected + layer.bias.double()
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
        assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_a_new_dtype_leaves_scales_and_bytes(tmp_path):
    layer = quantization.PackedLinear(40, 24, True, packing.Scheme("int4", "row"))
    layer.store(torch.randn(24, 40))
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    layer(torch.randn(1, 40))
    layer.bfloat16()
    assert layer.bias.dtype == torch.bfloat16
    for name in ("weight", "weight_scale"):
        assert torch.equal(layer.state_dict()[name], before[name])


def test_frequent_rows_have_their_own_format():
    torch.manual_seed(0)
    scheme = packing.Scheme("ternary", "row", frequent_rows=7)
    embedding = quantization.PackedEmbedding(50, 16, scheme)
    weight, counts = torch.randn(50, 16), torch.randperm(50)
    embedding.store(weight, counts)
    error = (embedding.dequantize() - weight).abs().amax(1)
    assert set(error.argsort()[:7].tolist()) == set(counts.argsort(descending=True)[:7].tolist())
    ids = torch.tensor([[3, 49, 0], [3, 3, 11]])
    assert torch.equal(embedding(ids), embedding.dequantize()[ids])
    halved = copy.deepcopy(embedding).bfloat16()  # its rows come in bfloat16, what it stands for does not
    assert halved(ids).dtype == torch.bfloat16
    assert torch.equal(halved.dequantize(), embedding.dequantize())
    x = torch.randn(2, 3, 16)
    expected = quantization.fake_quantize_activation(x, 8) @ embedding.dequantize().mT
    torch.testing.assert_close(embedding.product(x), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="^frequent_rows needs counts of the tokens.$"):
        embedding.store(weight)


# --- a whole model


def packed(model, modules=None):
    pack(model, quantization.PackedConfig(modules or EVERYTHING))
    return model.eval()


def generic(model, **inputs):
    """Logits without the packed decoder."""
    model.model._decoder = None
    try:
        return model(**inputs).logits
    finally:
        del model.model._decoder


@torch.no_grad()
@pytest.mark.parametrize("group_size", ["tensor", 8])
def test_packing_what_was_trained_ternary_loses_nothing(group_size):
    model, inputs = tiny_model("bitnet", qat_config=TERNARY | {"group_size": group_size}), tiny_inputs()
    plain = model(**inputs).logits
    with pytest.raises(ValueError, match="was trained ternary with group_size"):
        packed(tiny_model("bitnet", qat_config=TERNARY | {"group_size": group_size}), {LINEARS: {"format": "int4"}})
    packed(model, {LINEARS: {"format": "ternary", "group_size": group_size}})
    torch.testing.assert_close(generic(model, **inputs), plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(**inputs).logits, plain, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_packed_decoder_is_the_language_model(text_type):
    model = packed(outspoken_model(text_type))
    assert PackedDecoder.supports(model.model.language_model)
    inputs = tiny_inputs(3)
    inputs["attention_mask"][1, :2] = 0
    logits = model(**inputs).logits
    assert isinstance(model.model._decoder, PackedDecoder)
    seen = inputs["attention_mask"].bool()
    # a number on the edge of a rounding step moves a logit; nearly all are equal
    difference = (logits - generic(model, **inputs))[seen].abs()
    assert difference.median() < 1e-4 * logits.std() and difference.max() < 0.05 * logits.std()
    single = {k: v[1:2, 2:] if k != "pixel_values" else v[1:2] for k, v in inputs.items()}
    torch.testing.assert_close(model(**single).logits[0], logits[1, 2:], rtol=1e-3, atol=1e-3)

    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation({"text_config": implementation})
        one = {k: v[:1] for k, v in inputs.items()}
        whole = model.generate(**one, max_new_tokens=12, do_sample=False)
        assert torch.equal(model.generate(**one, max_new_tokens=12, do_sample=False, use_cache=False), whole)
        assert torch.equal(
            model.generate(**one, max_new_tokens=12, do_sample=False, cache_implementation="static"), whole
        )
    hidden = model(**inputs, output_hidden_states=True).hidden_states  # the language model's own way
    assert len(hidden) == 3


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_decoder_with_a_plain_vocabulary(dtype):
    model = packed(outspoken_model("qwen2"), {LINEARS: {"format": "ternary"}}).to(dtype)
    inputs = {k: v.to(dtype) if k == "pixel_values" else v for k, v in tiny_inputs().items()}
    logits = model(**inputs).logits
    expected = generic(model, **inputs)
    assert logits.dtype == expected.dtype == dtype
    assert (logits - expected).abs().median() < 0.05 * expected.std()
    assert model.generate(**inputs, max_new_tokens=4).shape[1] == inputs["input_ids"].shape[1] + 4


@torch.no_grad()
def test_a_memory_is_read_by_the_packed_decoder():
    memory_config = {"num_slots": 16, "code_size": 32, "num_content_slots": 4, "num_memory_tokens": 4}
    memory_config |= {"max_content_tokens": 16, "key_hidden_size": 32, "scope_hidden_size": 16}
    model = packed(outspoken_model("qwen2", use_memory=True, memory_config=memory_config))
    fact, question = tiny_inputs(1), tiny_inputs(1, length=4)
    memory = model.write_memory(**fact)
    plain = model(**question).logits
    logits = model(**question, memory=memory, memory_gate="on").logits
    assert not torch.allclose(logits, plain, atol=1e-2)
    torch.testing.assert_close(
        generic(model, **question, memory=memory, memory_gate="on"), logits, rtol=1e-3, atol=1e-2
    )
    assert model.memory_fingerprint() == model.memory_fingerprint()


def test_pickled_it_says_the_same():
    model, inputs = packed(outspoken_model("qwen2")), tiny_inputs(1)
    with torch.no_grad():
        expected = model(**inputs).logits  # which lays weights out and makes a decoder
        assert torch.equal(pickle.loads(pickle.dumps(model))(**inputs).logits, expected)


@torch.no_grad()
def test_what_is_for_the_loss_alone_changes_no_logits():
    model, inputs = packed(outspoken_model("qwen2")), tiny_inputs()
    labels = inputs["input_ids"]
    expected = model(**inputs, labels=labels)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    for kwargs in ({"shift_labels": shifted}, {"num_items_in_batch": shifted.ne(-100).sum()}):
        got = model(**inputs, labels=labels, **kwargs)
        assert torch.equal(got.logits, expected.logits)
        torch.testing.assert_close(got.loss, expected.loss)
    model(**inputs, token_type_ids=torch.zeros_like(labels))  # a tensor, which is neither true nor false


def test_gradients_go_around_it():
    model, inputs = packed(tiny_model()), tiny_inputs()
    embeds = model.get_input_embeddings()(inputs["input_ids"]).requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            PackedDecoder, "__call__", lambda *args, **kwargs: pytest.fail("the packed decoder has no gradient")
        )
        model.model(inputs_embeds=embeds)
        assert model.train().model.packed_decoder() is None


def test_a_plain_model_has_no_packed_decoder():
    assert tiny_model().model.packed_decoder() is None


# --- checkpoints


@pytest.fixture
def checkpoint(tmp_path):
    model = packed(tiny_model("qwen2", qat_config=TERNARY))
    model.save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


def reopen(folder, **kwargs):
    return AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, **kwargs)


def run_alone(code, *arguments):
    """What code prints in a process that knows no package of this repository."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    folder = arguments[0].parent
    environment["HF_MODULES_CACHE"] = str(folder / "modules")
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_opens_directly_and_saves_bit_for_bit(checkpoint, tmp_path):
    stored = load_file(checkpoint / "model.safetensors")
    assert stored["model.language_model.layers.0.mlp.down_proj.weight"].shape == (32, 13)  # 64 columns, 5 to a byte
    assert not any(name.startswith("lm_head") for name in stored)
    assert json.loads((checkpoint / "config.json").read_text())["quantization_config"]["quant_method"] == "microvlm"
    model = reopen(checkpoint)
    inputs = tiny_inputs()
    with torch.no_grad():
        logits = model(**inputs).logits
    model.save_pretrained(tmp_path / "again")
    again = (tmp_path / "again" / "model.safetensors").read_bytes()
    assert again == (checkpoint / "model.safetensors").read_bytes()
    with torch.no_grad():
        torch.testing.assert_close(reopen(tmp_path / "again")(**inputs).logits, logits)


@torch.no_grad()
def test_the_base_model_opens_alone(checkpoint, tmp_path):
    whole, inputs = reopen(checkpoint), tiny_inputs()
    states = whole.model(**inputs).last_hidden_state
    base = MicroVLMModel.from_pretrained(checkpoint)
    assert base(**inputs).last_hidden_state.equal(states)
    base.save_pretrained(tmp_path)
    assert MicroVLMModel.from_pretrained(tmp_path)(**inputs).last_hidden_state.equal(states)
    assert reopen(tmp_path)(**inputs).logits.equal(whole(**inputs).logits)


def test_packed_weights_count_as_what_they_unpack_to(checkpoint):
    packed = reopen(checkpoint)
    plain = reopen(checkpoint).dequantize()
    for options in ({}, {"exclude_embeddings": True}):
        assert packed.num_parameters(**options) == plain.num_parameters(**options)
    assert packed.num_parameters(only_trainable=True) < plain.num_parameters(only_trainable=True)


@torch.no_grad()
def test_hooks_of_packed_layers_are_called(checkpoint):
    model, inputs, calls = reopen(checkpoint), tiny_inputs(), []
    logits = model(**inputs).logits
    assert model.model.packed_decoder() is not None
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        hook = getattr(model.model.language_model.layers[1].mlp, register)(lambda *_: calls.append(1))
        torch.testing.assert_close(model(**inputs).logits, logits)
        hook.remove()
    assert len(calls) == 2 and model(**inputs).logits.equal(logits)


def test_trainer_says_what_packed_weights_need(checkpoint, tmp_path):
    arguments = TrainingArguments(output_dir=tmp_path, report_to=[], use_cpu=True)
    with pytest.raises(ValueError, match=r"^packed weights do not train: call model.dequantize\(torch.float32\) first"):
        Trainer(reopen(checkpoint), arguments)
    Trainer(reopen(checkpoint).dequantize(torch.float32), arguments)


@pytest.mark.parametrize("group_size", ["tensor", "row"])
def test_dequantizes_into_a_model_that_trains(tmp_path, group_size):
    schemes = EVERYTHING | {LINEARS: {"format": "ternary", "group_size": group_size}}
    model = tiny_model("qwen2", qat_config=TERNARY | {"group_size": group_size})
    inputs = tiny_inputs()
    packed(model, schemes).save_pretrained(tmp_path / "packed")
    opened = reopen(tmp_path / "packed")
    with torch.no_grad():
        expected = generic(opened, **inputs)
        fast = opened(**inputs).logits  # makes a packed decoder, which must not stay
    plain = opened.dequantize()
    assert not any(isinstance(m, (quantization.PackedWeight, quantization.PackedHead)) for m in plain.modules())
    assert plain.lm_head.weight is plain.get_input_embeddings().weight
    layer = plain.model.language_model.layers[0].mlp.down_proj
    before = reopen(tmp_path / "packed").model.language_model.layers[0].mlp.down_proj
    torch.testing.assert_close(layer.rounded_weight(), before.dequantize(), rtol=1e-6, atol=0)
    logits = plain.eval()(**inputs).logits
    # the vision tower and the head round no inputs any more, the decoder's layers do
    assert (logits - expected).abs().median() < 0.05 * expected.std() and fast.shape == logits.shape
    plain.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in plain.model.language_model.parameters())
    plain.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    with torch.no_grad():
        torch.testing.assert_close(reopen(tmp_path / "plain").eval()(**inputs).logits, plain.eval()(**inputs).logits)


def test_unpacked_to_bfloat16_it_is_what_is_loaded(checkpoint, tmp_path):
    """Rotary frequencies stay float32 in both."""
    model = reopen(checkpoint).dequantize(torch.bfloat16)
    model.save_pretrained(tmp_path / "plain")
    inputs = tiny_inputs() | {"pixel_values": tiny_inputs()["pixel_values"].bfloat16()}
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, reopen(tmp_path / "plain", dtype=torch.bfloat16)(**inputs).logits)


@torch.no_grad()
def test_float16(checkpoint):
    """The kernels do not take it: products are made in float32."""
    inputs = tiny_inputs()
    expected = reopen(checkpoint)(**inputs).logits
    got = reopen(checkpoint, dtype=torch.float16)(**inputs | {"pixel_values": inputs["pixel_values"].half()}).logits
    torch.testing.assert_close(got.float(), expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


def test_a_packed_vocabulary_is_not_resized(checkpoint):
    with pytest.raises(ValueError, match=r"^a packed vocabulary cannot be resized: call dequantize\(\) first.$"):
        reopen(checkpoint).resize_token_embeddings(200)


WAYS = """
import json, sys
import torch
from transformers import AutoModel, AutoModelForImageTextToText, pipeline
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

folder = sys.argv[1]
name = "modeling_microvlm.MicroVLMForConditionalGeneration"
ways = {
    "AutoModel": lambda: AutoModel.from_pretrained(folder, trust_remote_code=True),
    "AutoModelForImageTextToText": lambda: AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True),
    "pipeline": lambda: pipeline("image-text-to-text", model=folder, trust_remote_code=True).model,
    "class": lambda: get_class_from_dynamic_module(name, folder).from_pretrained(folder),
}
for way, load in ways.items():
    assert "microvlm" not in AUTO_QUANTIZER_MAPPING
    model = load()
    assert type(model).__module__.startswith("transformers_modules.")
    print(way, type(model.lm_head).__name__, type(model.config.quantization_config).__name__)
    # the next way finds the process as new
    del AUTO_QUANTIZER_MAPPING["microvlm"], AUTO_QUANTIZATION_CONFIG_MAPPING["microvlm"]
    for module in [module for module in sys.modules if module.startswith("transformers_modules.")]:
        del sys.modules[module]
"""


def test_opens_in_a_fresh_process(tmp_path):
    folder = toy_checkpoint(tmp_path / "plain")
    model = packed(reopen(folder))
    model.save_pretrained(folder)
    ways = ("AutoModel", "AutoModelForImageTextToText", "pipeline", "class")
    assert run_alone(WAYS, folder) == [f"{way} PackedHead PackedConfig" for way in ways]


COPIES = """
import sys
import torch
from transformers import AutoModel

first, second = sys.argv[1:]
inputs = {
    "input_ids": torch.tensor([[9, 4, 4, 4, 4, 4, 7]]),
    "pixel_values": torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
}


def open_copy(folder):
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    package = type(model).__module__.rpartition(".")[0]
    layer = model.model.language_model.layers[0].mlp.down_proj
    modules = {type(part).__module__ for part in (layer, model.hf_quantizer, model.config.quantization_config)}
    assert modules == {f"{package}.quantization_microvlm"} and layer.trained is not None
    return model


@torch.no_grad()
def caption(model):
    assert model.model.packed_decoder() is not None
    return model.generate(**inputs, max_new_tokens=12, do_sample=False).tolist()


def plain_logits(model):
    plain = model.dequantize()
    assert not [m for m in plain.modules() if type(m).__name__.startswith("Packed")]
    return plain(**inputs).logits


models = [open_copy(first)]
expected = caption(models[0])
models += [open_copy(second), open_copy(first)]
assert type(models[0]) is type(models[2]) is not type(models[1])
assert [hasattr(sys.modules[type(m.lm_head).__module__], "SECOND") for m in models] == [False, True, False]
captions = [caption(m) for m in models]
logits = [plain_logits(m) for m in models]
assert captions[0] == captions[2] == expected and torch.equal(logits[0], logits[2])
assert captions[1] != expected and not torch.equal(logits[0], logits[1])
print("done")
"""


def test_each_model_keeps_the_code_of_its_copy(tmp_path):
    """Two checkpoints with different code, opened in one process: first, second, first again."""
    for shift, name in enumerate(("first", "second")):
        model = outspoken_model("qwen2", qat_config=TERNARY)
        vocabulary = model.get_input_embeddings().weight
        vocabulary.data = vocabulary.data.roll(shift, 0)
        packed(model).save_pretrained(tmp_path / name)
    with (tmp_path / "second" / "quantization_microvlm.py").open("a") as file:
        file.write("\n\nSECOND = True\n")
    assert run_alone(COPIES, tmp_path / "first", tmp_path / "second") == ["done"]


@torch.no_grad()
def test_new_weights_are_seen():
    first, second = outspoken_model("qwen2"), outspoken_model("qwen2")
    for p in second.model.language_model.parameters():
        p.add_(0.3 * p.std().nan_to_num() * torch.randn_like(p))
    first, second = packed(first), packed(second)
    inputs = tiny_inputs(1)
    before, expected = first(**inputs).logits, second(**inputs).logits
    assert not torch.allclose(before, expected, atol=1e-2)
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(**inputs).logits, expected)


def mixed_vocabulary(rows: int = 60) -> quantization.PackedEmbedding:
    embedding = quantization.PackedEmbedding(rows, 32, packing.Scheme("binary", "row", frequent_rows=9))
    embedding.store(torch.randn(rows, 32), torch.randperm(rows))
    return embedding


@torch.no_grad()
def test_weights_changed_in_place_are_seen():
    """In every layer; the decoder's own test is `test_new_weights_are_seen`."""
    model = packed(outspoken_model("qwen2"), EVERYTHING | {r"model\.adapter\.(fc1|fc2)": {"format": "int8"}})
    layers = [module for module in model.modules() if isinstance(module, quantization.PackedLinear)]
    assert len(layers) > 15
    for layer in layers:
        x, bias = torch.randn(3, layer.columns), 0 if layer.bias is None else layer.bias
        before = layer(x)
        layer.weight_scale.mul_(2)
        torch.testing.assert_close(layer(x) - bias, 2 * (before - bias), rtol=1e-4, atol=1e-4)
        layer.weight.copy_(layer.format.pack(torch.zeros(layer.rows, layer.columns, dtype=torch.int8)))
        torch.testing.assert_close(layer(x) - bias, torch.zeros_like(before))


@torch.no_grad()
@pytest.mark.parametrize("part", ["rest", "frequent"])
def test_a_vocabulary_changed_in_place_is_seen(part):
    embedding = mixed_vocabulary()
    x = torch.randn(2, embedding.embedding_dim)
    before = embedding.product(x)
    changed = getattr(embedding, part)
    changed.weight_scale.mul_(2)
    rows = dict(zip(("frequent", "rest"), embedding.places()[2:]))[part]
    expected = before.clone()
    expected[:, rows] *= 2
    torch.testing.assert_close(embedding.product(x), expected)


@torch.no_grad()
def test_threads_that_use_a_vocabulary_first_see_it_whole():
    ids, x = torch.arange(60), torch.randn(1, 32)
    for _ in range(20):
        embedding = mixed_vocabulary()
        barrier, found = threading.Barrier(4), []

        def use(embedding=embedding, barrier=barrier, found=found):
            barrier.wait()
            found.append((embedding(ids), embedding.product(x)))

        threads = [threading.Thread(target=use) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        expected = embedding(ids), embedding.product(x)
        assert len(found) == 4 and all(torch.equal(a, b) for pair in found for a, b in zip(pair, expected))


@pytest.mark.parametrize("token", [-1, 60])
def test_a_token_outside_the_vocabulary_is_an_index_error(token):
    plain = quantization.PackedEmbedding(60, 32, packing.Scheme("int8", "row"))
    for embedding in (plain, mixed_vocabulary()):
        with pytest.raises(IndexError, match="out of (range|bounds)"):
            embedding(torch.tensor([[3, token]]))


def test_export_says_what_to_do():
    model = packed(tiny_model("qwen2"))
    with pytest.raises(ValueError, match=r"export model.dequantize\(\)"):
        torch.export.export(model, (), tiny_inputs(), strict=False)


@torch.no_grad()
def test_double_precision_around_packed_weights():
    model = packed(outspoken_model("qwen2"))
    expected, inputs = model(**tiny_inputs()).logits, tiny_inputs()
    inputs["pixel_values"] = inputs["pixel_values"].double()
    logits = model.double()(**inputs).logits
    assert (logits - expected).abs().max() < 0.05 * expected.std()


def test_on_meta_it_is_only_shapes(checkpoint):
    model = reopen(checkpoint, device_map="meta")
    assert all(t.is_meta for t in model.state_dict().values())


@pytest.mark.parametrize(
    "kwargs",
    [{"dtype": torch.bfloat16}, {"device_map": "cpu"}, {"low_cpu_mem_usage": True}, {"dtype": "auto"}],
    ids=str,
)
def test_arguments_of_from_pretrained(checkpoint, kwargs):
    model = reopen(checkpoint, **kwargs)
    dtype = kwargs.get("dtype") if isinstance(kwargs.get("dtype"), torch.dtype) else torch.float32
    assert model.get_input_embeddings()(torch.tensor([1])).dtype == model.dtype == dtype
    inputs = tiny_inputs()
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with torch.no_grad():
        logits = model(**inputs).logits.float()
        expected = reopen(checkpoint)(**tiny_inputs()).logits
    scales = "model.language_model.embed_tokens.rest.weight_scale"
    assert model.state_dict()[scales].dtype == torch.float16
    assert (
        (logits - expected).abs().max() < 0.1 * expected.std()
        if dtype == torch.bfloat16
        else torch.equal(logits, expected)
    )


@pytest.mark.parametrize(
    "damage,message",
    [
        (
            lambda t: t.fill_(243),
            "model.language_model.layers.1.mlp.up_proj.weight: a byte of five trits is at most 242, got 243.",
        ),
        (
            lambda t: t[:, :-1].contiguous(),
            "model.language_model.layers.1.mlp.up_proj.weight has the shape (64, 6), expected (64, 7).",
        ),
    ],
    ids=["byte", "shape"],
)
def test_damaged_weights_are_refused_by_name(checkpoint, damage, message):
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    tensors = load_file(checkpoint / "model.safetensors")
    tensors[name] = damage(tensors[name])
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError)) as error:
        reopen(checkpoint)
    assert message in str(error.value)


def test_a_scale_that_is_no_number_is_refused(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    name = "model.language_model.layers.1.mlp.up_proj.weight_scale"
    tensors[name][0] = float("nan")
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"^{name} has values that are not finite.$"):
        reopen(checkpoint)


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(
        ValueError, match="^quantization_config.modules: 'decoder' matches no linear layer or embedding of the model.$"
    ):
        packed(tiny_model(), {"decoder": {}})
    with pytest.raises(ValueError, match="is a linear layer: frequent_rows is for embeddings.$"):
        packed(tiny_model(), {LINEARS: {"frequent_rows": 3}})


# --- microvlm pack


def test_quantize_a_checkpoint(tmp_path, monkeypatch, capsys):
    use_cache(monkeypatch, tmp_path / "cache")
    start = toy_checkpoint(tmp_path / "start", qat_config=TERNARY)
    data = write_parquet(tmp_path / "data.parquet", pairs(style=["flat"] * 8))
    recipe = tmp_path / "recipe.yaml"
    modules = EVERYTHING | {r"model\.language_model\.embed_tokens": {"group_size": "row", "frequent_rows": 20}}
    recipe.write_text(json.dumps({"modules": modules, "counts": str(data)}))
    out = tmp_path / "out"
    mine = tmp_path / "out.tmp" / "notes.txt"  # no folder of ours
    mine.parent.mkdir()
    mine.write_text("mine")
    assert microvlm("pack", start, out, "--recipe", recipe, "--data", data) == 0
    printed = capsys.readouterr().out
    size = (out / "model.safetensors").stat().st_size
    assert f"{size:,} bytes of weights" in printed
    linears = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    assert re.search(rf"decoder layers +ternary +{linears:,} ", printed)
    total = int(re.search(r"total +[\d,]+ +([\d,]+)", printed)[1].replace(",", ""))
    assert 0 < size - total < 20_000  # names and shapes
    before, after = map(float, re.search(r"perplexity +(\S+) +(\S+)", printed).groups())
    assert before > 1 and after == pytest.approx(before, rel=0.3)
    assert reopen(out).dtype == torch.bfloat16
    assert microvlm("pack", start, out, "--recipe", recipe) == 1
    assert microvlm("pack", out, tmp_path / "twice", "--recipe", recipe) == 1
    lines = capsys.readouterr().err.splitlines()
    assert f"microvlm: {out} exists: choose another folder." in lines
    assert f"microvlm: {out} is quantized already." in lines

    assert mine.read_text() == "mine" and not list(tmp_path.glob(".out-*"))
    assert (out / "model.safetensors").stat().st_mode & 0o777 == recipe.stat().st_mode & 0o777

    rest = {"data": DataConfig(train="d"), "training": {}}
    _, model = load_model(Recipe(model=str(out), trainable=["language_model"], **rest))  # unpacked to train
    assert f"{out} is packed: its weights were unpacked to train" in capsys.readouterr().out
    assert {p.dtype for p in model.parameters()} == {torch.float32} and getattr(model, "hf_quantizer", None) is None
    assert all(p.requires_grad == ("language_model" in n) for n, p in model.named_parameters())
    model(**tiny_inputs(), labels=tiny_inputs()["input_ids"]).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "_proj" in n and p.requires_grad)
    four_bits = Recipe(model=str(out), trainable=["adapter"], quantization={"load_in_4bit": True}, **rest)
    with pytest.raises(ValueError, match="is packed: unpack it with model.dequantize"):
        load_model(four_bits)
    shutil.rmtree(out)


def test_an_unreadable_picture_ends_in_one_line(tmp_path, monkeypatch, capsys):
    use_cache(monkeypatch, tmp_path / "cache")
    start = toy_checkpoint(tmp_path / "start")
    rows = pairs(2)
    rows[1]["image"] = {"bytes": b"no picture", "path": None}
    data = write_parquet(tmp_path / "data.parquet", rows)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"modules": EVERYTHING}))
    assert microvlm("pack", start, tmp_path / "out", "--recipe", recipe, "--data", data) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("microvlm: row toy-1: picture cannot be read: ")
    assert not (tmp_path / "out").exists()


def test_recipes_of_packing_are_checked(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("modules: {x: {}}\nmodel: y\n")
    with pytest.raises(
        ValueError, match=f"^unknown key in {re.escape(str(path))}: model. Known: counts, dtype, modules.$"
    ):
        load_pack_recipe(str(path))
    path.write_text("modules: {x: {}}\nmodules: {y: {}}\n")
    with pytest.raises(ValueError, match="is not YAML: the key 'modules' stands twice"):
        load_pack_recipe(str(path))
    path.write_text("modules: {x: &x {format: trits}, y: {<<: *x, rows: 2}}")
    assert load_pack_recipe(str(path))["modules"]["y"] == {"format": "trits", "rows": 2}
    for text, why in (
        ("dtype: float32", "a dict, got NoneType"),
        ("modules: 5", "a dict"),
        ("modules: {x: 5}", "dict"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"Field 'modules' expected {why}|Invalid key or value in dict 'modules'"):
            load_pack_recipe(str(path))
    path.write_text("modules: {}\n")
    with pytest.raises(ValueError, match="has no modules: what to pack.$"):
        load_pack_recipe(str(path))
    path.write_text("- modules\n")
    with pytest.raises(ValueError, match="is no recipe: expected keys with values, got .'modules'.*$"):
        load_pack_recipe(str(path))
    path.write_text("modules: {x: {}}\n")
    with pytest.raises(ValueError, match="'dtype' expected one of .'float32', 'bfloat16', 'float16'., got bf16"):
        load_pack_recipe(str(path), ["dtype=bf16"])
    with pytest.raises(ValueError, match="^--set takes key=value, got 'dtype'.$"):
        load_pack_recipe(str(path), ["dtype"])
