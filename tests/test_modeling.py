"""The model keeps the contracts of a model inside transformers, from a meta-device build to a merged LoRA."""

import copy
import inspect
import io
import json
import os
import pickle
import subprocess
import sys
import warnings
from typing import get_args

import numpy as np
import pytest
import torch
from conftest import IMAGE_ID, ROOT, VOCAB, tiny_config, tiny_inputs, tiny_model
from microvlm.alignment_microvlm import contrastive_loss, masked_mean
from microvlm.modeling_microvlm import MicroVLMForConditionalGeneration, MicroVLMModel
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AttentionMaskInterface, AutoModel, DynamicCache, Trainer, TrainingArguments, modeling_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from microvlm.model import CACHE_NAME
from microvlm.train.losses import match_loss

FRESH_PROCESS = """
import sys
import torch
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM
)

folder = sys.argv[1]
inputs, expected = torch.load(f"{folder}/expected.pt")
for auto in (AutoModel, AutoModelForImageTextToText, AutoModelForCausalLM, AutoModelForMultimodalLM):
    loaded = auto.from_pretrained(folder, trust_remote_code=True)
    assert type(loaded).__name__ == "MicroVLMForConditionalGeneration"
    assert type(loaded).__module__.startswith("transformers_modules."), type(loaded).__module__
    assert loaded(**inputs).logits.equal(expected)
loaded.save_pretrained(f"{folder}/again")
config = AutoConfig.from_pretrained(f"{folder}/again", trust_remote_code=True)
config.name_or_path = loaded.config.name_or_path
assert config.to_dict() == loaded.config.to_dict()
assert auto.from_config(config, trust_remote_code=True).config.model_type == "microvlm"
again = AutoModel.from_pretrained(f"{folder}/again", trust_remote_code=True)
assert again(**inputs).logits.equal(expected)
"""
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
HEAD = "lm_head.weight"
newest = pytest.mark.skipif(CACHE_NAME != "cache", reason="transformers 5.24 and later")


def alignment_loss(model, outputs) -> torch.Tensor | None:
    """InfoNCE and, if the fusion block ran, the matching loss of a forward with `return_alignment`."""
    if outputs.image_embeds is None or not len(outputs.image_embeds):
        return None
    loss = model.contrastive_loss(outputs.image_embeds, outputs.text_embeds)
    return loss if outputs.match_logits is None else loss + match_loss(outputs.match_logits)


def gradients(model, inputs) -> dict:
    model.zero_grad()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_tensors(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    assert [name for name in a if not a[name].equal(b[name])] == []


@pytest.fixture
def saved(tmp_path):
    """A model, and the folder it is saved in."""
    model = tiny_model()
    model.model.adapter.calibrate(torch.randn(50, 24) * 3 + 1)
    model.save_pretrained(tmp_path)
    return model, tmp_path


class TestBuilding:
    def test_default_initialisation(self):
        torch.manual_seed(0)
        model = MicroVLMForConditionalGeneration(tiny_config(use_fusion=True))
        for name, p in model.named_parameters():
            assert p.isfinite().all(), name
            assert p.abs().max() < 2, name
        adapter = model.model.adapter
        assert adapter.patch_mean.eq(0).all() and adapter.patch_std.eq(1).all()
        assert adapter.query_tokens.std().item() == pytest.approx(0.02, rel=0.3)

    def test_meta_device(self):
        with torch.device("meta"):
            model = MicroVLMForConditionalGeneration(tiny_config(use_fusion=True))
        assert {p.device.type for p in model.parameters()} == {"meta"}

    @pytest.mark.parametrize(
        "part",
        ["vision_tower", "adapter", "alignment", "fusion", "memory", "memory.order", "memory_projection", "scope"],
    )
    def test_what_a_checkpoint_lacks_is_initialised(self, tmp_path, part, monkeypatch):
        model = tiny_model(use_fusion=True, use_memory=True, memory_config={"ordering": "lstm", "num_slots": 16})
        part = f"model.{part}."
        model.save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        kept = {name: w for name, w in weights.items() if not name.startswith(part)}
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
        # memory that was never written may look initialised by luck: make it recognisable
        empty_like = torch.empty_like
        monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: empty_like(*args, **kwargs).fill_(7e9))
        loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
        assert sorted(info["missing_keys"]) == sorted(weights.keys() - kept.keys())
        for name, tensor in loaded.state_dict().items():
            assert tensor.abs().max() < 100, name
            if name in kept:
                assert tensor.equal(kept[name]), name

    def test_computed_buffers_survive_loading(self, saved):
        model, folder = saved
        loaded = type(model).from_pretrained(folder)
        buffers = dict(model.named_buffers())
        assert any("inv_freq" in name for name in buffers)
        for name, buffer in loaded.named_buffers():
            assert buffer.equal(buffers[name]), name

    @pytest.mark.parametrize("tied", [True, False])
    def test_tied_weights(self, tmp_path, tied):
        text = tiny_config().text_config.to_dict() | {"tie_word_embeddings": tied}
        model = tiny_model(text_config=text)
        model.save_pretrained(tmp_path)
        assert (HEAD in load_file(tmp_path / "model.safetensors")) is not tied
        loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) is tied
        assert_same_tensors(model, loaded)

    @pytest.mark.parametrize("tied", [True, False])
    def test_resize_token_embeddings(self, tied):
        text = tiny_config().text_config.to_dict() | {"tie_word_embeddings": tied}
        model, inputs = tiny_model(text_config=text), tiny_inputs()
        before = model(**inputs).logits
        model.resize_token_embeddings(VOCAB + 10)
        assert model.config.text_config.vocab_size == model.vocab_size == VOCAB + 10
        assert len(model.get_input_embeddings().weight) == len(model.get_output_embeddings().weight) == VOCAB + 10
        logits = model(**inputs, labels=inputs["input_ids"]).logits
        assert logits.shape[-1] == VOCAB + 10
        torch.testing.assert_close(logits[..., :VOCAB], before, **CLOSE)

    def test_get_and_set_embeddings(self):
        model = tiny_model()
        table, head = torch.nn.Embedding(VOCAB, 32), torch.nn.Linear(32, VOCAB, bias=False)
        model.set_input_embeddings(table)
        model.set_output_embeddings(head)
        assert model.get_input_embeddings() is model.model.get_input_embeddings() is table
        assert model.model.language_model.embed_tokens is table and model.get_output_embeddings() is head
        assert model.base_model is model.model and model.main_input_name == "input_ids"

    @pytest.mark.parametrize(
        "change, message",
        [
            (
                {"adapter_config": {"vision_hidden_size": 192}},
                "adapter_config.vision_hidden_size is 192, but deit_tiny_patch16_224 has features of width 24.",
            ),
            (
                {"text_config": {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4}},
                "text model 'gpt2' has no embed_tokens: MicroVLM takes decoders that are built like Llama.",
            ),
        ],
    )
    def test_what_cannot_work_is_refused(self, change, message):
        with torch.device("meta"), pytest.raises(ValueError) as error:
            MicroVLMForConditionalGeneration(tiny_config(**change))
        assert str(error.value) == message


