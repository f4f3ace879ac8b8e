"""Generation with the episodic memory: off is nothing at all, on every way to generate agrees, and rows stay apart."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import IMAGE_ID, VOCAB, outspoken_model, tiny_config, tiny_inputs, tiny_model
from microvlm.cache_microvlm import MemoryCache
from microvlm.memory_microvlm import MemoryQuery
from microvlm.memory_state_microvlm import MemoryState
from microvlm.quantization_microvlm import PackedConfig
from peft import LoraConfig, get_peft_model
from torch.utils.checkpoint import checkpoint
from transformers import BitsAndBytesConfig, CompileConfig, DynamicCache
from transformers.cache_utils import StaticCache

from microvlm.pack import pack

PAD, NEW, S, T = 1, 8, 6, 11  # S memory tokens, T tokens in a query
GREEDY = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": PAD}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
STATIC = {"cache_implementation": "static", "disable_compile": True}
MEMORY = {"num_slots": 16, "code_size": 32, "num_memory_tokens": S, "max_content_tokens": 16}
MEMORY |= {"key_hidden_size": 32, "scope_hidden_size": 16, "content_size": 24, "copy_size": 8}
FACTS = tiny_inputs(3, 10, seed=1)
PICTURES = FACTS["pixel_values"]
one_text_type = pytest.mark.parametrize("text_type", ["qwen2"])


def build(text_type: str, **kwargs):
    """An outspoken model with a memory."""
    return outspoken_model(text_type, **({"use_memory": True, "memory_config": MEMORY} | kwargs))


@pytest.fixture
def model(text_type):
    return build(text_type)


@pytest.fixture
def memory(model):
    """Three facts, one for each picture."""
    return model.write_memory(**FACTS)


@pytest.fixture
def on(memory):
    return {"memory": memory, "memory_gate": "on"}


@pytest.fixture
def inputs():
    """The pictures of the facts, with other words."""
    return tiny_inputs(3, T - 5, seed=2) | {"pixel_values": PICTURES}


def padded() -> tuple[dict, list[dict]]:
    """Rows of a picture; none; two pictures; a picture at the end: as one left-padded batch, and each alone."""
    picture = [IMAGE_ID] * 5
    words = torch.randint(5, VOCAB, (16,), generator=torch.Generator().manual_seed(3)).tolist()
    rows = [words[:1] + picture + words[1:4], words[4:11]]
    rows += [picture + words[11:13] + picture + words[13:15], words[15:] + picture]
    pictures = [PICTURES[:1], None, PICTURES[1:], PICTURES[1:2]]
    longest = max(map(len, rows))
    batch = {
        "input_ids": torch.tensor([[PAD] * (longest - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
        "pixel_values": torch.cat([p for p in pictures if p is not None]),
    }
    alone = [{"input_ids": torch.tensor([row])} for row in rows]
    return batch, [one if p is None else one | {"pixel_values": p} for one, p in zip(alone, pictures)]


def row(inputs: dict, i: int) -> dict:
    return {name: tensor[i : i + 1] for name, tensor in inputs.items()}


def tokens(model, inputs: dict, **kwargs) -> torch.Tensor:
    return model.generate(**inputs, **(GREEDY | kwargs))[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("first", ["plain", "off", "on"])
@torch.no_grad()
def test_a_memory_in_a_later_pass_on_padded_rows(first):
    """Forward passes of a batch padded on the left give each row's own logits, whichever of them reads the memory."""
    model = build("qwen2")
    memory, (batch, alone) = model.write_memory(**FACTS), padded()
    new = torch.tensor([[9, 17, 23]])

    def two_passes(inputs):
        read = {} if first == "plain" else {"memory": memory, "memory_gate": first}
        B = len(inputs["input_ids"])
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        cache = model(**inputs | {"attention_mask": mask}, **read, use_cache=True)
        cache = getattr(cache, "past_key_values", None) or cache.cache
        mask = torch.cat([mask, torch.ones(B, 3, dtype=torch.long)], 1)
        words = {"input_ids": new.expand(B, -1), "attention_mask": mask, "past_key_values": cache}
        return model(**words, memory=memory, memory_gate="on").logits

    together = two_passes(batch)
    for i, one in enumerate(alone):
        torch.testing.assert_close(together[i : i + 1], two_passes(one), **CLOSE)


def tokens_on(model, inputs: dict, memory: MemoryState, **kwargs) -> torch.Tensor:
    """New tokens with the memory on: in every row others than without it, or all comparisons would be vacuous."""
    got = tokens(model, inputs, memory=memory, memory_gate="on", **kwargs)
    assert (got != tokens(model, inputs, **kwargs)).any(1).all()
    return got


def read(model, inputs: dict, memory: MemoryState, gate="on"):
    features = model.get_image_features(inputs["pixel_values"]).last_hidden_state
    return model.model.read_memory(memory, model.model.get_memory_query(inputs["input_ids"], None, features), gate)


def gradients(model, inputs: dict, **kwargs) -> dict:
    """Gradients by name, and the loss; the noise of training is the same in every call."""
    model.zero_grad()
    torch.manual_seed(0)
    loss = model(**inputs, labels=inputs["input_ids"], **kwargs).loss
    loss.backward()
    named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return named | {"loss": loss.detach()}


def assert_close(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-5)


