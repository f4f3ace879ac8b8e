"""GrowingLayer holds what transformers' DynamicLayer does, whatever is done to it; a packed model decodes with every
kind of cache."""

import copy
import random

import pytest
import torch
from conftest import outspoken_model, tiny_inputs
from microvlm.cache_microvlm import CACHE_NAME, GrowingLayer, MemoryCache
from microvlm.decoder_microvlm import TokenStep
from test_packing import packed
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from microvlm import decoder_microvlm as decoder


def states(g, rows, count):
    return torch.randn(rows, 2, count, 4, generator=g), torch.randn(rows, 2, count, 6, generator=g)  # widths may differ


@pytest.mark.parametrize("seed", range(40))
def test_a_growing_layer_is_a_dynamic_layer(seed):
    draw, g = random.Random(seed), torch.Generator().manual_seed(seed)
    dynamic, growing, rows = DynamicLayer(), GrowingLayer(), 3
    for _ in range(30):
        kind = draw.choice(["update"] * 4 + ["crop", "reorder", "repeat", "select", "reset", "copy", "adopt"])
        if kind == "update":
            new = states(g, rows, draw.choice([1, 1, 1, 5, 80]))
            for got, expected in zip(growing.update(*new), dynamic.update(*new)):
                assert torch.equal(got, expected)
        elif kind == "crop" and dynamic.get_seq_length():
            count = draw.randint(1, dynamic.get_seq_length())
            dynamic.crop(-count), growing.crop(-count)
        elif kind == "reorder":
            order = torch.randint(0, rows, (rows,), generator=g)
            dynamic.reorder_cache(order), growing.reorder_cache(order)
        elif kind == "repeat" and rows < 10 and dynamic.get_seq_length():
            dynamic.batch_repeat_interleave(2), growing.batch_repeat_interleave(2)
            rows *= 2
        elif kind == "select" and dynamic.get_seq_length():
            chosen = torch.randint(0, rows, (draw.randint(1, rows),), generator=g)
            dynamic.batch_select_indices(chosen), growing.batch_select_indices(chosen)
            rows = len(chosen)
        elif kind == "reset":
            dynamic.reset(), growing.reset()
        elif kind == "copy":
            growing = copy.deepcopy(growing)
        elif kind == "adopt":
            growing = GrowingLayer.of(dynamic)
        assert growing.get_seq_length() == dynamic.get_seq_length()
        assert growing.get_mask_sizes(3) == dynamic.get_mask_sizes(3)
        if dynamic.get_seq_length():
            assert torch.equal(growing.keys, dynamic.keys) and torch.equal(growing.values, dynamic.values)


def test_new_tokens_are_written_not_copied():
    layer, g = GrowingLayer(), torch.Generator().manual_seed(0)
    layer.update(*states(g, 1, 20))
    moves, place = 0, layer.kept_keys.data_ptr()
    for _ in range(500):
        layer.update(*states(g, 1, 1))
        moves += layer.kept_keys.data_ptr() != place
        place = layer.kept_keys.data_ptr()
    assert moves <= 5 and layer.get_seq_length() == 520 and layer.capacity < 2 * 520


def test_cropping_by_a_length_is_refused_as_by_the_library():
    layer = GrowingLayer()
    layer.update(*states(torch.Generator(), 1, 3))
    with pytest.raises(ValueError, match="positive value"):
        layer.crop(2)


@pytest.fixture(scope="module", params=["qwen2", "llama", "bitnet"])
def model(request):
    return packed(outspoken_model(request.param))


@pytest.fixture
def steps(monkeypatch):
    """Counts the tokens that take the recorded step."""
    count, plain = [], TokenStep.__call__

    def counted(self, *args):
        count.append(1)
        return plain(self, *args)

    monkeypatch.setattr(TokenStep, "__call__", counted)
    return count


GREEDY = {"max_new_tokens": 10, "do_sample": False}