class TestSaving:
    def test_bit_equal(self, saved):
        model, folder = saved
        loaded = type(model).from_pretrained(folder)
        assert_same_tensors(model, loaded)
        inputs = tiny_inputs()
        assert loaded(**inputs).logits.equal(model(**inputs).logits)
        assert loaded.generation_config.suppress_tokens == [IMAGE_ID]

    def test_base_model_and_head_load_each_other(self, saved, tmp_path):
        model, folder = saved
        assert_same_tensors(MicroVLMModel.from_pretrained(folder), model.model)
        model.model.save_pretrained(tmp_path / "base")
        assert_same_tensors(type(model).from_pretrained(tmp_path / "base").model, model.model)
        assert_same_tensors(AutoModel.from_pretrained(tmp_path / "base", trust_remote_code=True).model, model.model)

    def test_shards(self, saved, tmp_path):
        model, _ = saved
        model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
        assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
        assert_same_tensors(type(model).from_pretrained(tmp_path / "shards"), model)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_dtype(self, saved, dtype):
        model, folder = saved
        loaded = type(model).from_pretrained(folder, dtype=dtype)
        assert loaded.dtype == loaded.config.dtype == dtype
        assert {p.dtype for p in loaded.parameters()} == {dtype}
        inputs = tiny_inputs()
        logits = loaded(**inputs).logits
        assert logits.dtype == dtype
        torch.testing.assert_close(logits.float(), model(**inputs).logits, rtol=0.1, atol=0.3)

    @pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
    def test_device_map(self, saved, device_map):
        model, folder = saved
        loaded = type(model).from_pretrained(folder, device_map=device_map)
        assert_same_tensors(loaded, model)

    def test_disk_offload(self, saved, tmp_path):
        model, folder = saved
        device_map = {"model.vision_tower": "cpu", "model.adapter": "cpu", "model.alignment": "cpu"}
        device_map |= {"model.language_model": "disk", "lm_head": "disk"}
        loaded = type(model).from_pretrained(folder, device_map=device_map, offload_folder=tmp_path / "offload")
        assert next(loaded.model.language_model.layers[0].parameters()).device.type == "meta"
        inputs = tiny_inputs()
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, **CLOSE)

    def test_pickle_and_deepcopy(self):
        model, inputs = tiny_model(), tiny_inputs()
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        buffer.seek(0)
        other = MicroVLMForConditionalGeneration(model.config).eval()
        other.load_state_dict(torch.load(buffer))
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other):
            assert twin(**inputs).logits.equal(model(**inputs).logits)
            assert twin.lm_head.weight is twin.get_input_embeddings().weight

    @pytest.mark.parametrize("size", [VOCAB + 8, VOCAB - 8])
    def test_resized_vocabulary(self, size, tmp_path):
        """The memory's weights of words grow and shrink with it."""
        model, inputs = tiny_model(use_memory=True), tiny_inputs()
        inputs["input_ids"] = inputs["input_ids"].clamp(max=VOCAB - 9)
        model.model.memory.word_weight.uniform_()
        expected, weights = model(**inputs).logits, model.model.memory.word_weight.clone()
        model.resize_token_embeddings(size)
        kept = min(size, VOCAB)
        assert torch.equal(model.model.memory.word_weight[:kept], weights[:kept])
        assert torch.equal(model.model.memory.word_weight[kept:], torch.ones(size - kept))
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        torch.testing.assert_close(loaded(**inputs).logits[..., :kept], expected[..., :kept])
        loaded.generate(**inputs, memory=loaded.write_memory(**inputs), max_new_tokens=2)

    def test_remote_code(self, saved):
        """A saved folder carries its code: it loads through every auto class, is saved again, and loads again."""
        model, folder = saved
        torch.save([tiny_inputs(), model(**tiny_inputs()).logits], folder / "expected.pt")
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        environment |= {"HF_MODULES_CACHE": str(folder / "modules")}
        command = [sys.executable, "-c", FRESH_PROCESS, str(folder)]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        # with the package at hand, the same folder gives the package's class
        assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)) is type(model)

    def test_remote_code_initialises_what_is_missing(self, saved):
        _, folder = saved
        weights = load_file(folder / "model.safetensors")
        kept = {name: w for name, w in weights.items() if "cls_token" not in name and "query_tokens" not in name}
        assert len(kept) == len(weights) - 2
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        loaded = AutoModel.from_pretrained(folder, trust_remote_code=True)
        for name, tensor in loaded.state_dict().items():
            if name in kept:
                assert tensor.equal(kept[name]), name
            elif name != HEAD:  # tied
                assert 0 < tensor.abs().max() < 0.2, name

    def test_truncated_weights_are_refused(self, saved):
        model, folder = saved
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
        with pytest.raises(Exception, match="(?i)incomplete|header|invalid|metadata"):
            type(model).from_pretrained(folder)

    def test_missing_weights_are_refused(self, saved):
        model, folder = saved
        (folder / "model.safetensors").unlink()
        with pytest.raises(OSError, match="model.safetensors"):
            type(model).from_pretrained(folder)

    def test_weights_of_another_size_are_refused(self, saved):
        model, folder = saved
        config = json.loads((folder / "config.json").read_text())
        config["adapter_config"]["mlp_hidden_size"] = 20
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(RuntimeError, match="size mismatch|mismatched"):
            type(model).from_pretrained(folder)
        with pytest.raises(OSError):
            type(model).from_pretrained(folder / "nowhere")