class TestOff:
    @pytest.mark.parametrize("how", ["off", "zeros", "scope", "empty"])
    def test_nothing_is_there(self, model, inputs, memory, on, how):
        """Not close to the model without memory: the same bits."""
        tokens_on(model, inputs, memory)
        with torch.no_grad():
            model.model.scope.out.bias.fill_(-1e4)
        for given in (inputs, padded()[0]):
            gate = {"off": "off", "zeros": torch.zeros(len(given["input_ids"])), "scope": "auto", "empty": "on"}[how]
            off = {"memory": model.new_memory() if how == "empty" else memory, "memory_gate": gate}
            for use_cache in (True, False):
                expected = model(**given, use_cache=use_cache).logits
                assert not torch.allclose(model(**given, use_cache=use_cache, **on).logits, expected, atol=1e-2)
                out = model(**given, use_cache=use_cache, **off)
                assert out.logits.equal(expected)
                assert out.past_key_values.num_memory_tokens == 0 if use_cache else out.past_key_values is None
            for options in ({}, STATIC, {"num_beams": 2}):
                options = GREEDY | options | {"output_logits": True, "return_dict_in_generate": True}
                expected, out = model.generate(**given, **options), model.generate(**given, **options, **off)
                assert out.sequences.equal(expected.sequences)
                assert all(a.equal(b) for a, b in zip(out.logits, expected.logits, strict=True))
                assert out.past_key_values.num_memory_tokens == 0 and out.past_key_values.log_gate is None

    def test_scope_decides(self, model, inputs, memory):
        expected, bias = tokens_on(model, inputs, memory), model.model.scope.out.bias
        torch.nn.init.constant_(bias, 1e4)
        assert tokens(model, inputs, memory=memory).equal(expected)
        torch.nn.init.zeros_(bias)
        logits = model(**inputs, memory=memory).scope_logits
        assert logits.shape == (3,) and len(set(logits.tolist())) == 3
        torch.nn.init.constant_(bias, -logits.mean().item())  # the threshold between the rows
        out = model(**inputs, memory=memory)
        gate = out.scope_probability >= 0.5
        assert 0 < gate.sum() < 3 and out.scope_probability.equal(out.scope_logits.sigmoid())
        assert tokens(model, inputs, memory=memory).equal(tokens(model, inputs, memory=memory, memory_gate=gate))


class TestAgreement:
    def test_cached_logits_equal_uncached(self, model, inputs, memory, on):
        ids = torch.cat([inputs["input_ids"], tokens_on(model, inputs, memory)], 1)
        full = model(input_ids=ids, pixel_values=PICTURES, use_cache=False, **on).logits
        out = model(**inputs, **on)
        cache, logits = out.past_key_values, [out.logits]
        for t in range(T, ids.shape[1]):
            logits.append(model(input_ids=ids[:, t : t + 1], past_key_values=cache).logits)
        torch.testing.assert_close(torch.cat(logits, 1), full, **CLOSE)
        assert isinstance(cache, MemoryCache) and cache.get_seq_length() == T + NEW

    OPTIONS = [{"use_cache": False}, STATIC, {"num_beams": 1}, {"prefill_chunk_size": 4}, {"logits_to_keep": 0}]

    @pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options)))
    def test_every_way_says_the_same(self, model, inputs, memory, on, options):
        for given in (inputs, padded()[0]):
            assert tokens(model, given, **on, **options).equal(tokens_on(model, given, memory))

    @pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
    def test_left_padded_rows_equal_single_rows(self, model, memory, on, options):
        batch, alone = padded()
        expected = torch.cat([tokens(model, one, **on, **options) for one in alone])
        assert tokens_on(model, batch, memory, **options).equal(expected)

    def test_left_padding_changes_no_logits(self, model, on):
        batch, alone = padded()
        position_ids = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        expected = torch.cat([model(**one, **on).logits[:, -1] for one in alone])
        for positions in ({"position_ids": position_ids}, {}):
            for use_cache in (True, False):
                together = model(**batch, **positions, use_cache=use_cache, **on).logits[:, -1]
                torch.testing.assert_close(together, expected, **CLOSE)

    @one_text_type
    def test_padding_changes_no_loss(self, model, inputs, memory):
        """As in training: memory tokens have no position, so the text's own may not come from its padding."""
        pad = lambda t, value: F.pad(t, (7, 0), value=value)  # noqa: E731
        padding = {"input_ids": pad(inputs["input_ids"], PAD), "attention_mask": pad(inputs["attention_mask"], 0)}
        labels = pad(inputs["input_ids"][:, 1:], -100)
        labels = F.pad(labels, (1, 0), value=-100)  # the first token is not foretold by padding
        for mode in (model.eval(), model.train()):
            kwargs = {"pixel_values": PICTURES, "memory_readout": read(model, inputs, memory), "use_cache": False}
            expected = mode(**inputs | kwargs, labels=inputs["input_ids"]).loss
            torch.testing.assert_close(mode(**padding, **kwargs, labels=labels).loss, expected)

    @pytest.mark.parametrize("kind", ["dynamic", "lazy", "static", "memory"])
    def test_handed_in_cache(self, model, inputs, memory, on, kind):
        config = model.config.text_config
        text = StaticCache(config, 64) if kind == "static" else DynamicCache(config=None if kind == "lazy" else config)
        cache = MemoryCache(text) if kind == "memory" else text
        kwargs = GREEDY | on | {"past_key_values": cache, "return_dict_in_generate": True, "disable_compile": True}
        out = model.generate(**inputs, **kwargs)
        assert out.sequences[:, T:].equal(tokens_on(model, inputs, memory))
        assert isinstance(out.past_key_values, MemoryCache)
        assert text.get_seq_length() == out.past_key_values.get_seq_length() == T + NEW - 1

    def test_other_ways_to_give_the_prompt(self, model, inputs, memory, on):
        ids = model.default_prompt(3)
        expected = tokens_on(model, {"input_ids": ids, "pixel_values": PICTURES}, memory)
        for given in ((), (ids,)):
            assert model.generate(*given, pixel_values=PICTURES, **on, **GREEDY)[:, ids.shape[1] :].equal(expected)
        expected, logits = tokens_on(model, inputs, memory), model(**inputs, **on).logits
        inputs["mm_encoder_outputs"] = {"image": model.get_image_features(inputs.pop("pixel_values"))}
        assert tokens(model, inputs, **on).equal(expected) and model(**inputs, **on).logits.equal(logits)

    @one_text_type
    def test_pictures_are_encoded_and_the_memory_read_once(self, model, inputs, on, monkeypatch):
        calls, original = [], model.model.read_memory
        model.model.vision_tower.register_forward_hook(lambda *_: calls.append("picture"))
        monkeypatch.setattr(model.model, "read_memory", lambda *args: calls.append("memory") or original(*args))
        for options in ({}, {"num_beams": 3}, {"use_cache": False}):
            calls.clear()
            tokens(model, inputs, **on, **options)
            assert sorted(calls) == ["memory", "picture"]

    def test_prompt_lookup_equals_greedy(self, model, inputs, memory, on):
        one, lengths = row(inputs, 0), []
        one["input_ids"][:, -2:] = one["input_ids"][:, -4:-2]  # something to look up
        expected = tokens_on(model, one, memory, max_new_tokens=16)
        model.lm_head.register_forward_hook(lambda module, args, out: lengths.append(out.shape[1]))
        assert tokens(model, one, prompt_lookup_num_tokens=2, max_new_tokens=16, **on).equal(expected)
        assert max(lengths) > 1

    @pytest.mark.parametrize("same", [True, False])
    def test_assistant_model_equals_greedy(self, model, inputs, memory, on, same):
        one, assistant = row(inputs, 0), model if same else build("llama")
        assert tokens(model, one, assistant_model=assistant, **on).equal(tokens_on(model, one, memory))


