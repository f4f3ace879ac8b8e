"""Text models of other families: heads that scale or cap, and layers of several kinds, of which some carry memory."""

import pytest
import torch
from conftest import TEXT, outspoken_model, text_section, tiny_config, tiny_inputs, tiny_model
from microvlm.memory_state_microvlm import MemoryState
from transformers import AutoConfig, AutoModelForCausalLM

from microvlm import quantization_microvlm as quantization
from microvlm.export.onnx import save_graphs
from microvlm.pack import pack
from microvlm.train.losses import labelled_logits

HEADS = {  # what stands behind the head
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0},
    "hyperclovax": {"logits_scaling": 0.3},  # multiplies by it, where Granite divides
    "cohere": {"logit_scale": 0.3, "use_qk_norm": False},
    "gemma2": {"final_logit_softcapping": 3.0, "sliding_window": 6, "head_dim": 8},
    "gemma3_text": {"final_logit_softcapping": 3.0},
    "nanochat": {"final_logit_softcapping": 3.0},
    "gemma4_text": {"final_logit_softcapping": 3.0, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
    "granitemoehybrid": {},
    "qwen2": {},
}
HEADS["gemma4_text"] |= {"head_dim": 8, "global_head_dim": 8, "layer_types": ["full_attention"] * 2}
KINDS = ["gemma3_text", "olmo3", "lfm2", "qwen3_5_text", "granitemoehybrid"]  # of layers, in `TEXT`
MEMORY = {"num_slots": 16, "code_size": 32, "num_memory_tokens": 6, "max_content_tokens": 12}
MEMORY |= {"key_hidden_size": 16, "scope_hidden_size": 16}
GREEDY = {"do_sample": False, "max_new_tokens": 8}
PACKED = {r"model\.language_model\.layers\..*": {"format": "int8"}}
VOCABULARY = {r"model\.language_model\.embed_tokens": {"format": "int8", "group_size": "row"}}
FACTS = tiny_inputs(3, 10, seed=1)


def section(family: str, **kwargs) -> dict:
    return (
        text_section(family, **HEADS.get(family, {}) | kwargs)
        if family in TEXT
        else (text_section("qwen2", **{"model_type": family} | HEADS[family] | kwargs))
    )


def pair(family: str):
    """A text model of transformers, and one of ours with its weights."""
    model = tiny_model("qwen2", text_config=section(family))
    values = section(family)
    source = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values)).eval()
    source.model.load_state_dict(model.model.language_model.state_dict())
    source.tie_weights()
    return source, model


@pytest.mark.parametrize("family", HEADS)
@torch.no_grad()
def test_logits_losses_and_words_are_the_text_models_own(family, tmp_path):
    source, model = pair(family)
    ids = tiny_inputs(2, 20, seed=3)["input_ids"][:, 7:]
    labels = ids.clone()
    labels[:, :4] = -100
    expected = source(input_ids=ids, labels=labels)
    got = model(input_ids=ids, labels=labels)
    assert got.logits.equal(expected.logits) and got.loss.equal(expected.loss)
    head = source.lm_head(source.model(input_ids=ids).last_hidden_state)
    assert head.equal(expected.logits) == (family == "qwen2") == (not model.scales_logits)
    # the other ways to logits
    kept = model(input_ids=ids, labels=labels, **labelled_logits(labels))
    assert kept.logits.shape[1] < ids.shape[1]
    torch.testing.assert_close(kept.loss, expected.loss)
    assert model(input_ids=ids, logits_to_keep=2).logits.equal(source(input_ids=ids, logits_to_keep=2).logits)
    places = torch.tensor([1, 5])
    assert model(input_ids=ids, logits_to_keep=places).logits.equal(expected.logits[:, places])
    settings = {**GREEDY, "min_new_tokens": 8, "suppress_tokens": [4], "pad_token_id": 1}
    assert model.generate(input_ids=ids, **settings).equal(source.generate(input_ids=ids, **settings))
    # saved, and packed
    model.save_pretrained(tmp_path / "plain")
    assert type(model).from_pretrained(tmp_path / "plain").eval()(input_ids=ids).logits.equal(expected.logits)
    scaled = type(model.get_input_embeddings()) is not torch.nn.Embedding
    if scaled:  # its scale would be lost
        with pytest.raises(
            ValueError, match="embed_tokens is a .*ScaledWordEmbedding, which does more than .* leave it"
        ):
            pack(model, quantization.PackedConfig(PACKED | VOCABULARY))
    pack(model, quantization.PackedConfig(PACKED | ({} if scaled else VOCABULARY)))
    packed = model.eval()(input_ids=ids).logits
    model.save_pretrained(tmp_path / "packed")
    assert type(model).from_pretrained(tmp_path / "packed").eval()(input_ids=ids).logits.allclose(packed, atol=1e-4)
    plain = model.dequantize(torch.float32).eval()(input_ids=ids).logits
    assert (packed - plain).norm() < 0.1 * plain.norm()  # activations are rounded