class TestForward:
    def test_prefix_takes_the_place_of_the_placeholders(self, text_type):
        """The whole way of the data, put together from its parts."""
        model, inputs = tiny_model(text_type), tiny_inputs(pictures=2)
        ids = inputs["input_ids"]
        prefix = torch.stack(model.get_image_features(inputs["pixel_values"]).pooler_output)  # (4, 5, 32)
        embeds = model.get_input_embeddings()(ids).detach().clone()
        for row in range(2):
            positions = torch.nonzero(ids[row] == IMAGE_ID).flatten()
            embeds[row, positions] = prefix[2 * row : 2 * row + 2].flatten(0, 1)
        hidden = model.model.language_model(inputs_embeds=embeds).last_hidden_state
        out = model(**inputs)
        torch.testing.assert_close(out.logits, hidden @ model.lm_head.weight.T, **CLOSE)
        torch.testing.assert_close(out.image_hidden_states, prefix, **CLOSE)

    def test_adapter_against_numpy(self):
        """Standardise, MLP, and P queries that attend over the patches, in float64."""
        adapter = tiny_model().model.adapter
        adapter.calibrate(torch.randn(50, 24) * 3 + 1)
        x = torch.randn(3, 16, 24)
        got, attention = adapter(x, output_attentions=True)
        torch.testing.assert_close(adapter(x)[0], got, **CLOSE)

        w = {name: t.detach().double().numpy() for name, t in adapter.state_dict().items()}
        linear = lambda t, name: t @ w[f"{name}.weight"].T + w[f"{name}.bias"]  # noqa: E731
        hidden = linear((x.double().numpy() - w["patch_mean"]) / w["patch_std"], "fc1")
        hidden = linear(torch.nn.functional.gelu(torch.from_numpy(hidden)).numpy(), "fc2")  # (3, 16, 32)
        q, k, v = linear(w["query_tokens"], "q_proj"), linear(hidden, "k_proj"), linear(hidden, "v_proj")
        pooled = np.empty((3, 5, 32))
        for head in range(4):
            s = slice(8 * head, 8 * head + 8)
            scores = np.einsum("pd,nkd->npk", q[:, s], k[:, :, s]) / np.sqrt(8)
            weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
            np.testing.assert_allclose(attention[:, head].detach().numpy(), weights, atol=1e-5)
            pooled[:, :, s] = weights @ v[:, :, s]
        y = w["query_tokens"] + linear(pooled, "out_proj")
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)
        expected = y * w["norm.weight"] + w["norm.bias"]
        np.testing.assert_allclose(got.detach().numpy(), expected, rtol=1e-4, atol=1e-4)

    def test_calibration_standardises_each_channel(self):
        adapter = tiny_model().model.adapter
        x = torch.randn(4, 100, 24) * torch.arange(1, 25) + 5
        x[..., 0] = 3.0  # a dead channel
        adapter.calibrate(x)
        z = (x - adapter.patch_mean) / adapter.patch_std
        assert z.isfinite().all()
        torch.testing.assert_close(z.mean((0, 1)), torch.zeros(24), atol=1e-4, rtol=0)
        torch.testing.assert_close(z[..., 1:].std((0, 1)), torch.ones(23), atol=1e-2, rtol=0)

    def test_rows_do_not_see_each_other(self, text_type):
        model, inputs = tiny_model(text_type), tiny_inputs(3)
        together = model(**inputs, return_alignment=True)
        for row in range(3):
            alone = model(**{k: v[row : row + 1] for k, v in inputs.items()}, return_alignment=True)
            for name in ("logits", "image_hidden_states", "image_embeds", "text_embeds"):
                torch.testing.assert_close(getattr(together, name)[row : row + 1], getattr(alone, name), **CLOSE)

    def test_embeddings_equal_ids(self, text_type):
        model, inputs = tiny_model(text_type), tiny_inputs()
        expected = model(**inputs).logits
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
        torch.testing.assert_close(model(**inputs).logits, expected, **CLOSE)

    def test_images_of_a_size_that_patches_do_not_divide(self):
        with pytest.raises(ValueError, match="^the vision tower cannot take these images: .*30.* Resize them"):
            tiny_model().get_image_features(torch.zeros(1, 3, 30, 30))

    def test_features_equal_pixels(self):
        model, inputs = tiny_model(), tiny_inputs()
        expected = model(**inputs).logits
        features = model.get_image_features(inputs.pop("pixel_values"))
        assert model(**inputs, mm_encoder_outputs={"image": features}).logits.equal(expected)

    def test_eager_equals_sdpa(self, text_type):
        model, inputs = tiny_model(text_type), tiny_inputs()
        inputs["attention_mask"][0, :3] = 0
        assert model.config._attn_implementation == model.config.text_config._attn_implementation == "sdpa"
        expected = model(**inputs).logits
        model.set_attn_implementation("eager")
        assert model.model.language_model.config._attn_implementation == "eager"
        torch.testing.assert_close(model(**inputs).logits[:, 3:], expected[:, 3:], **CLOSE)
        model.set_attn_implementation({"text_config": "sdpa"})
        assert model(**inputs).logits.equal(expected)

    def test_hidden_states_and_attentions(self, text_type):
        model, inputs = tiny_model(text_type), tiny_inputs()
        model.set_attn_implementation("eager")
        B, T = inputs["input_ids"].shape
        out = model(**inputs, output_hidden_states=True, output_attentions=True)
        assert [tuple(h.shape) for h in out.hidden_states] == [(B, T, 32)] * 3
        assert [tuple(a.shape) for a in out.attentions] == [(B, 4, T, T)] * 2
        assert out.pooling_attentions.shape == (B, 4, 5, 16)
        torch.testing.assert_close(out.pooling_attentions.sum(-1), torch.ones(B, 4, 5), **CLOSE)
        watched = [out.hidden_states[0], out.attentions[0], out.pooling_attentions]
        for tensor in watched:
            tensor.retain_grad()
        out.logits.flatten()[-1].backward()
        assert all(tensor.grad.abs().sum() > 0 for tensor in watched)
        # switched on in the configuration instead
        for config in (model.config, model.config.text_config):
            config.output_hidden_states = config.output_attentions = True
        assert model(**inputs).keys() == out.keys()
        assert model(**inputs, output_attentions=False).pooling_attentions is None

    @newest
    def test_hidden_states_of_some_layers(self, text_type):
        """The numbers stand for layers of the text, of which it may have more than the vision tower."""
        model, inputs = tiny_model(text_type), tiny_inputs()
        every = model(**inputs, output_hidden_states=True)
        some = model(**inputs, output_hidden_states=[0, 2])
        assert some.hidden_states[1] is None and len(some.image_outputs.hidden_states) == 2
        assert all(some.hidden_states[i].equal(every.hidden_states[i]) for i in (0, 2))

    @newest
    def test_the_old_name_of_the_cache_is_deprecated(self):
        model, inputs = tiny_model(), tiny_inputs()
        with pytest.warns(FutureWarning, match="^`past_key_values` is deprecated"):
            old = model(**inputs, past_key_values=DynamicCache()).logits
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert model(**inputs, cache=DynamicCache()).logits.equal(old)
            model.generate(**inputs, max_new_tokens=2)

    def test_tuple_output(self):
        model, inputs = tiny_model(), tiny_inputs()
        for kwargs in ({}, {"output_hidden_states": True}, {"labels": inputs["input_ids"]}):
            expected = model(**inputs, **kwargs).to_tuple()
            got = model(**inputs, **kwargs, return_dict=False)
            assert isinstance(got, tuple) and len(got) == len(expected)
            assert got[0].equal(expected[0]) and got[-1].equal(expected[-1])
        model.config.return_dict = False
        assert isinstance(model(**inputs), tuple) and isinstance(model.model(**inputs), tuple)

    def test_image_features(self):
        model, pixels = tiny_model(), tiny_inputs(3)["pixel_values"]
        out = model.get_image_features(pixels)
        assert out.last_hidden_state.shape == (3, 17, 24)
        assert isinstance(out.pooler_output, tuple) and [tuple(p.shape) for p in out.pooler_output] == [(5, 32)] * 3
        patches = out.last_hidden_state[:, 1:]  # without the class token
        torch.testing.assert_close(torch.stack(out.pooler_output), model.model.adapter(patches)[0], **CLOSE)
        assert out.hidden_states is None and out.pooling_attentions is None and out.attentions is None
        assert isinstance(model.get_image_features(pixels, return_dict=False), tuple)
        full = model.get_image_features(pixels, output_hidden_states=True, output_attentions=True)
        assert len(full.hidden_states) == 2 and full.pooling_attentions.shape == (3, 4, 5, 16)
        assert len(full.attentions) == 1 and full.attentions[0].equal(full.pooling_attentions)
        torch.testing.assert_close(full.pooler_output, out.pooler_output, **CLOSE)
        model.config.output_hidden_states = True
        assert len(model.get_image_features(pixels).hidden_states) == 2

    def test_loss(self):
        """Shifted, -100 left out, and divided by `num_items_in_batch` when the trainer gives it."""
        model, inputs = tiny_model(), tiny_inputs()
        labels = inputs["input_ids"].clone()
        labels[:, :9] = -100
        out = model(**inputs, labels=labels)
        each = torch.nn.functional.cross_entropy(
            out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
        )
        torch.testing.assert_close(out.loss, each.sum() / (labels[:, 1:] != -100).sum(), **CLOSE)
        counted = model(**inputs, labels=labels, num_items_in_batch=torch.tensor(37))
        torch.testing.assert_close(counted.loss, each.sum() / 37, **CLOSE)

    def test_placeholders_without_pictures_are_words(self):
        """As in LLaVA: the placeholder's own embedding is used."""
        model, inputs = tiny_model(), tiny_inputs()
        logits = model(input_ids=inputs["input_ids"]).logits
        hidden = model.model.language_model(input_ids=inputs["input_ids"]).last_hidden_state
        torch.testing.assert_close(logits, model.lm_head(hidden), **CLOSE)