class TestContinuation:
    @pytest.mark.parametrize("new_only", [True, False])
    @pytest.mark.parametrize("static", [True, False])
    def test_continued_equals_one_go(self, model, inputs, memory, on, new_only, static):
        expected = tokens_on(model, inputs, memory)
        cache = StaticCache(model.config.text_config, 64) if static else None
        kwargs = GREEDY | {"max_new_tokens": 4, "disable_compile": True}
        first = model.generate(**inputs, **on, **kwargs, past_key_values=cache, return_dict_in_generate=True)
        cache = first.past_key_values
        assert isinstance(cache, MemoryCache) and cache.num_memory_tokens == S and cache.get_seq_length() == T + 3
        twin, forgetful = copy.deepcopy(cache), copy.deepcopy(cache)
        forgetful.detach()
        ids = first.sequences[:, -1:] if new_only else first.sequences
        kwargs |= {"input_ids": ids, "attention_mask": torch.ones(3, T + 4).long()}
        for same in (cache, twin):
            assert model.generate(**kwargs, past_key_values=same)[:, -4:].equal(expected[:, 4:])
        assert not model.generate(**kwargs, past_key_values=forgetful)[:, -4:].equal(expected[:, 4:])

    def test_another_memory_in_the_same_cache(self, model, inputs, memory, on):
        """forward() takes off what was attached, and puts another read-out in its place; the text stays."""

        def step(*readout):
            cache = model(**inputs, **on).past_key_values
            kwargs = {"memory_readout": readout[0]} if readout else {}
            logits = model(input_ids=torch.full((3, 1), 7), past_key_values=cache, **kwargs).logits
            assert cache.get_seq_length() == T + 1
            return cache.num_memory_tokens, logits

        (_, same), (S_on, again) = step(), step(read(model, inputs, memory))
        assert again.equal(same) and S_on == S
        (_, other), (S_off, off) = step(read(model, inputs, memory.forget(1))), step(read(model, inputs, memory, "off"))
        assert S_off == 0 and not torch.allclose(other, same, atol=1e-2) and not torch.allclose(off, same, atol=1e-2)


def test_sampling(model, inputs, memory):
    """Rows are drawn in parallel: one that is on as in the all-on run, one that is off as without memory."""

    def draw(seed=0, **kwargs):
        torch.manual_seed(seed)
        return tokens(model, inputs, do_sample=True, top_k=0, num_return_sequences=3, **kwargs)

    gate = torch.tensor([False, True, False])
    each, kwargs = gate.repeat_interleave(3), {"memory": memory, "memory_gate": "on"}
    on, off, mixed = draw(**kwargs), draw(), draw(memory=memory, memory_gate=gate)
    assert on.shape == (9, NEW) and on.equal(draw(**kwargs)) and not on.equal(draw(seed=1, **kwargs))
    assert mixed[each].equal(on[each]) and mixed[~each].equal(off[~each])
    assert (on != off).view(3, -1).any(1).all()


