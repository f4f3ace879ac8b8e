"""Generation with the episodic memory: off it is not there at all, on every way to generate agrees, and rows stay apart."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import IMAGE_ID, VOCAB, MicroVLMForConditionalGeneration, tiny_inputs, tiny_model
from microvlm.cache_microvlm import MemoryCache
from microvlm.memory_microvlm import MemoryState
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig, CompileConfig, DynamicCache
from transformers.cache_utils import StaticCache

PAD, NEW, S, T = 1, 8, 6, 11  # S memory tokens, T tokens in a query
GREEDY = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": PAD}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
STATIC = {"cache_implementation": "static", "disable_compile": True}
MEMORY = {
    "num_slots": 16,
    "code_size": 32,
    "num_memory_tokens": S,
    "max_content_tokens": 16,
    "key_hidden_size": 32,
    "scope_hidden_size": 16,
}
FACTS = tiny_inputs(3, 10, seed=1)
PICTURES = FACTS["pixel_values"]
one_text_type = pytest.mark.parametrize("text_type", ["qwen2"])


def build(text_type: str):
    """A model whose words depend on pictures, prompt and memory, and which never stops by itself."""
    model = tiny_model(text_type, use_memory=True, memory_config=MEMORY)
    model.generation_config.eos_token_id = None
    pictures = torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = model.get_image_features(pictures).last_hidden_state
        adapter, key_encoder = model.model.adapter, model.model.memory.key_encoder
        adapter.calibrate(features[:, 1:])
        adapter.query_tokens.mul_(0.2)
        key_encoder.calibrate(key_encoder.pool(features, 1))
        for layer in model.model.language_model.layers:
            layer.self_attn.q_proj.weight.mul_(6)
            layer.self_attn.o_proj.weight.mul_(3)
    return model


@pytest.fixture
def model(text_type):
    return build(text_type)


@pytest.fixture
def memory(model):
    """Three facts, one for each picture."""
    return model.write_memory(**FACTS)


@pytest.fixture
def inputs():
    """The pictures of the facts, with other words."""
    return tiny_inputs(3, T - 5, seed=2) | {"pixel_values": PICTURES}


def padded() -> tuple[dict, list[dict]]:
    """Rows of a picture; none; two pictures; a picture at the end: as one left-padded batch, and each alone."""
    picture, words = [IMAGE_ID] * 5, torch.randint(5, VOCAB, (16,), generator=torch.Generator().manual_seed(3)).tolist()
    rows = [
        words[:1] + picture + words[1:4],
        words[4:11],
        picture + words[11:13] + picture + words[13:15],
        words[15:] + picture,
    ]
    pictures = [PICTURES[:1], None, PICTURES[1:], PICTURES[1:2]]
    longest = max(map(len, rows))
    batch = {
        "input_ids": torch.tensor([[PAD] * (longest - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
        "pixel_values": torch.cat([p for p in pictures if p is not None]),
    }
    alone = [
        {"input_ids": torch.tensor([row])} | ({} if p is None else {"pixel_values": p})
        for row, p in zip(rows, pictures)
    ]
    return batch, alone


def row(inputs: dict, i: int) -> dict:
    return {name: tensor[i : i + 1] for name, tensor in inputs.items()}


def tokens(model, inputs: dict, **kwargs) -> torch.Tensor:
    return model.generate(**inputs, **(GREEDY | kwargs))[:, inputs["input_ids"].shape[1] :]


def tokens_on(model, inputs: dict, memory: MemoryState, **kwargs) -> torch.Tensor:
    """New tokens with the memory on: in every row others than without it, or all that is compared would be vacuous."""
    got = tokens(model, inputs, memory=memory, memory_gate="on", **kwargs)
    assert (got != tokens(model, inputs, **kwargs)).any(1).all()
    return got


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
        torch.testing.assert_close(
            got[name], expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


class TestOff:
    @pytest.mark.parametrize("how", ["off", "zeros", "scope", "empty"])
    def test_nothing_is_there(self, model, inputs, memory, how):
        """Not close to the model without memory: the same bits."""
        tokens_on(model, inputs, memory)
        with torch.no_grad():
            model.model.scope.out.bias.fill_(-1e4)
        batch = padded()[0]
        for given in (inputs, batch):
            rows = len(given["input_ids"])
            gates = {"off": "off", "zeros": torch.zeros(rows), "scope": "auto", "empty": "on"}
            kwargs = {"memory": model.new_memory() if how == "empty" else memory, "memory_gate": gates[how]}
            for use_cache in (True, False):
                expected = model(**given, use_cache=use_cache).logits
                out = model(**given, use_cache=use_cache, **kwargs)
                assert out.logits.equal(expected)
                assert (out.past_key_values is not None) is use_cache
                assert not use_cache or out.past_key_values.num_memory_tokens == 0
                on = model(**given, use_cache=use_cache, memory=memory, memory_gate="on").logits
                assert not torch.allclose(on, expected, atol=1e-2)
            flags = {"output_logits": True, "return_dict_in_generate": True}
            for options in ({}, STATIC, {"num_beams": 2}):
                expected = model.generate(**given, **GREEDY, **flags, **options)
                out = model.generate(**given, **GREEDY, **flags, **options, **kwargs)
                assert out.sequences.equal(expected.sequences)
                assert all(a.equal(b) for a, b in zip(out.logits, expected.logits, strict=True))
                assert out.past_key_values.num_memory_tokens == 0 and out.past_key_values.log_gate is None

    def test_scope_decides(self, model, inputs, memory):
        expected = tokens_on(model, inputs, memory)
        with torch.no_grad():
            model.model.scope.out.bias.fill_(1e4)
        assert tokens(model, inputs, memory=memory).equal(expected)
        out = model(**inputs, memory=memory)
        assert out.scope_logits.shape == (3,) and out.scope_probability.equal(out.scope_logits.sigmoid())
        # a threshold between the rows' probabilities
        with torch.no_grad():
            model.model.scope.out.bias.zero_()
            logits = model(**inputs, memory=memory).scope_logits
            assert len(set(logits.tolist())) == 3
            model.model.scope.out.bias.copy_(-logits.median())
            gate = model(**inputs, memory=memory).scope_probability >= 0.5
        assert gate.sum() == 2
        assert tokens(model, inputs, memory=memory).equal(tokens(model, inputs, memory=memory, memory_gate=gate))


class TestAgreement:
    def test_cached_logits_equal_uncached(self, model, inputs, memory):
        kwargs = {"memory": memory, "memory_gate": "on"}
        ids = torch.cat([inputs["input_ids"], tokens_on(model, inputs, memory)], 1)
        full = model(**(inputs | {"input_ids": ids, "attention_mask": None}), use_cache=False, **kwargs).logits
        out = model(**inputs, **kwargs)
        cache, logits = out.past_key_values, [out.logits]
        for t in range(T, ids.shape[1]):
            logits.append(model(input_ids=ids[:, t : t + 1], past_key_values=cache).logits)
        torch.testing.assert_close(torch.cat(logits, 1), full, **CLOSE)
        assert isinstance(cache, MemoryCache) and cache.get_seq_length() == T + NEW

    @pytest.mark.parametrize(
        "options",
        [{"use_cache": False}, STATIC, {"num_beams": 1}, {"prefill_chunk_size": 4}, {"logits_to_keep": 0}],
        ids=lambda options: next(iter(options)),
    )
    def test_every_way_says_the_same(self, model, inputs, memory, options):
        expected = tokens_on(model, inputs, memory)
        assert tokens(model, inputs, memory=memory, memory_gate="on", **options).equal(expected)
        batch = padded()[0]
        expected = tokens_on(model, batch, memory)
        assert tokens(model, batch, memory=memory, memory_gate="on", **options).equal(expected)

    @pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
    def test_left_padded_rows_equal_single_rows(self, model, memory, options):
        batch, alone = padded()
        together = tokens(model, batch, memory=memory, memory_gate="on", **options)
        expected = [tokens(model, one, memory=memory, memory_gate="on", **options) for one in alone]
        assert together.equal(torch.cat(expected))
        assert (together != tokens(model, batch, **options)).any(1).all()

    def test_left_padding_changes_no_logits(self, model, memory):
        batch, alone = padded()
        position_ids = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        together = model(**batch, position_ids=position_ids, memory=memory, memory_gate="on").logits[:, -1]
        expected = [model(**one, memory=memory, memory_gate="on").logits[:, -1] for one in alone]
        torch.testing.assert_close(together, torch.cat(expected), **CLOSE)

    @pytest.mark.parametrize("make", [DynamicCache, MemoryCache, StaticCache])
    @pytest.mark.parametrize("with_config", [True, False])
    def test_handed_in_cache(self, model, inputs, memory, make, with_config):
        if make is StaticCache and not with_config:
            pytest.skip("a static cache needs one")
        config = {"config": model.config.text_config} if with_config else {}
        text = StaticCache(max_cache_len=64, **config) if make is StaticCache else DynamicCache(**config)
        cache = MemoryCache(text) if make is MemoryCache else text
        expected = tokens_on(model, inputs, memory)
        out = model.generate(
            **inputs,
            **GREEDY,
            memory=memory,
            memory_gate="on",
            past_key_values=cache,
            return_dict_in_generate=True,
            disable_compile=True,
        )
        assert out.sequences[:, T:].equal(expected)
        assert isinstance(out.past_key_values, MemoryCache) and (out.past_key_values is cache) is (make is MemoryCache)
        assert text.get_seq_length() == out.past_key_values.get_seq_length() == T + NEW - 1

    def test_pixels_alone_and_ids_by_position(self, model, memory):
        ids = model.default_prompt(3)
        expected = tokens_on(model, {"input_ids": ids, "pixel_values": PICTURES}, memory)
        kwargs = {"pixel_values": PICTURES, "memory": memory, "memory_gate": "on"} | GREEDY
        assert model.generate(**kwargs)[:, ids.shape[1] :].equal(expected)
        assert model.generate(ids, **kwargs)[:, ids.shape[1] :].equal(expected)

    @one_text_type
    def test_features_instead_of_pixels(self, model, inputs, memory):
        expected = tokens_on(model, inputs, memory)
        logits = model(**inputs, memory=memory, memory_gate="on").logits
        inputs["mm_encoder_outputs"] = {"image": model.get_image_features(inputs.pop("pixel_values"), return_dict=True)}
        assert tokens(model, inputs, memory=memory, memory_gate="on").equal(expected)
        assert model(**inputs, memory=memory, memory_gate="on").logits.equal(logits)

    @one_text_type
    def test_pictures_are_encoded_and_the_memory_read_once(self, model, inputs, memory, monkeypatch):
        calls, read = [], model.model.read_memory
        model.model.vision_tower.register_forward_hook(lambda *_: calls.append("picture"))
        monkeypatch.setattr(model.model, "read_memory", lambda *args: calls.append("memory") or read(*args))
        for options in ({}, {"num_beams": 3}, {"use_cache": False}):
            calls.clear()
            tokens(model, inputs, memory=memory, memory_gate="on", **options)
            assert sorted(calls) == ["memory", "picture"]

    def test_prompt_lookup_equals_greedy(self, model, inputs, memory):
        one = row(inputs, 0)
        one["input_ids"][:, -2:] = one["input_ids"][:, -4:-2]  # something to look up
        kwargs = {"max_new_tokens": 16}
        expected = tokens_on(model, one, memory, **kwargs)
        got = tokens(model, one, memory=memory, memory_gate="on", prompt_lookup_num_tokens=2, **kwargs)
        assert got.equal(expected)

    @pytest.mark.parametrize("same", [True, False])
    def test_assistant_model_equals_greedy(self, model, inputs, memory, same):
        one, assistant = row(inputs, 0), model if same else build("llama")
        expected = tokens_on(model, one, memory)
        assert tokens(model, one, memory=memory, memory_gate="on", assistant_model=assistant).equal(expected)


class TestContinuation:
    @pytest.mark.parametrize("new_only", [True, False])
    @pytest.mark.parametrize("options", [{}, STATIC])
    def test_continued_equals_one_go(self, model, inputs, memory, new_only, options):
        expected = tokens_on(model, inputs, memory)
        kwargs = {"memory": memory, "memory_gate": "on", "return_dict_in_generate": True}
        if options:
            kwargs |= {"past_key_values": StaticCache(config=model.config.text_config, max_cache_len=64)}
        kwargs["disable_compile"] = True
        first = model.generate(**inputs, **(GREEDY | {"max_new_tokens": 4}), **kwargs)
        cache = first.past_key_values
        assert isinstance(cache, MemoryCache) and cache.num_memory_tokens == S
        assert cache.get_seq_length() == T + 3
        twin, forgetful = copy.deepcopy(cache), copy.deepcopy(cache)
        forgetful.detach()
        ids = first.sequences[:, -1:] if new_only else first.sequences
        rest = {"input_ids": ids, "attention_mask": torch.ones(3, T + 4).long(), "disable_compile": True}
        go_on = lambda cache: tokens(model, rest, past_key_values=cache, max_new_tokens=4)  # noqa: E731
        assert go_on(cache).equal(expected[:, 4:])
        assert go_on(twin).equal(expected[:, 4:])
        assert not go_on(forgetful).equal(expected[:, 4:])

    def test_another_memory_in_the_same_cache(self, model, inputs, memory):
        """forward() takes what was attached off, or puts another read-out in its place; the text stays."""
        word = torch.full((3, 1), 7)
        prefill = lambda: model(**inputs, memory=memory, memory_gate="on").past_key_values  # noqa: E731
        step = lambda cache, **kwargs: model(input_ids=word, past_key_values=cache, **kwargs).logits  # noqa: E731
        keys = model.model.get_memory_keys(
            inputs["input_ids"], None, model.get_image_features(PICTURES).last_hidden_state
        )
        read = lambda memory, gate: model.model.read_memory(memory, keys, gate)  # noqa: E731
        expected = step(prefill())
        assert step(prefill(), memory_readout=read(memory, "on")).equal(expected)
        other = step(prefill(), memory_readout=read(memory.forget(1), "on"))
        assert not torch.allclose(other, expected, atol=1e-2)
        cache = prefill()
        off = step(cache, memory_readout=read(memory, "off"))
        assert cache.num_memory_tokens == 0 and cache.get_seq_length() == T + 1
        assert not torch.allclose(off, expected, atol=1e-2)
        cache = prefill()
        cache.detach()
        assert step(cache).equal(off)


class TestSampling:
    def test_seeded(self, model, inputs, memory):
        kwargs = {"memory": memory, "memory_gate": "on", "do_sample": True, "top_k": 0, "num_return_sequences": 4}
        runs = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            runs.append(tokens(model, inputs, **kwargs))
        assert runs[0].shape == (12, NEW)
        assert runs[0].equal(runs[1]) and not runs[0].equal(runs[2])

    def test_every_sample_has_its_rows_memory(self, model, inputs, memory):
        """Rows draw in parallel: one that is off draws what it draws without memory, one that is on what it draws in the all-on run."""
        kwargs = {"do_sample": True, "top_k": 0, "num_return_sequences": 3}
        runs = []
        for memory_kwargs in ({}, {"memory_gate": "on"}, {"memory_gate": (gate := torch.tensor([False, True, False]))}):
            torch.manual_seed(0)
            runs.append(
                tokens(model, inputs, **kwargs, **({"memory": memory} | memory_kwargs if memory_kwargs else {}))
            )
        off, on, mixed = runs
        each = gate.repeat_interleave(3)
        assert mixed[each].equal(on[each]) and mixed[~each].equal(off[~each])
        assert (on != off).any(1).all()


class TestRows:
    @pytest.mark.parametrize(
        "options", [{}, {"num_beams": 3, "num_return_sequences": 2}, STATIC, {"use_cache": False}], ids=str
    )
    def test_mixed_gates(self, model, inputs, memory, options):
        gate = torch.tensor([True, False, True])
        each = gate.repeat_interleave(options.get("num_return_sequences", 1))
        on, off = tokens_on(model, inputs, memory, **options), tokens(model, inputs, **options)
        for given in (gate, gate.float()):
            mixed = tokens(model, inputs, memory=memory, memory_gate=given, **options)
            assert mixed[each].equal(on[each]) and mixed[~each].equal(off[~each])

    def test_mixed_gates_logits(self, model, inputs, memory):
        gate = torch.tensor([True, False, True])
        mixed = model(**inputs, memory=memory, memory_gate=gate).logits
        on, off = model(**inputs, memory=memory, memory_gate="on").logits, model(**inputs).logits
        assert mixed[gate].equal(on[gate])
        torch.testing.assert_close(mixed[~gate], off[~gate], **CLOSE)
        assert not torch.allclose(on[~gate], off[~gate], atol=1e-2)

    @pytest.mark.parametrize("soft", [False, True])
    def test_an_off_row_does_not_see_what_the_memory_holds(self, model, inputs, memory, soft):
        """Not one bit of it: zero times NaN would be NaN."""
        gate = torch.tensor([0.7 if soft else 1.0, 0.0, 1.0])
        state = memory.select([0, 0, 0])
        expected = model(**inputs, memory=state, memory_gate=gate).logits
        words = tokens(model, inputs, memory=state, memory_gate=gate)
        for hole in (torch.nan, torch.inf, 1e30):
            mean, covariance = state.mean.clone(), state.covariance.clone()
            mean[1], covariance[1] = hole, hole
            other = replace(state, mean=mean, covariance=covariance)
            assert model(**inputs, memory=other, memory_gate=gate).logits.equal(expected)
            assert tokens(model, inputs, memory=other, memory_gate=gate).equal(words)
        moved = replace(state, mean=state.mean.flip(2))
        got = model(**inputs, memory=moved, memory_gate=gate).logits
        assert got[1].equal(expected[1]) and not torch.allclose(got[2], expected[2], atol=1e-2)

    def test_one_memory_for_all_equals_a_copy_for_each(self, model, inputs, memory):
        copies = memory.select([0, 0, 0])
        assert tokens_on(model, inputs, copies).equal(tokens_on(model, inputs, memory))
        logits = [model(**inputs, memory=state, memory_gate="on").logits for state in (copies, memory)]
        torch.testing.assert_close(*logits, **CLOSE)

    def test_every_row_reads_its_own_memory(self, model, inputs):
        own = [model.write_memory(**row(FACTS, i)) for i in range(3)]
        together = tokens_on(model, inputs, MemoryState.stack(own))
        for i in range(3):
            assert together[i : i + 1].equal(tokens(model, row(inputs, i), memory=own[i], memory_gate="on"))
        swapped = tokens(model, inputs, memory=MemoryState.stack(own[1:] + own[:1]), memory_gate="on")
        assert (swapped != together).any(1).all()

    @one_text_type
    def test_an_empty_row_among_others(self, model, inputs, memory):
        state = MemoryState.stack([memory, model.new_memory(), memory])
        got, on, off = (
            tokens(model, inputs, memory=state, memory_gate="on"),
            tokens_on(model, inputs, memory),
            tokens(model, inputs),
        )
        assert got[[0, 2]].equal(on[[0, 2]]) and got[1].equal(off[1])

    @one_text_type
    def test_pictures_ask_by_picture_and_texts_by_words(self, model, inputs, memory):
        part = model.model.memory

        def read(**given):
            return model(**given, memory=memory, memory_gate="on").memory_content

        expected = part.read(memory, part.image_keys(model.get_image_features(PICTURES).last_hidden_state, 1)[None])
        torch.testing.assert_close(read(**inputs).flatten(1), expected[0].content[0], **CLOSE)
        assert read(**inputs | {"input_ids": tiny_inputs(3, T - 5, seed=9)["input_ids"]}).equal(read(**inputs))
        ids = torch.tensor([[9, 10, 11, 12], [20, 21, 22, 23]])
        words = model.get_input_embeddings()(ids)
        expected = part.read(memory, part.text_keys(words, torch.ones(2, 4).bool())[None])
        torch.testing.assert_close(read(input_ids=ids).flatten(1), expected[0].content[0], **CLOSE)
        assert not torch.allclose(*read(input_ids=ids), atol=1e-2)
        tokens_on(model, {"input_ids": ids}, memory)


class TestErrors:
    @pytest.mark.parametrize(
        "change, message",
        [
            (
                {"memory_gate": torch.ones(2)},
                "memory_gate has the shape (2,), expected (3,).",
            ),
            ({"memory_gate": torch.ones(3, 1)}, "memory_gate has the shape (3, 1), expected (3,)."),
            ({"memory_gate": torch.tensor([0.0, 1.1, 0.0])}, "memory_gate must lie between 0 and 1."),
            ({"memory_gate": torch.tensor([0.0, -0.1, 0.0])}, "memory_gate must lie between 0 and 1."),
            ({"memory_gate": torch.tensor([0.0, torch.nan, 0.0])}, "memory_gate must lie between 0 and 1."),
            ({"memory_gate": "maybe"}, "memory_gate must be 'auto', 'on', 'off' or a tensor, got 'maybe'."),
            ({"rows": 2}, "the memory has 2 rows, the batch 3: they must agree, or be one."),
            ({"input_ids": torch.full((3, 9), 7)}, "The text has placeholders for 0 pictures, 3 were given."),
            ({"pixel_values": None}, "The text has placeholders for 3 pictures, 0 were given."),
            (
                {"input_ids": None, "inputs_embeds": torch.ones(3, 9, 32), "pixel_values": None},
                "reading a memory needs input_ids: inputs_embeds alone do not say which row owns a picture.",
            ),
        ],
        ids=range(10),
    )
    @one_text_type
    def test_exact_messages(self, model, inputs, memory, change, message):
        memory = memory.select([0] * change.pop("rows", 1))
        for call in (model, lambda **kwargs: model.generate(**kwargs, **GREEDY)):
            with pytest.raises(ValueError) as error:
                call(**inputs | {"memory": memory} | change)
            assert str(error.value) == message

    @one_text_type
    def test_memory_of_another_model(self, model, inputs, memory):
        with torch.no_grad():
            model.model.memory.reference[0, 0] += 1
        with pytest.raises(ValueError) as error:
            model.generate(**inputs, memory=memory)
        assert str(error.value) == (
            f"the memory was written by another model: its fingerprint is {memory.fingerprint}, "
            f"this model's {model.memory_fingerprint()}."
        )

    @one_text_type
    def test_model_without_memory(self, inputs, memory):
        for call in (plain := tiny_model(), plain.generate):
            with pytest.raises(ValueError) as error:
                call(**inputs, memory=memory)
            message = "this model has no episodic memory: build it with config.use_memory=True."
            assert str(error.value) == message

    @one_text_type
    def test_pixels_and_features_together(self, model, inputs, memory):
        """As without memory: neither is silently ignored."""
        image = model.get_image_features(PICTURES, return_dict=True)
        for kwargs in ({}, {"memory": memory}):
            with pytest.raises(ValueError) as error:
                model(**inputs, mm_encoder_outputs={"image": image}, **kwargs)
            assert str(error.value) == "You cannot specify both pixel_values and mm_encoder_outputs at the same time"


class TestGate:
    @pytest.mark.parametrize("gate", ["on", [0.3, 0.3, 0.3], [1.0, 0.0, 0.5]], ids=str)
    def test_eager_equals_sdpa(self, model, inputs, memory, gate):
        inputs["attention_mask"][0, :2] = 0
        gate = torch.tensor(gate) if isinstance(gate, list) else gate
        kwargs = {"memory": memory, "memory_gate": gate}
        expected, words = model(**inputs, **kwargs).logits, tokens(model, inputs, **kwargs)
        assert not torch.allclose(expected, model(**inputs).logits, atol=1e-2)
        model.set_attn_implementation("eager")
        torch.testing.assert_close(model(**inputs, **kwargs).logits[:, 2:], expected[:, 2:], **CLOSE)
        assert tokens(model, inputs, **kwargs).equal(words)

    def test_one_is_on_and_zero_is_off(self, model, inputs, memory):
        on, off = tokens_on(model, inputs, memory), tokens(model, inputs)
        for one, zero in ((torch.ones(3), torch.zeros(3)), (torch.ones(3).bool(), torch.zeros(3).bool())):
            assert tokens(model, inputs, memory=memory, memory_gate=one).equal(on)
            assert tokens(model, inputs, memory=memory, memory_gate=zero).equal(off)
        logits = [model(**inputs, memory=memory, memory_gate=torch.full((3,), g)).logits for g in (0.0, 0.3, 0.6, 1.0)]
        for a, b in zip(logits, logits[1:]):
            assert (a - b).abs().amax((1, 2)).min() > 1e-3

    def test_soft_gate_is_a_weight(self, model, inputs, memory):
        """The odds of memory against text, in the first layer, are the gate times those of a memory that is on."""
        model.set_attn_implementation("eager")

        def log_odds(gate):
            weights = model(**inputs, memory=memory, memory_gate=gate, output_attentions=True).attentions[0].double()
            assert weights.shape == (3, 4, T, T + S)
            return weights[..., -S:].sum(-1).log() - weights[..., :-S].sum(-1).log()

        gate = torch.tensor([0.3, 0.6, 1.0])
        on = log_odds("on")
        sure = on.abs() < 10  # beyond, float32 has no digits left
        assert sure.float().mean() > 0.2
        expected = on + gate.double().log().view(3, 1, 1)
        torch.testing.assert_close(log_odds(gate)[sure], expected[sure], rtol=1e-3, atol=1e-3)

    @one_text_type
    def test_pooling_attentions_are_returned(self, model, inputs, memory):
        model.set_attn_implementation("eager")
        expected = model(**inputs, output_attentions=True).pooling_attentions
        out = model(**inputs, output_attentions=True, memory=memory, memory_gate="on")
        assert out.pooling_attentions is not None and out.pooling_attentions.equal(expected)


class TestTraining:
    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("gate", ["auto", "on", "mixed"])
    def test_gradient_checkpointing_changes_nothing(self, model, inputs, memory, reentrant, gate):
        model.train()
        kwargs = {"memory": memory, "memory_gate": torch.tensor([1.0, 0.0, 0.5]) if gate == "mixed" else gate}
        expected, without = gradients(model, inputs, **kwargs), gradients(model, inputs)
        assert (expected["loss"] - without["loss"]).abs() > 1e-2
        for name in ("memory_projection.up.weight", "memory.reference", "memory.key_encoder.image_fc1.weight"):
            assert expected[f"model.{name}"].any() and f"model.{name}" not in without, name
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        calls = []
        model.model.language_model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        got = gradients(model, inputs, **kwargs)
        assert len(calls) == 2  # forward, and once more in the backward pass
        assert_close(got, expected)

    def test_soft_gate_teaches_scope(self, model, inputs, memory):
        model.train()
        scope = [f"model.scope.{name}" for name, _ in model.model.scope.named_parameters()]
        got = gradients(model, inputs, memory=memory)
        assert [name for name in scope if not got[name].any()] == []
        assert not gradients(model, inputs, memory=memory, memory_gate="on").keys() & set(scope)

    @one_text_type
    def test_checkpointing_needs_a_pass_without_cache(self, model, inputs, memory):
        model.train().gradient_checkpointing_enable()
        with pytest.raises(ValueError) as error:
            model(**inputs, memory=memory, past_key_values=DynamicCache(config=model.config.text_config))
        assert str(error.value) == "gradient checkpointing with a memory needs a pass without past_key_values."

    @pytest.mark.parametrize("own_cache", [False, True])
    @one_text_type
    def test_checkpointing_without_memory_afterwards(self, model, inputs, memory, own_cache):
        """A step with memory leaves nothing behind that would make a later step without it append its text twice."""
        model.train()
        expected = gradients(model, inputs)
        model.gradient_checkpointing_enable()
        gradients(model, inputs, memory=memory)
        cache = {"past_key_values": DynamicCache(config=model.config.text_config)} if own_cache else {}
        assert_close(gradients(model, inputs, **cache), expected)


class TestMemoryCache:
    GATE = torch.tensor([1.0, 0.5, 0.0])

    @pytest.fixture
    def text_type(self):
        return "qwen2"

    @pytest.fixture
    def new_cache(self, model, inputs, memory):
        return lambda: model(**inputs, memory=memory, memory_gate=self.GATE).past_key_values

    def test_lengths_are_those_of_the_text(self, new_cache):
        cache = new_cache()
        assert cache.get_seq_length() == cache.get_query_offset() == T and cache.num_memory_tokens == S
        assert cache.get_mask_sizes(4, 0) == (T + 4, 0) and cache.get_max_length() == -1
        assert not cache.hard and torch.allclose(cache.log_gate, self.GATE.log())
        assert all(k[2].eq(0).all() and v[2].eq(0).all() and k[:2].ne(0).any() for k, v in cache.memory)
        new = torch.randn(3, 2, 1, 8)
        keys, values = cache.update(new, 2 * new, 0)
        assert keys.shape == values.shape == (3, 2, T + 1 + S, 8)
        assert keys[..., -S:, :].equal(cache.memory[0][0]) and values[..., -S:, :].equal(cache.memory[0][1])
        assert keys[..., T, :].equal(new[..., 0, :]) and values[..., T, :].equal(2 * new[..., 0, :])
        assert cache.layers[0].keys.shape[-2] == T + 1 and cache.text.layers is cache.layers

    @pytest.mark.parametrize(
        "verb, argument, rows",
        [
            ("reorder_cache", torch.tensor([2, 0, 0]), [2, 0, 0]),
            ("batch_select_indices", torch.tensor([1]), [1]),
            ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
        ],
        ids=["reorder", "select", "repeat"],
    )
    def test_rows_go_together(self, model, new_cache, verb, argument, rows):
        cache, before = new_cache(), new_cache()
        getattr(cache, verb)(argument)
        assert cache.log_gate.equal(before.log_gate[rows])
        for layer in range(2):
            assert cache.layers[layer].keys.equal(before.layers[layer].keys[rows])
            for got, old in zip(cache.memory[layer], before.memory[layer]):
                assert got.equal(old[rows])
        word = torch.tensor([[7], [8], [9]])
        expected = model(input_ids=word, past_key_values=before).logits[rows]
        torch.testing.assert_close(model(input_ids=word[rows], past_key_values=cache).logits, expected, **CLOSE)

    def test_crop_takes_text_only(self, model, inputs, memory, new_cache):
        cache = new_cache()
        kept = list(cache.memory)
        cache.crop(-4)
        assert cache.get_seq_length() == T - 4 and cache.num_memory_tokens == S
        assert all(a is b for new, old in zip(cache.memory, kept) for a, b in zip(new, old))
        expected = model(**inputs, memory=memory, memory_gate=self.GATE).logits[:, -4:]
        got = model(input_ids=inputs["input_ids"][:, -4:], past_key_values=cache).logits
        torch.testing.assert_close(got, expected, **CLOSE)

    def test_reset(self, model, inputs, new_cache):
        cache = new_cache()
        cache.reset()
        assert cache.get_seq_length() == 0 and cache.num_memory_tokens == 0
        assert cache.memory == [] and cache.log_gate is None and cache.hard
        assert model(**inputs, past_key_values=cache).logits.equal(model(**inputs).logits)

    def test_offload(self, model, new_cache):
        cache, before = new_cache(), new_cache()
        for layer in range(2):
            cache.offload(layer)
        assert {t.device.type for pair in cache.memory for t in pair} == {"cpu"}
        word = torch.full((3, 1), 7)
        expected = model(input_ids=word, past_key_values=before).logits
        assert model(input_ids=word, past_key_values=cache).logits.equal(expected)
        cache.detach()
        cache.offload(0)

    def test_rows_that_do_not_match(self, model, inputs, memory):
        keys = model.model.get_memory_keys(
            inputs["input_ids"], None, model.get_image_features(PICTURES).last_hidden_state
        )
        readout = model.model.read_memory(memory, keys, "on")
        two, message = (
            torch.zeros(2, 2, 1, 8),
            (
                "the memory was read for 3 rows, the text has 2: "
                "batch_repeat_interleave or batch_select_indices the cache along with the text."
            ),
        )
        with pytest.raises(ValueError) as error:
            MemoryCache(DynamicCache(config=model.config.text_config), readout).update(two, two, 0)
        assert str(error.value) == message
        with pytest.raises(ValueError) as error:
            model(input_ids=torch.full((2, 4), 7), memory_readout=readout)
        assert str(error.value) == message


class TestOutside:
    def test_saved_model_and_saved_memory(self, model, inputs, memory, tmp_path):
        expected = tokens_on(model, inputs, memory)
        model.save_pretrained(tmp_path)
        memory.save(tmp_path / "memory.safetensors")
        loaded = type(model).from_pretrained(tmp_path).eval()
        assert tokens(
            loaded, inputs, memory=loaded.load_memory(tmp_path / "memory.safetensors"), memory_gate="on"
        ).equal(expected)
        assert loaded.memory_fingerprint() == model.memory_fingerprint()

    def test_lora(self, model, inputs, memory):
        expected, off = tokens_on(model, inputs, memory), tokens(model, inputs)
        config = LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj)", task_type="CAUSAL_LM")
        peft = get_peft_model(model, config).eval()
        assert tokens(peft, inputs, memory=memory, memory_gate="on").equal(expected)
        assert tokens(peft, inputs, memory=memory, memory_gate="off").equal(off)
        with torch.no_grad():
            for name, p in peft.named_parameters():
                if "lora_B" in name:
                    p.normal_()
        trained = tokens(peft, inputs, memory=memory, memory_gate="on")
        assert not trained.equal(expected) and not trained.equal(tokens(peft, inputs))
        assert model.memory_fingerprint() == memory.fingerprint  # the decoder's adapters leave the memory readable

    @one_text_type
    def test_nf4_text_model(self, model, inputs, memory, tmp_path):
        model.save_pretrained(tmp_path)
        kept = ["vision_tower", "adapter", "alignment", "memory", "memory_projection", "scope", "lm_head"]
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=kept)
        small = MicroVLMForConditionalGeneration.from_pretrained(tmp_path, quantization_config=config).eval()
        assert type(small.model.language_model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
        assert small.model.memory_projection.up.weight.dtype == torch.float32
        tokens_on(small, inputs, memory)
        expected = small(**inputs).logits
        assert small(**inputs, memory=memory, memory_gate="off").logits.equal(expected)
        assert not torch.allclose(small(**inputs, memory=memory, memory_gate="on").logits, expected, atol=1e-2)
        assert tokens(small, inputs, memory=memory, memory_gate="off").equal(tokens(small, inputs))


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["on", [1.0, 0.0, 0.5]], ids=str)
def test_compiled_static_cache_equals_eager(model, inputs, memory, gate):
    gate = torch.tensor(gate) if isinstance(gate, list) else gate
    compile_config = CompileConfig(fullgraph=True)
    compile_config._compile_all_devices = True  # generate() compiles on accelerators only, unless told
    torch.compiler.reset()
    tokens_on(model, inputs, memory)
    kwargs = {"memory": memory, "memory_gate": gate}
    for seed in (2, 3):  # the second run reuses the compiled graph
        inputs["input_ids"] = tiny_inputs(3, T - 5, seed=seed)["input_ids"]
        expected = tokens(model, inputs, **kwargs)
        got = tokens(model, inputs, cache_implementation="static", compile_config=compile_config, **kwargs)
        assert got.equal(expected)
        assert hasattr(model, "_compiled_call")