class TestBadInput:
    @pytest.mark.parametrize("pictures", [1, 3])
    def test_number_of_pictures(self, pictures):
        model, inputs = tiny_model(), tiny_inputs()
        inputs["pixel_values"] = torch.zeros(pictures, 3, 32, 32)
        message = (
            f"Image features and image tokens do not match: {pictures} images need {5 * pictures} placeholders "
            "(5 each), the text has 10."
        )
        for module in (model, model.model):
            with pytest.raises(ValueError) as error:
                module(**inputs)
            assert str(error.value) == message
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
        with pytest.raises(ValueError) as error:
            model(**inputs)
        assert str(error.value) == message

    def test_pictures_without_placeholders(self):
        with pytest.raises(ValueError) as error:
            tiny_model()(input_ids=torch.tensor([[5, 6, 7]]), pixel_values=torch.zeros(1, 3, 32, 32))
        assert str(error.value) == (
            "Image features and image tokens do not match: 1 images need 5 placeholders (5 each), the text has 0."
        )

    @pytest.mark.parametrize("alignment", [False, True, "only"])
    def test_placeholders_of_a_row_are_whole_pictures(self, alignment):
        inputs = tiny_inputs()
        inputs["input_ids"][0, inputs["input_ids"][0] != IMAGE_ID] = 7
        inputs["input_ids"][0, -1] = IMAGE_ID
        inputs["input_ids"][1, inputs["input_ids"][1].tolist().index(IMAGE_ID)] = 7
        with pytest.raises(ValueError) as error:
            tiny_model()(**inputs, return_alignment=alignment)
        assert str(error.value) == "row 0 has 6 image placeholders, an image needs 5."

    @pytest.mark.parametrize(
        "inputs, message",
        [
            ({}, "You must specify exactly one of input_ids or inputs_embeds"),
            (
                {"input_ids": torch.ones(1, 2).long(), "inputs_embeds": torch.ones(1, 2, 32)},
                "You must specify exactly one of input_ids or inputs_embeds",
            ),
            ({"input_ids": torch.empty(0, 4).long()}, "The batch is empty: input_ids has no rows."),
            (
                {"input_ids": torch.full((1, 5), IMAGE_ID), "pixel_values": torch.zeros(3, 32, 32)},
                "pixel_values must have the shape (images, channels, height, width), got (3, 32, 32).",
            ),
            (
                {"input_ids": torch.ones(1, 2).long(), "pixel_values": torch.zeros(0, 3, 32, 32)},
                "pixel_values must have the shape (images, channels, height, width), got (0, 3, 32, 32).",
            ),
            (
                {"input_ids": torch.ones(1, 2).long(), "return_alignment": "only"},
                "return_alignment='only' needs images: give pixel_values.",
            ),
            (
                {
                    "input_ids": torch.full((1, 5), IMAGE_ID),
                    "pixel_values": torch.zeros(1, 3, 32, 32),
                    "mm_encoder_outputs": {"image": 1},
                },
                "You cannot specify both pixel_values and mm_encoder_outputs at the same time",
            ),
            (
                {"input_ids": torch.ones(1, 2).long(), "use_fusion": True},
                "use_fusion=True needs a model built with config.use_fusion=True; this one has no block.",
            ),
            (
                tiny_inputs() | {"return_alignment": "only", "use_fusion": True},
                "use_fusion=True needs a model built with config.use_fusion=True; this one has no block.",
            ),
            (
                tiny_inputs() | {"return_alignment": "onlyy"},
                "return_alignment must be True, False or 'only', got 'onlyy'.",
            ),
            (
                tiny_inputs() | {"memory_gate": "off"},
                "memory_gate is for a memory, which was not given: a cache keeps the one it has, with its gate.",
            ),
        ],
    )
    def test_exact_messages(self, inputs, message):
        with pytest.raises(ValueError) as error:
            tiny_model()(**inputs)
        assert str(error.value) == message

    def test_alignment_needs_ids(self):
        model, inputs = tiny_model(), tiny_inputs()
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
        with pytest.raises(ValueError) as error:
            model(**inputs, return_alignment=True)
        assert str(error.value) == "return_alignment needs input_ids."

    def test_unknown_arguments(self):
        model, inputs = tiny_model(), tiny_inputs()
        for module in (model, model.model):
            with pytest.raises(TypeError) as error:
                module(**inputs, use_memory=True, image_sizes=None)
            assert str(error.value) == "forward() got unexpected keyword arguments: image_sizes, use_memory"

    def test_another_attention_takes_its_own_arguments(self):
        """As vLLM's and SGLang's backends call the model."""
        model, inputs, seen = tiny_model("llama"), tiny_inputs(), []
        expected = model(**inputs).logits

        def attention(module, *args, instances=None, **kwargs):
            seen.append(instances)
            return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *args, **kwargs)

        ALL_ATTENTION_FUNCTIONS.register("another", attention)
        AttentionMaskInterface.register("another", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        model.config.text_config._attn_implementation = "another"
        assert model(**inputs, instances=7).logits.equal(expected) and seen == [7, 7]


class TestAlignment:
    def test_contrastive_loss_against_numpy(self):
        torch.manual_seed(0)
        a, b = (torch.nn.functional.normalize(torch.randn(6, 8), dim=-1) for _ in range(2))
        s = a.double().numpy() @ b.double().numpy().T / 0.07
        log_p = [m - np.log(np.exp(m).sum(1, keepdims=True)) for m in (s, s.T)]
        expected = -np.mean([np.diag(p).mean() for p in log_p])
        assert contrastive_loss(a, b, 0.07).item() == pytest.approx(expected, rel=1e-5)
        assert contrastive_loss(a, a, 0.07) < contrastive_loss(a, a.flip(0), 0.07)

    def test_masked_mean(self):
        x, mask = torch.randn(2, 4, 3), torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1]]).bool()
        torch.testing.assert_close(masked_mean(x, mask), torch.stack([(x[0, 0] + x[0, 2]) / 2, x[1, 3]]))

    def batch(self):
        """Four rows: a picture and text; text only; two pictures; a picture whose text is not labelled."""
        rows = [[5, 6, *[IMAGE_ID] * 5, 7, 8], [9, 10, 11], [*[IMAGE_ID] * 10, 12], [*[IMAGE_ID] * 5, 13, 14, 15]]
        T = max(map(len, rows))
        ids = torch.tensor([[1] * (T - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in rows])
        labels = ids.masked_fill((mask == 0) | (ids == IMAGE_ID), -100)
        labels[3] = -100
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "pixel_values": torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
        }, labels

    def test_rows_with_picture_and_text(self):
        model, (inputs, labels) = tiny_model(), self.batch()
        out = model(**inputs, labels=labels, return_alignment=True)
        assert out.image_embeds.shape == out.text_embeds.shape == (2, 16)  # rows 0 and 2
        torch.testing.assert_close(out.image_embeds.norm(dim=-1), torch.ones(2), **CLOSE)
        assert model(**inputs, return_alignment=True).image_embeds.shape == (3, 16)  # without labels: 0, 2 and 3
        # what the rows are made of
        prefix, table = out.image_hidden_states, model.get_input_embeddings()
        alignment = model.model.alignment
        pooled = torch.stack([prefix[0].mean(0), prefix[1:3].mean((0, 1))])
        torch.testing.assert_close(out.image_embeds, alignment.embed_image(pooled), **CLOSE)
        text = torch.stack([table(torch.tensor(ids)).mean(0) for ids in ([5, 6, 7, 8], [12])])
        torch.testing.assert_close(out.text_embeds, alignment.embed_text(text), **CLOSE)
        expected = contrastive_loss(out.image_embeds, out.text_embeds, 0.07)
        assert alignment_loss(model, out).equal(expected)

    def test_a_picture_is_embedded_alone(self):
        model, (inputs, labels) = tiny_model(), self.batch()
        before = model(**inputs, labels=labels, return_alignment=True)
        inputs["pixel_values"][1:] += 1
        inputs["input_ids"][1:][inputs["input_ids"][1:] > 4] += 20
        after = model(**inputs, labels=labels, return_alignment=True)
        for name in ("image_embeds", "text_embeds"):
            torch.testing.assert_close(getattr(before, name)[0], getattr(after, name)[0], rtol=0, atol=1e-6)
            assert not torch.allclose(getattr(before, name)[1], getattr(after, name)[1], atol=1e-3)

    def test_nothing_to_align(self):
        model, (inputs, labels) = tiny_model(), self.batch()
        text_only = {"input_ids": inputs["input_ids"][1:2]}
        out = model(**text_only, return_alignment=True)
        assert out.image_embeds is None and alignment_loss(model, out) is None
        out = model(**inputs, labels=torch.full_like(labels, -100), return_alignment=True)
        assert out.image_embeds.shape == (0, 16) and alignment_loss(model, out) is None
        assert model(**inputs, labels=labels).image_embeds is None

    def test_logits_do_not_depend_on_it(self):
        model, (inputs, labels) = tiny_model(use_fusion=True), self.batch()
        expected = model(**inputs, labels=labels, use_fusion=False)
        out = model(**inputs, labels=labels, return_alignment=True)
        assert out.logits.equal(expected.logits) and out.loss.equal(expected.loss)

    def test_fusion(self):
        model, (inputs, _) = tiny_model(use_fusion=True), self.batch()
        out = model(**inputs, return_alignment=True)
        assert out.match_logits.shape == (3, 2)
        # with two rows the hardest negative is the other one
        two = {k: v[[0, 3]] for k, v in inputs.items()}
        out = model(**two, return_alignment=True)
        prefix, fusion = out.image_hidden_states, model.model.fusion
        text = model.get_input_embeddings()(two["input_ids"])
        mask = two["attention_mask"].bool() & (two["input_ids"] != IMAGE_ID)
        for column, pictures in enumerate((prefix, prefix.flip(0))):
            torch.testing.assert_close(out.match_logits[:, column], fusion(text, mask, pictures), **CLOSE)
        assert model(**two, return_alignment=True, use_fusion=False).match_logits is None
        # a row with two pictures gives their mean
        both = {k: v[[0, 2]] for k, v in inputs.items() if k != "pixel_values"} | {
            "pixel_values": inputs["pixel_values"][:3]
        }
        out = model(**both, return_alignment=True)
        prefix = torch.stack([out.image_hidden_states[0], out.image_hidden_states[1:].mean(0)])
        text = model.get_input_embeddings()(both["input_ids"])
        mask = both["attention_mask"].bool() & (both["input_ids"] != IMAGE_ID)
        torch.testing.assert_close(out.match_logits[:, 0], fusion(text, mask, prefix), **CLOSE)
        one = {k: v[:1] for k, v in inputs.items()}
        assert model(**one, return_alignment=True).match_logits is None

    def test_loss_reaches_every_part(self):
        model, (inputs, labels) = tiny_model(use_fusion=True), self.batch()
        alignment_loss(model, model(**inputs, labels=labels, return_alignment=True)).backward()
        for part in ("alignment", "fusion", "adapter", "vision_tower"):
            named = dict(getattr(model.model, part).named_parameters())
            without = [name for name, p in named.items() if p.grad is None or not p.grad.any()]
            # softmax ignores what is added to every key; the class token's last-layer output is not pooled
            assert [name for name in without if "k_proj.bias" not in name] == [], part
        assert all(p.grad is None for p in model.model.language_model.layers.parameters())