class TestRows:
    OPTIONS = [{}, {"num_beams": 3, "num_return_sequences": 2}, STATIC, {"use_cache": False}]

    @pytest.mark.parametrize("options", OPTIONS, ids=["greedy", "beams", "static", "uncached"])
    def test_mixed_gates(self, model, inputs, memory, options):
        gate = torch.tensor([True, False, True])
        each = gate.repeat_interleave(options.get("num_return_sequences", 1))
        on, off = tokens_on(model, inputs, memory, **options), tokens(model, inputs, **options)
        for given in (gate, gate.float()):
            mixed = tokens(model, inputs, memory=memory, memory_gate=given, **options)
            assert mixed[each].equal(on[each]) and mixed[~each].equal(off[~each])

    def test_mixed_gates_logits(self, model, inputs, memory, on):
        gate = torch.tensor([True, False, True])
        mixed = model(**inputs, memory=memory, memory_gate=gate).logits
        expected, off = model(**inputs, **on).logits, model(**inputs).logits
        assert mixed[gate].equal(expected[gate]) and not torch.allclose(mixed[gate], off[gate], atol=1e-2)
        torch.testing.assert_close(mixed[~gate], off[~gate], **CLOSE)

    @pytest.mark.parametrize("soft", [False, True])
    def test_an_off_row_does_not_see_what_the_memory_holds(self, model, inputs, memory, soft):
        """Not one bit of it: zero times NaN would be NaN."""
        gate, state = torch.tensor([0.7 if soft else 1.0, 0.0, 1.0]), memory.select([0, 0, 0])
        expected = model(**inputs, memory=state, memory_gate=gate).logits
        words = tokens(model, inputs, memory=state, memory_gate=gate)
        for hole in (torch.nan, torch.inf, 1e30):
            mean, covariance = state.mean.clone(), state.covariance.clone()
            mean[1] = covariance[1] = hole
            other = {"memory": replace(state, mean=mean, covariance=covariance), "memory_gate": gate}
            assert model(**inputs, **other).logits.equal(expected)
            assert tokens(model, inputs, **other).equal(words)
        moved = model(**inputs, memory=replace(state, mean=state.mean.flip(2)), memory_gate=gate).logits
        assert moved[1].equal(expected[1]) and not torch.allclose(moved[2], expected[2], atol=1e-2)

    def test_one_memory_for_all_equals_a_copy_for_each(self, model, inputs, memory):
        copies = memory.select([0, 0, 0])
        assert tokens_on(model, inputs, copies).equal(tokens_on(model, inputs, memory))
        logits = [model(**inputs, memory=state, memory_gate="on").logits for state in (copies, memory)]
        torch.testing.assert_close(*logits, **CLOSE)

    def test_every_row_reads_its_own_memory(self, model, inputs):
        own = [model.write_memory(**row(FACTS, i)) for i in range(3)]
        together = tokens_on(model, inputs, MemoryState.stack(own))
        alone = [tokens(model, row(inputs, i), memory=own[i], memory_gate="on") for i in range(3)]
        assert together.equal(torch.cat(alone))
        swapped = tokens(model, inputs, memory=MemoryState.stack(own[1:] + own[:1]), memory_gate="on")
        assert (swapped != together).any(1).all()

    def test_an_empty_row_among_others(self, model, inputs, memory):
        got = tokens(model, inputs, memory=MemoryState.stack([memory, model.new_memory(), memory]), memory_gate="on")
        assert got[[0, 2]].equal(tokens_on(model, inputs, memory)[[0, 2]]) and got[1].equal(tokens(model, inputs)[1])

    @one_text_type
    def test_pictures_ask_by_picture_and_texts_by_words(self, model, inputs, memory, on):
        part = model.model.memory
        by_picture = model(**inputs, **on).memory_content
        query = MemoryQuery(part.image_keys(model.get_image_features(PICTURES).last_hidden_state, 1))
        torch.testing.assert_close(by_picture.flatten(1), part.read(memory, query)[0].content[0], **CLOSE)
        inputs["input_ids"] = tiny_inputs(3, T - 5, seed=9)["input_ids"]
        assert model(**inputs, **on).memory_content.equal(by_picture)
        ids = torch.tensor([[9, 10, 11, 12], [20, 21, 22, 23]])
        by_words = model(input_ids=ids, **on).memory_content
        words = F.normalize(part.content_encoder.v_proj(model.get_input_embeddings()(ids)), dim=-1)
        query = MemoryQuery(torch.zeros(2, 32), words, torch.ones(2, 4))
        torch.testing.assert_close(by_words.flatten(1), part.read(memory, query)[0].content[0], **CLOSE)
        assert not torch.allclose(*by_words, atol=1e-2)
        tokens_on(model, {"input_ids": ids}, memory)

    @one_text_type
    def test_a_question_finds_the_sentence_that_says_its_words(self, model, memory):
        stored = memory.token_ids[0]
        for place in range(3):
            words = stored[place][stored[place] >= 0][:-1][None, 1:4]
            padded, mask = F.pad(words, (2, 0), value=1), torch.tensor([[0, 0, 1, 1, 1]])
            for inputs in ({"input_ids": words}, {"input_ids": padded, "attention_mask": mask}):
                content = model(**inputs, memory=memory, memory_gate="on").memory_content
                best = F.cosine_similarity(content.flatten(1), memory.contents[0], dim=-1).argmax()
                assert best == place

    @one_text_type
    def test_pictures_and_questions_in_one_batch(self, model, inputs, memory, on):
        length = inputs["input_ids"].shape[1]
        question = F.pad(torch.tensor([[9, 10, 11, 12]]), (length - 4, 0), value=1)
        mask = torch.ones(4, length, dtype=torch.long)
        mask[3, :-4] = 0
        batch = {"input_ids": torch.cat([inputs["input_ids"], question]), "attention_mask": mask}
        got = model(**batch, pixel_values=inputs["pixel_values"], **on).memory_content
        torch.testing.assert_close(got[:3], model(**inputs, **on).memory_content, **CLOSE)
        alone = model(input_ids=torch.tensor([[9, 10, 11, 12]]), **on).memory_content
        torch.testing.assert_close(got[3:], alone, **CLOSE)