@pytest.mark.parametrize("family", ["biogpt", "xglm", "inkling2_text"])
def test_a_head_with_other_parts_is_refused(family):
    with pytest.raises(ValueError, match=f"text model '{family}' makes logits with other parts .'"):
        tiny_model("qwen2", text_config=text_section("qwen2", model_type=family))


@torch.no_grad()
def test_a_compiled_head_has_the_scale():
    model, hidden = pair("granite")[1], torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(model.logits, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(hidden), model.logits(hidden))
    torch.testing.assert_close(8 * compiled(hidden), model.lm_head(hidden))


@pytest.mark.slow
def test_a_model_compiles_whole_before_its_first_pass():
    model, ids = pair("granite")[1], tiny_inputs(1, 8)["input_ids"][:, 7:]
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    text = {"text_config": section(request.param)}
    model = outspoken_model("qwen2", use_memory=True, memory_config=MEMORY, **text)
    assert model.config.full_attention_layers == [1]
    return model


@pytest.fixture(scope="module")
def on(model):
    return {"memory": model.write_memory(**FACTS), "memory_gate": "on"}


def question(seed: int = 2, length: int = 12) -> dict:
    return tiny_inputs(3, length, seed=seed) | {"pixel_values": FACTS["pixel_values"]}


def words(model, inputs, **kwargs):
    return model.generate(**inputs, **GREEDY | kwargs)[:, inputs["input_ids"].shape[1] :]


@torch.no_grad()
def test_only_a_layer_of_full_attention_reads_the_memory(model, on):
    inputs = question()
    plain = model(**inputs, output_hidden_states=True)
    off = model(**inputs, memory=on["memory"], memory_gate="off", output_hidden_states=True)
    read = model(**inputs, **on, output_hidden_states=True)
    assert off.logits.equal(plain.logits)
    assert read.hidden_states[1].equal(plain.hidden_states[1])  # the first layer is of another kind
    assert (read.logits - plain.logits).abs().amax((1, 2)).min() > 0.01
    assert model.model.memory_projection.shape[0] == 1
    # each fact has its say
    fewer = model(**inputs, memory=model.forget(on["memory"], 0), memory_gate="on")
    assert not fewer.logits[0].allclose(read.logits[0])


@torch.no_grad()
def test_cached_passes_equal_whole_ones(model, on):
    """Windows of 6 have passed by then, and states have gone on."""
    inputs = question()
    expected = words(model, inputs, **on)
    assert (expected != words(model, inputs)).any(1).sum() > 1
    assert words(model, inputs, **on, use_cache=False).equal(expected)
    mixed = {"memory": on["memory"], "memory_gate": torch.tensor([True, False, True])}
    assert words(model, inputs, **mixed)[0::2].equal(expected[0::2])
    assert words(model, inputs, **mixed)[1].equal(words(model, inputs)[1])


@torch.no_grad()
def test_padded_rows_equal_single_rows(model, on):
    short, inputs = question(seed=5, length=5), question()
    pad = inputs["input_ids"].shape[1] - short["input_ids"].shape[1]
    ids, mask = (
        torch.nn.functional.pad(short[name], (pad, 0), value=v) for name, v in (("input_ids", 1), ("attention_mask", 0))
    )
    batch = {name: torch.cat([inputs[name][:1], t[1:]]) for name, t in (("input_ids", ids), ("attention_mask", mask))}
    together = words(model, batch | {"pixel_values": FACTS["pixel_values"]}, **on)
    for i, one in enumerate((inputs, short, short)):
        assert words(model, {name: t[i : i + 1] for name, t in one.items()}, **on).equal(together[i : i + 1])


def test_checkpointed_training_equals_plain_training(model, on):
    inputs, gradients = question(), []
    for checkpointing in (False, True):
        model.train().zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)  # of the dropout of keys
        loss = model(**inputs, **on, labels=inputs["input_ids"], use_cache=False).loss
        loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    model.gradient_checkpointing_disable()
    model.eval().zero_grad()
    assert gradients[0]["model.memory_projection.up.weight"].any()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_model_and_memory_come_back_from_the_disk(model, on, tmp_path):
    model.save_pretrained(tmp_path)
    on["memory"].save(tmp_path / "memory.safetensors")
    opened = type(model).from_pretrained(tmp_path).eval()
    memory = opened.load_memory(tmp_path / "memory.safetensors")
    assert isinstance(memory, MemoryState)
    inputs = question()
    assert opened(**inputs, memory=memory, memory_gate="on").logits.equal(model(**inputs, **on).logits)


def test_a_text_model_without_full_attention_has_no_memory():
    """All layers of the first Mistral look back as far as a window."""
    text = text_section("qwen2", model_type="mistral", sliding_window=6)
    with pytest.raises(Exception, match="full attention in a layer, 'mistral' has sliding_attention.$"):
        tiny_config(text_config=text, use_memory=True)
    assert tiny_config(text_config=text | {"sliding_window": None}, use_memory=True).full_attention_layers == [0, 1]


def test_graphs_have_layers_of_full_attention_only(tmp_path):
    model = tiny_model("qwen2", text_config=section("olmo3"))
    with pytest.raises(ValueError, match="the graphs have layers of full attention only, the text model has others."):
        save_graphs(model, (3, 32, 32), tmp_path)