class TestTraining:
    def test_every_part_gets_gradients(self, text_type):
        model, inputs = tiny_model(text_type).train(), tiny_inputs()
        got = gradients(model, inputs)
        without = {name for name, _ in model.named_parameters()} - got.keys()
        assert without == {f"model.alignment.{name}" for name, _ in model.model.alignment.named_parameters()}

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("use_cache", [False, True])
    def test_gradient_checkpointing_changes_nothing(self, text_type, reentrant, use_cache):
        model, inputs = tiny_model(text_type).train(), tiny_inputs()
        model.config.use_cache = use_cache
        expected_loss, expected = model(**inputs, labels=inputs["input_ids"]).loss, gradients(model, inputs)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert model.is_gradient_checkpointing
        layers = model.model.language_model.layers
        calls = []
        layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        got = gradients(model, inputs)
        assert len(calls) == 2  # forward, and once more in the backward pass
        assert got.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-5)
        model.gradient_checkpointing_disable()
        assert not model.is_gradient_checkpointing
        assert model(**inputs, labels=inputs["input_ids"]).loss.equal(expected_loss)

    def test_input_gradients_for_adapters(self):
        model, inputs = tiny_model(), tiny_inputs()
        model.requires_grad_(False)
        model.enable_input_require_grads()
        assert model(**inputs, labels=inputs["input_ids"]).loss.requires_grad

    def test_lora(self, tmp_path):
        model, inputs = tiny_model(), tiny_inputs()
        before = model(**inputs).logits
        config = LoraConfig(
            r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["adapter"], task_type="CAUSAL_LM"
        )
        # the adapter's own q_proj and v_proj are saved whole, not by LoRA
        config.exclude_modules = r".*\.adapter\..*"
        peft = get_peft_model(model, config)
        torch.testing.assert_close(peft(**inputs).logits, before, **CLOSE)
        peft.enable_input_require_grads()
        peft.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            peft.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        after = peft.eval()(**inputs).logits
        assert not torch.allclose(after, before, atol=1e-2)
        peft.save_pretrained(tmp_path)
        reloaded = PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
        torch.testing.assert_close(reloaded(**inputs).logits, after, **CLOSE)
        generated = reloaded.generate(**inputs, max_new_tokens=4, do_sample=False)
        merged = reloaded.merge_and_unload()
        torch.testing.assert_close(merged(**inputs).logits, after, **CLOSE)
        assert merged.generate(**inputs, max_new_tokens=4, do_sample=False).equal(generated)
        merged.save_pretrained(tmp_path / "merged")
        torch.testing.assert_close(type(model).from_pretrained(tmp_path / "merged")(**inputs).logits, after, **CLOSE)

    def test_prefix_tuning_generates_as_it_trains(self, text_type):
        inputs, sizes = tiny_inputs(), {"num_layers": 2, "token_dim": 16, "num_attention_heads": 2}
        plain = tiny_model(text_type).generate(**inputs, max_new_tokens=4, do_sample=False)
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, **sizes)
        peft = get_peft_model(tiny_model(text_type), config).eval()
        torch.nn.init.normal_(peft.prompt_encoder.default.embedding.weight, std=20)
        got, ids = peft.generate(**inputs, max_new_tokens=4, do_sample=False), inputs["input_ids"]
        for _ in range(got.shape[1] - ids.shape[1]):
            whole = inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            logits = peft(**whole).logits[:, -1].index_fill(-1, torch.tensor([IMAGE_ID]), -torch.inf)
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        assert got.equal(ids) and not got.equal(plain)

    @pytest.mark.parametrize("steps", [1, 2])
    def test_plain_trainer(self, tmp_path, steps):
        """Gradient accumulation gives the update of the whole batch, also with labels of unequal length."""
        inputs = tiny_inputs(4)
        labels = inputs["input_ids"].clone()
        labels[:2, :14] = -100
        if steps > 1:  # whole batches only: Trainer counts labelled placeholders over all of them
            labels[inputs["input_ids"] == IMAGE_ID] = -100
        rows = [{**{k: v[i] for k, v in inputs.items()}, "labels": labels[i]} for i in range(4)]
        arguments = TrainingArguments(
            output_dir=tmp_path,
            per_device_train_batch_size=4 // steps,
            gradient_accumulation_steps=steps,
            max_steps=1,
            learning_rate=0.1,
            lr_scheduler_type="constant",
            optim="sgd",
            max_grad_norm=0.0,
            weight_decay=0.0,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        model, expected = tiny_model(), tiny_model()
        Trainer(model, arguments, train_dataset=rows).train()
        expected.train()(**inputs, labels=labels).loss.backward()
        moved = 0
        for (name, p), q in zip(model.named_parameters(), expected.parameters()):
            step = 0 if q.grad is None else 0.1 * q.grad
            torch.testing.assert_close(p.detach(), (q - step).detach(), rtol=1e-4, atol=1e-5, msg=name)
            moved += q.grad is not None
        assert moved > 30

    def test_plain_trainer_evaluates(self, tmp_path):
        inputs = tiny_inputs(4)
        rows = [{**{k: v[i] for k, v in inputs.items()}, "labels": inputs["input_ids"][i]} for i in range(4)]
        arguments = TrainingArguments(output_dir=tmp_path, report_to=[], use_cpu=True, disable_tqdm=True)
        trainer = Trainer(tiny_model(), arguments, eval_dataset=rows)
        predictions = trainer.predict(rows).predictions
        assert predictions.shape == (4, inputs["input_ids"].shape[1], VOCAB)  # the logits only

    def test_plain_trainer_smooths_shifted_labels(self, tmp_path):
        inputs = tiny_inputs(2)
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE_ID, -100)
        arguments = TrainingArguments(output_dir=tmp_path, report_to=[], use_cpu=True, label_smoothing_factor=1e-6)
        model = tiny_model()
        loss = Trainer(model, arguments).compute_loss(model, inputs | {"labels": labels})
        assert loss.item() == pytest.approx(model(**inputs, labels=labels).loss.item(), rel=1e-3)

    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_accumulated_rows_are_one_batch_once_placeholders_are_masked(self, tmp_path, smoothing):
        inputs, after = tiny_inputs(2), []
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE_ID, -100)
        labels[0, 9:] = -100  # rows of unlike weight
        rows = [{"labels": labels[i], **{k: v[i] for k, v in inputs.items()}} for i in range(2)]
        for batch in (1, 2):
            arguments = TrainingArguments(
                output_dir=tmp_path,
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
                save_strategy="no",
                optim="sgd",
                learning_rate=0.1,
                max_steps=1,
                max_grad_norm=0,
                label_smoothing_factor=smoothing,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=2 // batch,
            )
            trainer = Trainer(tiny_model(), arguments, train_dataset=rows)
            trainer.train()
            after.append(trainer.model.state_dict())
        start = tiny_model().state_dict()
        assert not start["lm_head.weight"].allclose(after[0]["lm_head.weight"], atol=1e-3)
        for name, value in after[0].items():
            torch.testing.assert_close(value, after[1][name], rtol=1e-5, atol=1e-6)

    def test_placeholders_are_no_labels(self, text_type):
        model, inputs = tiny_model(text_type), tiny_inputs()
        ids = inputs["input_ids"]
        labels = ids.masked_fill(ids == IMAGE_ID, -100)
        expected = model(**inputs, labels=labels, return_alignment=True)
        for number, scale in ((None, 1), (torch.tensor(2 * (ids.numel() - len(ids))), 2)):
            got = model(**inputs, labels=ids, return_alignment=True, num_items_in_batch=number)
            torch.testing.assert_close(got.loss * scale, expected.loss)
            assert got.text_embeds.equal(expected.text_embeds)

    def test_ddp_with_checkpointing_reaches_every_part(self, tmp_path):
        """As `Trainer` sets it up: with checkpointing DDP does not look for parameters without a gradient."""
        model, inputs = tiny_model(use_fusion=True, use_memory=True).train(), tiny_inputs()
        expected = gradients(model, inputs)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            ddp = torch.nn.parallel.DistributedDataParallel(model)
            for _ in range(2):
                model.zero_grad()
                ddp(**inputs, labels=inputs["input_ids"]).loss.backward()
        finally:
            torch.distributed.destroy_process_group()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, expected.get(name, torch.zeros_like(p)), rtol=1e-4, atol=1e-5)