class TestErrors:
    BETWEEN = "memory_gate must lie between 0 and 1."
    CASES = [
        ({"memory_gate": torch.ones(2)}, "memory_gate has the shape (2,), expected (3,)."),
        ({"memory_gate": torch.ones(3, 1)}, "memory_gate has the shape (3, 1), expected (3,)."),
        ({"memory_gate": torch.tensor([0.0, 1.1, 0.0])}, BETWEEN),
        ({"memory_gate": torch.tensor([0.0, -0.1, 0.0])}, BETWEEN),
        ({"memory_gate": torch.tensor([0.0, torch.nan, 0.0])}, BETWEEN),
        ({"memory_gate": 2}, BETWEEN),
        ({"memory_gate": "maybe"}, "memory_gate must be 'auto', 'on', 'off' or a tensor, got 'maybe'."),
        ({"rows": 2}, "the memory has 2 rows, the batch 3: they must agree, or be one."),
        ({"input_ids": torch.full((3, 9), 7)}, "The text has placeholders for 0 images, 3 were given."),
        ({"pixel_values": None}, "The text has placeholders for 3 images, 0 were given."),
        (
            {"input_ids": None, "inputs_embeds": torch.ones(3, 9, 32), "pixel_values": None},
            "reading a memory needs input_ids: inputs_embeds alone do not say which row owns an image.",
        ),
        (
            {"input_ids": None, "inputs_embeds": torch.ones(3, 9, 32)},
            "reading a memory needs input_ids: inputs_embeds alone do not say which row owns an image.",
        ),
    ]

    @pytest.mark.parametrize("change, message", CASES, ids=range(len(CASES)))
    @one_text_type
    def test_exact_messages(self, model, inputs, memory, change, message):
        given = inputs | {"memory": memory.select([0] * change.get("rows", 1))} | change
        given.pop("rows", None)
        for call in (model, model.generate):
            with pytest.raises(ValueError) as error:
                call(**given)
            assert str(error.value) == message

    @one_text_type
    def test_a_file_name_is_no_memory(self, model, inputs):
        for call in (model, model.generate):
            with pytest.raises(TypeError) as error:
                call(**inputs, memory="facts.safetensors")
            assert str(error.value) == "memory must be a MemoryState, got str: load_memory() opens a file."

    @one_text_type
    def test_facts_are_written_in_evaluation_mode(self, model):
        with pytest.raises(ValueError) as error:
            model.train().write_memory(**FACTS)
        assert str(error.value) == "write_memory needs the model in evaluation mode: call eval() first."

    @one_text_type
    def test_memory_of_another_model(self, model, inputs, memory):
        with torch.no_grad():
            model.model.memory.reference[0, 0] += 1
        own = model.memory_fingerprint()
        for call in (model, model.generate):
            with pytest.raises(ValueError) as error:
                call(**inputs, memory=memory)
            written = f"the memory was written by another model: its fingerprint is {memory.fingerprint}"
            assert str(error.value) == f"{written}, this model's {own}."
        for call in (plain := tiny_model(), plain.generate):
            with pytest.raises(ValueError) as error:
                call(**inputs, memory=memory)
            assert str(error.value) == "this model has no episodic memory: build it with config.use_memory=True."

    @one_text_type
    def test_pixels_and_features_together(self, model, inputs, memory):
        """As without memory: neither is silently ignored."""
        inputs["mm_encoder_outputs"] = {"image": model.get_image_features(PICTURES)}
        for kwargs in ({}, {"memory": memory}):
            with pytest.raises(ValueError) as error:
                model(**inputs, **kwargs)
            assert str(error.value) == "You cannot specify both pixel_values and mm_encoder_outputs at the same time"