@torch.no_grad()
def test_whole_passes_say_what_single_tokens_say(model, steps):
    inputs = tiny_inputs(1)
    out = model.generate(**inputs, **GREEDY)
    assert len(steps) == 9
    assert torch.equal(model.generate(**inputs, **GREEDY, use_cache=False), out) and len(steps) == 9
    length = inputs["input_ids"].shape[1]
    cache = DynamicCache(config=model.config.text_config)
    single = [model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"], past_key_values=cache).logits]
    for i in range(length, out.shape[1]):
        single.append(model(input_ids=out[:, i : i + 1], past_key_values=cache).logits)
    whole = model(input_ids=out, pixel_values=inputs["pixel_values"]).logits
    # a number on the edge of a rounding step moves a logit
    assert (torch.cat(single, 1) - whole).abs().median() < 1e-4 * whole.std()
    assert (torch.cat(single, 1) - whole).abs().max() < 0.1 * whole.std()
    assert all(type(layer) is GrowingLayer for layer in cache.layers) and cache.get_seq_length() == out.shape[1]


@torch.no_grad()
@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_the_decoder_takes_a_cache_by_either_name(model, name):
    embeds = model.get_input_embeddings()(tiny_inputs(1)["input_ids"])
    decode, cache = model.model.packed_decoder(), DynamicCache(config=model.config.text_config)
    whole = decode(inputs_embeds=embeds).last_hidden_state
    for part in embeds.split([4, 1, embeds.shape[1] - 5], 1):
        out = decode(inputs_embeds=part, **{name: cache})
    assert out[CACHE_NAME] is cache and cache.get_seq_length() == embeds.shape[1]
    difference = (out.last_hidden_state - whole[:, 5:]).abs()
    assert difference.median() < 1e-4 * whole.std() and difference.max() < 0.1 * whole.std()
    with pytest.raises(ValueError, match="both cache and past_key_values"):
        decode(inputs_embeds=embeds, past_key_values=cache, cache=cache)


@torch.no_grad()
@pytest.mark.parametrize(
    "kwargs",
    [
        {"cache_implementation": "static"},
        {"cache_implementation": "offloaded"},
        {"prompt_lookup_num_tokens": 3},
        {"num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": True},
    ],
    ids=str,
)
def test_every_cache_gives_the_same_words(model, kwargs):
    if kwargs.get("cache_implementation") == "offloaded" and not torch.cuda.is_available():
        pytest.skip("transformers offloads from an accelerator only")
    inputs = tiny_inputs(1)
    out = model.generate(**inputs, **GREEDY, **kwargs)
    assert torch.equal(getattr(out, "sequences", out), model.generate(**inputs, **GREEDY))


@torch.no_grad()
def test_a_cropped_cache_goes_on(model):
    inputs = tiny_inputs(1)
    out = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    cache, length = out.past_key_values, inputs["input_ids"].shape[1]
    twin = copy.deepcopy(cache)
    for kept in (cache, twin):
        kept.crop(-(kept.get_seq_length() - length))
    first = model(input_ids=out.sequences[:, length : length + 1], past_key_values=cache).logits
    # the twin's tokens are its own: writing to one leaves the other
    model(input_ids=torch.tensor([[7]]), past_key_values=twin)
    again = [
        model(input_ids=out.sequences[:, i : i + 1], past_key_values=cache).logits.argmax(-1)
        for i in range(length + 1, length + 9)
    ]
    tokens = torch.cat([first.argmax(-1), *again], 1)
    assert torch.equal(tokens, out.sequences[:, length + 1 : length + 10])


@torch.no_grad()
def test_long_texts_outgrow_the_room_and_the_table(monkeypatch):
    model = packed(outspoken_model("qwen2"))
    ids = torch.randint(5, 60, (1, 340), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(decoder, "MOST_PAIRS", 0)
    whole = model(input_ids=ids).logits  # torch's attention
    monkeypatch.undo()
    cache, parts = DynamicCache(config=model.config.text_config), []
    for part in ids.split([40, 260, *[1] * 40], 1):  # the compiled one
        parts.append(model(input_ids=part, past_key_values=cache).logits)
    difference = (torch.cat(parts, 1) - whole).abs()
    assert difference.median() < 1e-4 * whole.std() and difference.max() < 0.2 * whole.std()


@torch.no_grad()
def test_beams_and_batches(model):
    inputs = tiny_inputs(2)
    both = model.generate(**inputs, **GREEDY)
    for row in range(2):
        one = {k: v[row : row + 1] for k, v in inputs.items()}
        assert torch.equal(model.generate(**one, **GREEDY)[0], both[row])
    beams = model.generate(**inputs, max_new_tokens=6, num_beams=3, do_sample=False, num_return_sequences=2)
    assert beams.shape[0] == 4


@torch.no_grad()
def test_a_memory_takes_the_recorded_step(steps):
    memory_config = {"num_slots": 16, "code_size": 32, "num_content_slots": 4, "num_memory_tokens": 4}
    memory_config |= {"max_content_tokens": 16, "key_hidden_size": 32, "scope_hidden_size": 16}
    model = packed(outspoken_model("qwen2", use_memory=True, memory_config=memory_config))
    question = tiny_inputs(1, length=4)
    memory = model.write_memory(**tiny_inputs(1))
    for gate in ("on", torch.tensor([0.02])):
        steps.clear()
        out = model.generate(**question, **GREEDY, memory=memory, memory_gate=gate)
        assert len(steps) == 9
        model.model._decoder = None  # the library's layers
        plain = model.generate(
            **question, **GREEDY, memory=memory, memory_gate=gate, output_logits=True, return_dict_in_generate=True
        )
        del model.model._decoder
        fast = model.generate(
            **question, **GREEDY, memory=memory, memory_gate=gate, output_logits=True, return_dict_in_generate=True
        )
        assert isinstance(fast.past_key_values, MemoryCache)
        assert torch.equal(fast.sequences, out)
        for got, expected in zip(fast.logits[:2], plain.logits[:2]):  # of the prompt, and of a step
            assert (got - expected).abs().median() < 5e-3 * expected.std()
        off = model.generate(**question, **GREEDY)
        assert not torch.equal(off, out)


def test_inference_mode_comes_and_goes(model):
    inputs = tiny_inputs(1)
    fresh, cache = copy.deepcopy(model), DynamicCache(config=model.config.text_config)
    with torch.inference_mode():
        fresh(**inputs, past_key_values=cache)
        first = fresh(input_ids=torch.tensor([[7]]), past_key_values=cache).logits
    with torch.no_grad():
        second = fresh(input_ids=torch.tensor([[9]]), past_key_values=cache).logits
    with torch.inference_mode():
        fresh(input_ids=torch.tensor([[11]]), past_key_values=cache)
    with torch.no_grad():
        ids = torch.cat([inputs["input_ids"], torch.tensor([[7, 9]])], 1)
        whole = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits
    assert (torch.cat([first, second], 1) - whole[:, -2:]).abs().max() < 0.1 * whole.std()


@torch.no_grad()
def test_a_cache_of_another_dtype_or_of_more_rows(model, steps):
    inputs = tiny_inputs(1)
    cache = DynamicCache(config=model.config.text_config)
    model(**inputs, past_key_values=cache)
    model(input_ids=torch.tensor([[7]]), past_key_values=copy.deepcopy(cache))
    assert len(steps) == 1
    two = copy.deepcopy(cache)
    two.batch_repeat_interleave(2)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.double(), layer.values.double()
    for wrong, message in ((cache, "same dtype"), (two, "size")):  # as of the library's own layers
        with pytest.raises(RuntimeError, match=message):
            model(input_ids=torch.tensor([[7]]), past_key_values=wrong)
    assert len(steps) == 1


@torch.no_grad()
def test_what_the_library_kept_goes_on(model, steps):
    inputs = tiny_inputs(1)
    out = model.generate(**inputs, **GREEDY)
    length, cache = inputs["input_ids"].shape[1], DynamicCache(config=model.config.text_config)
    model.model._decoder = None  # the library's layers, which keep what they are given
    model(**inputs, past_key_values=cache)
    del model.model._decoder
    assert type(cache.layers[0]) is DynamicLayer
    steps.clear()
    said = [
        model(input_ids=out[:, i : i + 1], past_key_values=cache).logits.argmax(-1)
        for i in range(length, out.shape[1] - 1)
    ]
    assert len(steps) == len(said) and torch.equal(torch.cat(said, 1), out[:, length + 1 :])


@torch.no_grad()
def test_new_weights_of_a_part_are_seen(model):
    """Whoever loads them: the part itself, one of its layers, or an assignment in place."""
    text, inputs = model.model.language_model, tiny_inputs(1)
    said = [model(**inputs).logits]
    state = {name: t.clone() for name, t in text.state_dict().items()}
    norm, weight = (next(n for n in state if n.endswith(e)) for e in ("input_layernorm.weight", "q_proj.weight"))
    try:
        text.load_state_dict(state | {norm: 3 * state[norm]})
        said.append(model(**inputs).logits)
        text.layers[0].self_attn.q_proj.weight.copy_(state[weight].flip(0))
        said.append(model(**inputs).logits)
        assert not any(torch.allclose(a, b) for a, b in zip(said, said[1:]))
        model.model._decoder = None  # the library's layers
        torch.testing.assert_close(model(**inputs).logits, said[-1], rtol=0.1, atol=0.1 * float(said[-1].std()))
    finally:
        text.load_state_dict(state)
        model.model.__dict__.pop("_decoder", None)
    assert torch.equal(model(**inputs).logits, said[0])


def test_a_packed_model_compiles_around_its_kernels(model):
    """Dynamo does not trace into them."""
    inputs = tiny_inputs(1)
    with torch.no_grad():
        expected = model(**inputs).logits
        torch.compiler.reset()
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    torch.compiler.reset()


def test_an_activation_that_the_kernels_lack_goes_the_library_s_way():
    section = {"llama": "gelu", "bitnet": "silu"}
    for text, act in section.items():
        other = outspoken_model(text)
        other.config.text_config.hidden_act = act
        packed(other)
        assert not decoder.PackedDecoder.supports(other.model.language_model) and other.model.packed_decoder() is None


@torch.no_grad()
def test_positions_that_depend_on_the_length_are_not_kept(model):
    fast = model.model.packed_decoder()
    positions = torch.tensor([3, 300])
    kept = fast.turns(positions)
    assert torch.equal(kept, fast.make_turns(positions)) and len(fast.table) >= 301
    assert torch.equal(fast.turns(torch.tensor([1000])), fast.make_turns(torch.tensor([1000])))
    fresh, rotary = decoder.PackedDecoder(model.model.language_model), model.model.language_model.rotary_emb
    before = rotary.rope_type
    try:
        rotary.rope_type = "longrope"
        calls = []
        fresh.make_turns = lambda p: calls.append(p.tolist()) or kept
        fresh.turns(positions)
        assert calls == [[3, 300]] and fresh.table is None
    finally:
        rotary.rope_type = before