def test_a_text_model_without_a_plan_for_tensor_parallelism_has_none(text_type):
    """The head alone would be split, and the embedding that it is tied to would not: transformers refuses no plan."""
    plan = tiny_model(text_type)._tp_plan
    assert not plan if text_type == "bitnet" else {"lm_head", "model.language_model.embed_tokens"} <= plan.keys()


class TestOutputs:
    def test_outputs_of_the_image_encoder(self, text_type):
        model, inputs = tiny_model(text_type), tiny_inputs(pictures=2)
        expected = model.get_image_features(inputs["pixel_values"], output_hidden_states=True, output_attentions=True)
        for call in (model, model.model):
            got = call(**inputs, output_hidden_states=True, output_attentions=True).image_outputs
            assert got.last_hidden_state.equal(expected.last_hidden_state)
            assert torch.stack(got.pooler_output).equal(torch.stack(expected.pooler_output))
            assert [t.shape for t in got.hidden_states] == [t.shape for t in expected.hidden_states]
            assert call(**inputs).image_outputs.hidden_states is None
            assert call(input_ids=inputs["input_ids"][:, 7:]).image_outputs is None
            assert call(**inputs, return_dict=False)[0].equal(call(**inputs)[0])

    def test_attention_is_set_without_a_warning(self, monkeypatch):
        model, said = tiny_model(), []
        monkeypatch.setattr(type(modeling_utils.logger), "warning", lambda self, message, *args: said.append(message))
        model.set_attn_implementation("eager")
        sections = [getattr(model.config, name) for name in model.config.sub_configs]
        assert {c._attn_implementation for c in (model.config, *sections)} == {"eager"} and not said
        with pytest.raises(ValueError, match='attn_implementation="other"` is not supported'):
            model.set_attn_implementation("other")
        assert {c._attn_implementation for c in (model.config, *sections)} == {"eager"}
        assert len(model(**tiny_inputs(), output_attentions=True).attentions) == 2
        names = inspect.signature(model.forward).parameters["kwargs"].annotation
        assert "output_attentions" in get_args(names)[0].__optional_keys__


@pytest.mark.slow
def test_compile_fullgraph(text_type):
    model, inputs = tiny_model(text_type), tiny_inputs()
    expected = model(**inputs).logits
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(**inputs).logits, expected, **CLOSE)


def test_source_is_flat_remote_code():
    """The loader of remote code copies `from .x import Y` and nothing else."""
    for path in ROOT.glob("*_microvlm.py"):
        text = path.read_text()
        assert "from . import" not in text and "from .." not in text, path.name