class TestGate:
    @pytest.mark.parametrize("gate", ["on", [0.3, 0.3, 0.3], [1.0, 0.0, 0.5]], ids=str)
    def test_eager_equals_sdpa(self, model, inputs, memory, gate):
        inputs["attention_mask"][0, :2] = 0
        kwargs = {"memory": memory, "memory_gate": gate if gate == "on" else torch.tensor(gate)}
        expected, words = model(**inputs, **kwargs).logits, tokens(model, inputs, **kwargs)
        assert not torch.allclose(expected, model(**inputs).logits, atol=1e-2)
        model.set_attn_implementation("eager")
        torch.testing.assert_close(model(**inputs, **kwargs).logits[:, 2:], expected[:, 2:], **CLOSE)
        assert tokens(model, inputs, **kwargs).equal(words)

    def test_one_is_on_and_zero_is_off(self, model, inputs, memory):
        on, off = tokens_on(model, inputs, memory), tokens(model, inputs)
        for one in (torch.ones(3), torch.ones(3).bool()):
            assert tokens(model, inputs, memory=memory, memory_gate=one).equal(on)
            assert tokens(model, inputs, memory=memory, memory_gate=torch.zeros_like(one)).equal(off)
        for one, zero in ((1.0, 0.0), (True, False), (1, 0)):  # for all rows
            assert tokens(model, inputs, memory=memory, memory_gate=one).equal(on)
            assert tokens(model, inputs, memory=memory, memory_gate=zero).equal(off)
        in_float64 = copy.deepcopy(model).double()
        kwargs = {"memory": in_float64.write_memory(**FACTS | {"pixel_values": PICTURES.double()}), "memory_gate": 0.5}
        in_float64(**inputs | {"pixel_values": PICTURES.double()}, **kwargs)
        gates = [torch.full((3,), gate) for gate in (0.0, 0.3, 0.6, 1.0)]
        logits = [model(**inputs, memory=memory, memory_gate=gate).logits for gate in gates]
        assert all((a - b).abs().amax((1, 2)).min() > 1e-3 for a, b in zip(logits, logits[1:]))

    def test_soft_gate_is_a_weight(self, model, inputs, memory):
        """The odds of memory against text, in the first layer, are the gate times those of a memory that is on."""
        model.set_attn_implementation("eager")

        def log_odds(gate):
            weights = model(**inputs, memory=memory, memory_gate=gate, output_attentions=True).attentions[0].double()
            assert weights.shape == (3, 4, T, T + S)
            return weights[..., -S:].sum(-1).log() - weights[..., :-S].sum(-1).log()

        gate, on = torch.tensor([0.3, 0.6, 1.0]), log_odds("on")
        moderate = on.abs() < 10  # beyond, float32 has no digits left
        assert moderate.float().mean() > 0.1
        expected = on + gate.double().log().view(3, 1, 1)
        torch.testing.assert_close(log_odds(gate)[moderate], expected[moderate], rtol=1e-3, atol=1e-3)

    @one_text_type
    def test_pooling_attentions_are_returned(self, model, inputs, on):
        model.set_attn_implementation("eager")
        expected = model(**inputs, output_attentions=True).pooling_attentions
        got = model(**inputs, output_attentions=True, **on).pooling_attentions
        assert got is not None and got.equal(expected)


class TestTraining:
    @pytest.mark.parametrize("gate", ["auto", "on", "mixed"])
    def test_gradient_checkpointing_changes_nothing(self, model, inputs, memory, gate):
        model.train()
        kwargs = {"memory": memory, "memory_gate": torch.tensor([1.0, 0.0, 0.5]) if gate == "mixed" else gate}
        expected, without = gradients(model, inputs, **kwargs), gradients(model, inputs)
        assert (expected["loss"] - without["loss"]).abs() > 1e-3
        for name in ("memory_projection.up.weight", "memory.reference", "memory.key_encoder.image_fc1.weight"):
            assert expected[f"model.{name}"].any() and f"model.{name}" not in without, name
        model.gradient_checkpointing_enable({"use_reentrant": False})
        calls = []
        model.model.language_model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        got = gradients(model, inputs, **kwargs)
        assert len(calls) == 2  # forward, and once more in the backward pass
        assert_close(got, expected)

    @one_text_type
    def test_reentrant_checkpointing(self, model, inputs, memory):
        model.train().gradient_checkpointing_enable({"use_reentrant": True})
        with pytest.raises(ValueError) as error:
            model(**inputs, memory=memory, use_cache=False)
        assert str(error.value) == (
            "gradient checkpointing with a memory needs use_reentrant=False: all layers share the memory's graph."
        )

    def test_soft_gate_teaches_scope(self, model, inputs, memory, on):
        model.train()
        scope = {f"model.scope.{name}" for name, _ in model.model.scope.named_parameters()}
        got = gradients(model, inputs, memory=memory)
        assert {name for name in scope if got[name].any()} == scope
        assert not gradients(model, inputs, **on).keys() & scope
        assert not gradients(model.eval(), inputs, memory=memory).keys() & scope

    @one_text_type
    def test_checkpointing_needs_a_pass_without_cache(self, model, inputs, memory):
        model.train().gradient_checkpointing_enable()
        with pytest.raises(ValueError) as error:
            model(**inputs, memory=memory, past_key_values=DynamicCache(config=model.config.text_config))
        assert str(error.value) == "gradient checkpointing with a memory needs a pass without a cache."

    @one_text_type
    def test_checkpointing_by_any_function(self, model, inputs, memory):
        expected = gradients(model.train(), inputs, memory=memory)
        model.gradient_checkpointing_enable()
        for layer in model.model.language_model.layers:
            layer._gradient_checkpointing_func = lambda *args: checkpoint(*args, use_reentrant=False)
        assert_close(gradients(model, inputs, memory=memory), expected)

    @pytest.mark.parametrize("own_cache", [False, True])
    @one_text_type
    def test_checkpointing_without_memory_afterwards(self, model, inputs, memory, own_cache):
        """A step with memory leaves nothing behind that would make a step without it append its text twice."""
        inputs["attention_mask"][0, :2] = 0
        expected = gradients(model.train(), inputs)
        model.gradient_checkpointing_enable()
        gradients(model, inputs, memory=memory)
        cache = {"past_key_values": DynamicCache(config=model.config.text_config)} if own_cache else {}
        assert_close(gradients(model, inputs, **cache), expected)


@one_text_type
class TestMemoryCache:
    GATE = torch.tensor([1.0, 0.5, 0.0])

    @pytest.fixture
    def new_cache(self, model, inputs, memory):
        return lambda: model(**inputs, memory=memory, memory_gate=self.GATE).past_key_values

    def test_lengths_are_those_of_the_text(self, new_cache):
        cache = new_cache()
        assert cache.get_seq_length() == cache.get_query_offset() == T and cache.num_memory_tokens == S
        assert cache.get_mask_sizes(4, 0) == (T + 4, 0) and cache.get_max_length() == -1
        assert not cache.hard and torch.allclose(cache.log_gate, self.GATE.log())
        assert all(part[2].eq(0).all() and part[:2].ne(0).any() for layer in cache.memory.values() for part in layer)
        new = torch.randn(3, 2, 1, 8)
        keys, values = cache.update(new, 2 * new, 0)
        assert keys.shape == values.shape == (3, 2, T + 1 + S, 8)
        assert keys[..., -S:, :].equal(cache.memory[0][0]) and values[..., -S:, :].equal(cache.memory[0][1])
        assert keys[..., T, :].equal(new[..., 0, :]) and values[..., T, :].equal(2 * new[..., 0, :])
        assert cache.layers[0].keys.shape[-2] == T + 1 and cache.text.layers is cache.layers

    VERBS = [
        ("reorder_cache", torch.tensor([2, 0, 0]), [2, 0, 0]),
        ("batch_select_indices", torch.tensor([1]), [1]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
    ]

    @pytest.mark.parametrize("verb, argument, rows", VERBS, ids=["reorder", "select", "repeat"])
    def test_rows_go_together(self, model, new_cache, verb, argument, rows):
        cache, before = new_cache(), new_cache()
        getattr(cache, verb)(argument)
        assert cache.log_gate.equal(before.log_gate[rows])
        for layer in range(2):
            assert cache.layers[layer].keys.equal(before.layers[layer].keys[rows])
            assert all(got.equal(old[rows]) for got, old in zip(cache.memory[layer], before.memory[layer]))
        word = torch.tensor([[7], [8], [9]])
        expected = model(input_ids=word, past_key_values=before).logits[rows]
        torch.testing.assert_close(model(input_ids=word[rows], past_key_values=cache).logits, expected, **CLOSE)

    def test_crop_takes_text_only(self, model, inputs, memory, new_cache):
        cache = new_cache()
        cache.crop(-4)
        assert cache.get_seq_length() == T - 4 and cache.num_memory_tokens == S
        expected = model(**inputs, memory=memory, memory_gate=self.GATE).logits[:, -4:]
        got = model(input_ids=inputs["input_ids"][:, -4:], past_key_values=cache).logits
        torch.testing.assert_close(got, expected, **CLOSE)

    def test_reset(self, model, inputs, new_cache):
        cache = new_cache()
        cache.reset()
        assert cache.get_seq_length() == cache.num_memory_tokens == 0
        assert cache.memory == {} and cache.log_gate is None and cache.hard
        assert model(**inputs, past_key_values=cache).logits.equal(model(**inputs).logits)

    def test_offload(self, model, new_cache):
        cache, before, word = new_cache(), new_cache(), torch.full((3, 1), 7)
        for layer in range(2):
            cache.offload(layer)
        assert {part.device.type for layer in cache.memory.values() for part in layer} == {"cpu"}
        expected = model(input_ids=word, past_key_values=before).logits
        assert model(input_ids=word, past_key_values=cache).logits.equal(expected)
        cache.detach()
        cache.offload(0)

    @pytest.mark.parametrize("through_model", [False, True])
    def test_rows_that_do_not_match(self, model, inputs, memory, through_model):
        readout, two = read(model, inputs, memory), torch.zeros(2, 2, 1, 8)
        with pytest.raises(ValueError) as error:
            if through_model:
                model(input_ids=torch.full((2, 4), 7), memory_readout=readout)
            MemoryCache(DynamicCache(config=model.config.text_config), readout).update(two, two, 0)
        assert str(error.value) == (
            "the memory was read for 3 rows, the text has 2: "
            "batch_repeat_interleave or batch_select_indices the cache along with the text."
        )
        half = torch.zeros(3, 1, 1, 8)  # of a text model that is split over two devices
        with pytest.raises(ValueError, match="^the memory has 2 heads, the text 1"):
            MemoryCache(DynamicCache(config=model.config.text_config), readout).update(half, half, 0)


class TestOutside:
    def test_saved_model_and_saved_memory(self, model, inputs, memory, tmp_path):
        model.save_pretrained(tmp_path)
        memory.save(tmp_path / "memory.safetensors")
        loaded = type(model).from_pretrained(tmp_path)
        assert loaded.memory_fingerprint() == model.memory_fingerprint()
        got = tokens(loaded, inputs, memory=loaded.load_memory(tmp_path / "memory.safetensors"), memory_gate="on")
        assert got.equal(tokens_on(model, inputs, memory))

    def test_lora(self, model, inputs, memory, on):
        expected, off = tokens_on(model, inputs, memory), tokens(model, inputs)
        config = LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj)", task_type="CAUSAL_LM")
        peft = get_peft_model(model, config).eval()
        assert tokens(peft, inputs, **on).equal(expected)
        assert tokens(peft, inputs, memory=memory, memory_gate="off").equal(off)
        with torch.no_grad():
            for name, p in peft.named_parameters():
                if "lora_B" in name:
                    p.normal_()
        trained = tokens_on(peft, inputs, memory)  # the decoder's adapters leave the memory readable
        assert not trained.equal(expected)

    @torch.no_grad()  # bitsandbytes packs its weights for inference at the first call, and has no gradients then
    @pytest.mark.parametrize("memory_too", [False, True])
    def test_nf4(self, inputs, tmp_path, memory_too):
        """The decoder in 4 bits; and, as bitsandbytes does unless told otherwise, the linear layers of the memory."""
        text = tiny_config().text_config.to_dict() | {"hidden_size": 64}  # bitsandbytes packs blocks of 64 on the CPU
        model = build("qwen2", text_config=text, memory_config=MEMORY | {"code_size": 64})
        model.save_pretrained(tmp_path)
        kept = {f"model.{name}" for name, _ in model.model.named_children()} - {"model.language_model"} | {"lm_head"}
        if memory_too:
            kept = kept - {"model.memory", "model.memory_projection"} | {"model.memory.key_encoder"}
        config = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": sorted(kept)}
        small = type(model).from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(**config)).eval()
        found = {name.split(".")[1] for name, m in small.named_modules() if type(m).__name__ == "Linear4bit"}
        assert found == {"language_model"} | ({"memory", "memory_projection"} if memory_too else set())
        memory = small.write_memory(**FACTS)
        tokens_on(small, inputs, memory)
        assert tokens(small, inputs, memory=memory, memory_gate="off").equal(tokens(small, inputs))
        assert small(**inputs, memory=memory, memory_gate="off").logits.equal(small(**inputs).logits)


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["on", [1.0, 0.0, 0.5]], ids=str)
def test_compiled_static_cache_equals_eager(model, inputs, memory, gate):
    compile_config = CompileConfig(fullgraph=True)
    compile_config._compile_all_devices = True  # generate() compiles on accelerators only, unless told
    kwargs = {"memory": memory, "memory_gate": gate if gate == "on" else torch.tensor(gate)}
    torch.compiler.reset()
    tokens_on(model, inputs, memory)
    for seed in (2, 3):  # the second run reuses the compiled graph
        inputs["input_ids"] = tiny_inputs(3, T - 5, seed=seed)["input_ids"]
        expected = tokens(model, inputs, **kwargs)
        got = tokens(model, inputs, cache_implementation="static", compile_config=compile_config, **kwargs)
        assert got.equal(expected)
        assert hasattr(model, "_compiled_call")


@pytest.mark.parametrize(
    "change",
    [
        {"num_content_slots": 1},
        {"kv_rank": 4},
        {"addressing": "gaussian"},
        {"ordering": "lstm"},
        {"scope_context": False},
        {"addressing": "waves", "num_slots": 48},
        {"copy_size": None},
        {"num_memory_tokens": 16},  # a slot for each token
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_form_of_memory_writes_reads_and_decodes(change):
    model, inputs = tiny_model(use_memory=True, memory_config=MEMORY | change), tiny_inputs(2, 8)
    memory = model.write_memory(**inputs)
    config = model.config.memory_config
    assert memory.mean.shape == (1, config.num_slots, config.num_content_slots * config.content_size)
    with torch.no_grad():
        on, off = (model(**inputs, memory=memory, memory_gate=gate).logits for gate in ("on", "off"))
        uncached = model(**inputs, memory=memory, memory_gate="on", use_cache=False).logits
        less = model(**inputs, memory=model.forget(model.forget(memory, 1), 0), memory_gate="on").logits
    assert (on - off).abs().max() > 1e-3 and torch.equal(less, off)
    torch.testing.assert_close(uncached, on)


def test_a_fused_optimizer_leaves_nothing_stale():
    """It changes weights without counting up their version, which addresses and fingerprint were remembered by."""
    model = tiny_model("qwen2", use_memory=True).eval()
    reference = model.model.memory.reference
    with torch.no_grad():
        fingerprint, prepared = model.memory_fingerprint(), model.model.memory.prepared()
        assert model.model.memory.prepared() is prepared  # remembered
    optimizer = torch.optim.AdamW([reference], lr=0.1, fused=True)
    model.train()
    reference.grad = torch.randn(reference.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    model.eval()
    computed = model.model.memory.prepared().detach()
    with torch.no_grad():
        assert torch.equal(model.model.memory.prepared(), computed) and not torch.equal(computed, prepared)
        assert model.memory_fingerprint() != fingerprint


# --- torch's defaults belong to the whole process: another thread may set them


@torch.no_grad()
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64, "meta"], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_defaults_of_torch_change_nothing(default, packed, text_type):
    def use(model):
        memory = model.write_memory(**FACTS)
        plain = model.generate(**FACTS, **GREEDY)
        recalled = model.generate(**FACTS, **GREEDY, memory=memory, memory_gate=0.7)
        logits = model(**FACTS, memory=memory, memory_gate="on").logits
        return plain, recalled, logits, model.forget(memory, 1).mean

    models = [build(text_type) for _ in range(2)]
    if packed:
        linears = {r"model\.language_model\.layers\..*_proj": {"format": "ternary"}}
        for model in models:
            pack(model, PackedConfig(linears | {r"model\.vision_tower\..*": {"format": "int4"}}))
    expected = use(models[0])
    try:
        if default != "meta":
            torch.set_default_dtype(default)
        with torch.device("meta" if default == "meta" else "cpu"):
            found = use(models[1])
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(expected, found))
