"""Every way to generate agrees with every other: cache, batch, padding, beams, streaming, assistance, continuation."""

from types import SimpleNamespace

import pytest
import torch
from conftest import IMAGE_ID, ROOT, VOCAB, outspoken_model, tiny_inputs, tiny_model
from microvlm.cache_microvlm import CACHE_NAME, MemoryCache
from transformers import (
    AutoProcessor,
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    SuppressTokensLogitsProcessor,
    TextStreamer,
)
from transformers.cache_utils import StaticCache
from transformers.utils import generic

PAD, NEW = 1, 6
GREEDY = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": PAD}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
either_name = pytest.mark.parametrize("name", ["past_key_values", "cache"])  # whatever the installed version calls it


@pytest.fixture
def model(text_type):
    return outspoken_model(text_type)


def text_row(length: int, seed: int) -> list[int]:
    return torch.randint(5, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def mixed_rows() -> tuple[list[list[int]], list[torch.Tensor]]:
    """Four rows: a picture; none; two pictures; a picture at the end. Ids, and the pictures of each row."""
    picture = [IMAGE_ID] * 5
    a, b, c, d, e = (text_row(n, seed) for seed, n in enumerate((4, 7, 2, 3, 1)))
    rows = [a[:1] + picture + a[1:], b, picture + c + picture + d, e + picture]
    g = torch.Generator().manual_seed(7)
    return rows, [torch.randn(n, 3, 32, 32, generator=g) for n in (1, 0, 2, 1)]


def left_pad(rows: list[list[int]], pictures: list[torch.Tensor]) -> dict:
    T = max(map(len, rows))
    batch = {
        "input_ids": torch.tensor([[PAD] * (T - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in rows]),
    }
    return batch | ({"pixel_values": torch.cat(pictures)} if sum(map(len, pictures)) else {})


def new_tokens(model, inputs: dict, **kwargs) -> list[list[int]]:
    return model.generate(**inputs, **(GREEDY | kwargs))[:, inputs["input_ids"].shape[1] :].tolist()


class TestAgreement:
    def test_pictures_and_prompts_matter(self, model):
        """Otherwise every comparison below would hold for a model that ignores its input."""
        inputs, others = tiny_inputs(1), [tiny_inputs(1, seed=seed) for seed in range(8)]
        for name in ("pixel_values", "input_ids"):
            said = {tuple(new_tokens(model, inputs | {name: other[name]})[0]) for other in others}
            assert len(said) > 3, name
        assert max(len(set(tokens)) for tokens in said) > 3

    @either_name
    def test_cached_logits_equal_uncached(self, model, name):
        inputs = tiny_inputs()
        ids = model.generate(**inputs, **GREEDY)
        full = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits
        cache, start = DynamicCache(config=model.config), inputs["input_ids"].shape[1]
        logits = [model(**inputs, **{name: cache}).logits]
        for t in range(start, ids.shape[1]):
            logits.append(model(input_ids=ids[:, t : t + 1], **{name: cache}).logits)
        torch.testing.assert_close(torch.cat(logits, 1), full, **CLOSE)
        assert cache.get_seq_length() == ids.shape[1]

    def test_without_cache(self, model):
        inputs = tiny_inputs()
        assert new_tokens(model, inputs, use_cache=False) == new_tokens(model, inputs)

    @either_name
    def test_handed_in_dynamic_cache(self, model, name):
        inputs = tiny_inputs()
        cache = DynamicCache(config=model.config)
        assert new_tokens(model, inputs, **{name: cache}) == new_tokens(model, inputs)
        assert cache.get_seq_length() == inputs["input_ids"].shape[1] + NEW - 1

    def test_static_cache(self, model):
        inputs = tiny_inputs()
        out = model.generate(
            **inputs, **GREEDY, cache_implementation="static", disable_compile=True, return_dict_in_generate=True
        )
        assert isinstance(out.past_key_values, StaticCache)
        assert out.sequences.equal(model.generate(**inputs, **GREEDY))

    @pytest.mark.skipif(not torch.accelerator.is_available(), reason="the offloaded cache needs an accelerator")
    def test_offloaded_cache(self, model):
        inputs = tiny_inputs()
        assert new_tokens(model, inputs, cache_implementation="offloaded") == new_tokens(model, inputs)

    @pytest.mark.parametrize("chunk", [1, 4, 7, 64])
    def test_chunked_prefill(self, model, chunk):
        batch = left_pad(*mixed_rows())
        assert new_tokens(model, batch, prefill_chunk_size=chunk) == new_tokens(model, batch)

    def test_all_logits_kept(self, model):
        inputs = tiny_inputs()
        assert new_tokens(model, inputs, logits_to_keep=0) == new_tokens(model, inputs)
        full = model(**inputs).logits
        for keep in (1, 3):
            torch.testing.assert_close(model(**inputs, logits_to_keep=keep).logits, full[:, -keep:], **CLOSE)
        positions = torch.tensor([0, 4])
        torch.testing.assert_close(model(**inputs, logits_to_keep=positions).logits, full[:, positions], **CLOSE)

    def test_left_padding_changes_nothing(self, model):
        inputs = tiny_inputs(1)
        row = inputs["input_ids"][0].tolist()
        padded = left_pad([row, [5] * (len(row) + 9)], [inputs["pixel_values"], torch.empty(0, 3, 32, 32)])
        assert new_tokens(model, padded)[:1] == new_tokens(model, inputs)
        mask = padded["attention_mask"]
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(**padded, position_ids=position_ids).logits[:1, -1]
        torch.testing.assert_close(logits, model(**inputs).logits[:, -1], **CLOSE)

    @pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
    def test_mixed_rows_equal_single_rows(self, model, kwargs):
        rows, pictures = mixed_rows()
        together = new_tokens(model, left_pad(rows, pictures), **kwargs)
        alone = [new_tokens(model, left_pad([row], [own]), **kwargs) for row, own in zip(rows, pictures)]
        assert together == [tokens for row in alone for tokens in row]

    def test_beam_one_is_greedy(self, model):
        inputs = tiny_inputs()
        beams = model.generate(**inputs, **GREEDY, num_beams=1, output_scores=True, return_dict_in_generate=True)
        assert beams.sequences.equal(model.generate(**inputs, **GREEDY))

    def test_beams_find_no_worse_sequences_than_greedy(self, model):
        inputs = tiny_inputs(1)
        length = inputs["input_ids"].shape[1]

        def log_probability(ids):
            logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[:, length - 1 : -1].double()
            return logits.log_softmax(-1).gather(-1, ids[:, length:, None]).sum().item()

        out = model.generate(**inputs, **GREEDY, num_beams=8, output_scores=True, return_dict_in_generate=True)
        best = log_probability(out.sequences)
        assert best >= log_probability(model.generate(**inputs, **GREEDY)) - 1e-4
        assert out.sequences_scores.item() * NEW == pytest.approx(best, abs=1e-3)

    def test_prompt_lookup_equals_greedy(self, model):
        inputs = tiny_inputs(1)
        inputs["input_ids"][:, -3:] = inputs["input_ids"][:, -6:-3]  # something to look up
        kwargs = {"max_new_tokens": 16}
        assert new_tokens(model, inputs, prompt_lookup_num_tokens=3, **kwargs) == new_tokens(model, inputs, **kwargs)

    @pytest.mark.parametrize("same", [True, False])
    def test_assistant_model_equals_greedy(self, model, text_type, same):
        inputs, assistant = tiny_inputs(1), model if same else outspoken_model("llama")
        kwargs = {"max_new_tokens": 12}
        expected = new_tokens(model, inputs, **kwargs)
        assert new_tokens(model, inputs, assistant_model=assistant, **kwargs) == expected


class TestContinuation:
    @pytest.mark.parametrize("pictures_again", [True, False])
    @pytest.mark.parametrize("new_only", [True, False])
    def test_continued_equals_one_go(self, model, pictures_again, new_only):
        batch = left_pad(*mixed_rows())
        expected = model.generate(**batch, **GREEDY)
        first = model.generate(**batch, **(GREEDY | {"max_new_tokens": 2}), return_dict_in_generate=True)
        mask = torch.nn.functional.pad(batch["attention_mask"], (0, 2), value=1)
        ids = first.sequences[:, -1:] if new_only else first.sequences
        if new_only and pictures_again:
            pytest.skip("new tokens without placeholders take no pictures")
        again = {"pixel_values": batch["pixel_values"]} if pictures_again else {}
        rest = GREEDY | {"max_new_tokens": NEW - 2, "past_key_values": first.past_key_values}
        out = model.generate(input_ids=ids, attention_mask=mask, **again, **rest)
        assert out[:, ids.shape[1] :].equal(expected[:, -(NEW - 2) :])

    def test_second_turn_with_a_new_picture(self, model):
        a, b = tiny_inputs(), tiny_inputs(seed=1)
        first = model.generate(**a, **GREEDY, return_dict_in_generate=True)
        whole = {
            "input_ids": torch.cat([first.sequences, b["input_ids"]], 1),
            "pixel_values": torch.stack([a["pixel_values"], b["pixel_values"]], 1).flatten(0, 1),  # row by row
        }
        expected = new_tokens(model, whole)
        assert new_tokens(model, whole, past_key_values=first.past_key_values) == expected

    def test_chunked_prefill_of_a_continuation(self, model):
        a, b = tiny_inputs(), tiny_inputs(seed=1)
        first = model.generate(**a, **GREEDY, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, text := b["input_ids"][b["input_ids"] != IMAGE_ID].view(2, -1)], 1)
        whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        expected = new_tokens(model, whole | {"pixel_values": a["pixel_values"]})
        kwargs = {"past_key_values": first.past_key_values, "prefill_chunk_size": text.shape[1] // 2}
        assert new_tokens(model, whole, **kwargs) == expected


@pytest.mark.parametrize("prompt", [[2, IMAGE_ID, 3], [2, 60, IMAGE_ID, 61, 3]])
def test_words_of_the_default_prompt_are_no_answer(prompt):
    model = tiny_model("llama", default_prompt_ids=prompt)
    pixel_values, ids = tiny_inputs()["pixel_values"], model.default_prompt(2)
    T, options = ids.shape[1], GREEDY | {"num_beams": 2, "num_return_sequences": 2}
    expected = model.generate(input_ids=ids, pixel_values=pixel_values, **options)
    model.generation_config.pad_token_id = PAD
    got = model.generate(pixel_values=pixel_values, **options, return_dict_in_generate=True).sequences
    assert got[:, T:].equal(expected[:, T:])
    assert got[:, :T].equal(expected[:, :T] if len(prompt) == 3 else torch.full_like(got[:, :T], PAD))
    assert model.generate(pixel_values=pixel_values, **options).equal(got)


class TestContinuousBatching:
    def test_the_captions_of_generate(self):
        model = outspoken_model("llama")
        rows = [text_row(n, seed) for seed, n in enumerate((7, 3))]
        got = model.generate_batch(rows, max_new_tokens=4)
        expected = [
            model.generate(torch.tensor([row]), **GREEDY | {"max_new_tokens": 4})[0, len(row) :] for row in rows
        ]
        assert [list(o.generated_tokens) for _, o in sorted(got.items())] == [ids.tolist() for ids in expected]

    def test_a_memory_is_refused(self):
        model = tiny_model("llama", use_memory=True)
        with pytest.raises(ValueError, match=r"^generate_batch\(\) has no memory, its cache is paged"):
            model.generate_batch([[5, 6]], memory=model.new_memory())
        with pytest.raises(ValueError, match="^a memory cannot join a SimpleNamespace"):
            model(torch.tensor([[5, 6]]), memory=model.new_memory(), cache=SimpleNamespace())


class TestTheCachesNames:
    def test_both_at_once_are_refused(self, model):
        inputs = tiny_inputs()
        both = {name: DynamicCache(config=model.config) for name in ("past_key_values", "cache")}
        for call in (model, model.model, model.generate):
            with pytest.raises(ValueError, match="both cache and past_key_values"):
                call(**inputs, **both)

    def test_outputs_have_the_installed_versions(self, model, monkeypatch):
        inputs = tiny_inputs(1)
        plain = model.model.language_model(input_ids=inputs["input_ids"], use_cache=True)  # the library's own
        assert [name for name in plain if name in ("past_key_values", "cache")] == [CACHE_NAME]
        old = []  # a version that renamed the cache says so wherever the old name is used
        monkeypatch.setattr(type(generic.logger), "warning_once", lambda self, message, *args: old.append(message))
        cache = DynamicCache(config=model.config)
        for call in (model, model.model):
            out = call(**inputs, **{CACHE_NAME: cache})
            assert [name for name in out if name in ("past_key_values", "cache")] == [CACHE_NAME]
            assert out[CACHE_NAME] is cache
            cache = DynamicCache(config=model.config)
            assert CACHE_NAME not in call(**inputs, use_cache=False)
        out = model.generate(**inputs, **GREEDY, **{CACHE_NAME: cache}, return_dict_in_generate=True)
        assert out[CACHE_NAME] is cache and not old

    def test_evaluation_keeps_neither(self, model):
        assert {"past_key_values", "cache"} <= set(model.config.keys_to_ignore_at_inference)

    @either_name
    def test_masks_made_ahead(self, model, name):
        inputs = tiny_inputs()
        T = inputs["input_ids"].shape[1]
        embeds, mask = torch.zeros(2, 3, 32), torch.ones(2, T + 3, dtype=torch.long)
        mask[0, :2] = 0
        cache = DynamicCache(config=model.config.text_config)
        model(**inputs, past_key_values=cache)
        config, make = model.config.text_config, model.create_masks_for_generate
        kept = MemoryCache(cache)  # nothing attached
        seen = torch.ones(3, T + 3, dtype=torch.bool).tril(T) & mask.bool().unsqueeze(1)
        for given in (cache, kept):
            made = make(config, embeds, mask, **{name: given})
            if isinstance(made, dict):  # by kind, for a decoder that may have several
                made = made["full_attention"]
            assert torch.equal(made, seen.unsqueeze(1))
        kept.memory = {layer: (torch.zeros(2, 2, 4, 8),) * 2 for layer in range(2)}
        assert make(config, embeds, mask, **{name: kept}) is mask  # the forward makes it, with the memory's columns
        with pytest.raises(ValueError, match="both cache and past_key_values"):
            make(config, embeds, mask, past_key_values=cache, cache=kept)


class TestInputs:
    def test_text_only(self, model):
        ids = torch.tensor([text_row(7, 0)])
        language_model = model.model.language_model
        expected = model.lm_head(language_model(input_ids=ids).last_hidden_state)
        torch.testing.assert_close(model(input_ids=ids).logits, expected, **CLOSE)
        out = model.generate(input_ids=ids, **GREEDY)
        assert out.shape == (1, 7 + NEW)
        assert model.generate(input_ids=ids, pixel_values=None, **GREEDY).equal(out)
        assert model.generate(ids, **GREEDY).equal(out)

    def test_pixels_alone_take_the_default_prompt(self, model):
        pixel_values = tiny_inputs(3)["pixel_values"]
        for ids, prompt in ((None, [IMAGE_ID] * 5), ([7, IMAGE_ID, 8], [7] + [IMAGE_ID] * 5 + [8])):
            model.config.default_prompt_ids = ids
            rows = torch.tensor([prompt] * 3)
            assert model.default_prompt(3).equal(rows)
            for kwargs in ({}, {"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}):
                out = model.generate(pixel_values=pixel_values, **GREEDY, **kwargs)
                assert out.equal(model.generate(input_ids=rows, pixel_values=pixel_values, **GREEDY, **kwargs))

    def test_no_input_at_all_starts_from_bos(self, model):
        out = model.generate(**GREEDY, bos_token_id=0)
        assert out.shape == (1, 1 + NEW) and out[0, 0] == 0

    @pytest.mark.parametrize("num_beams", [1, 2])
    def test_embeddings_instead_of_ids(self, model, num_beams):
        inputs = tiny_inputs()
        expected = new_tokens(model, inputs, num_beams=num_beams)
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        rest = {k: inputs[k] for k in ("attention_mask", "pixel_values")} | GREEDY | {"num_beams": num_beams}
        assert model.generate(inputs_embeds=embeds, **rest).tolist() == expected
        assert new_tokens(model, inputs, inputs_embeds=embeds, num_beams=num_beams) == expected
        # with the prefix already inside
        features = torch.stack(model.get_image_features(inputs["pixel_values"]).pooler_output)
        merged = embeds.masked_scatter((inputs["input_ids"] == IMAGE_ID).unsqueeze(-1), features)
        del rest["pixel_values"]
        assert model.generate(inputs_embeds=merged, **rest).tolist() == expected

    def test_features_instead_of_pixels(self, model):
        inputs = tiny_inputs()
        expected = new_tokens(model, inputs)
        features = model.get_image_features(inputs.pop("pixel_values"), return_dict=True)
        assert new_tokens(model, inputs, mm_encoder_outputs={"image": features}) == expected

    def test_pictures_are_encoded_once(self, model):
        calls = []
        model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
        model.generate(**tiny_inputs(), **GREEDY, num_beams=3)
        assert len(calls) == 1

    def test_unknown_arguments_are_refused(self, model):
        with pytest.raises(ValueError, match=r"not used by the model: \['foo'\]"):
            model.generate(**tiny_inputs(), foo=1)

    @pytest.mark.parametrize("number", [1, 3])
    def test_wrong_number_of_pictures_is_refused(self, model, number):
        inputs = tiny_inputs() | {"pixel_values": torch.zeros(number, 3, 32, 32)}
        with pytest.raises(ValueError) as error:
            model.generate(**inputs, **GREEDY)
        assert str(error.value) == (
            f"Image features and image tokens do not match: {number} images need {5 * number} placeholders "
            "(5 each), the text has 10."
        )


class TestOutputs:
    def test_sampling_is_seeded_and_varies(self, model):
        inputs = tiny_inputs(1)
        kwargs = {"do_sample": True, "top_k": 0, "num_return_sequences": 4}
        runs = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            runs.append(new_tokens(model, inputs, **kwargs))
        assert runs[0] == runs[1] != runs[2]
        assert len(runs[0]) == 4 and len(set(map(tuple, runs[0]))) > 1

    def test_sampling_follows_the_logits(self):
        model = outspoken_model("qwen2")
        inputs = tiny_inputs(1)
        torch.manual_seed(0)
        kwargs = {"do_sample": True, "top_k": 0, "num_return_sequences": 2000, "max_new_tokens": 1}
        drawn = torch.tensor(new_tokens(model, inputs, **kwargs)).flatten()
        logits = model(**inputs).logits[0, -1].double()
        logits[IMAGE_ID] = -torch.inf
        share = torch.bincount(drawn, minlength=VOCAB) / len(drawn)
        assert (share - logits.softmax(-1)).abs().max() < 0.05

    def test_beam_sample(self, model):
        inputs = tiny_inputs()
        torch.manual_seed(0)
        out = new_tokens(model, inputs, do_sample=True, num_beams=3, num_return_sequences=3)
        assert len(out) == 6 and all(len(row) == NEW for row in out)

    def test_streamer_gets_every_token_in_order(self, model):
        class Collect(TextStreamer):
            def __init__(self):
                self.tokens = []

            def put(self, value):
                self.tokens += value.flatten().tolist()

            def end(self):
                self.tokens.append("end")

        inputs, streamer = tiny_inputs(1), Collect()
        out = model.generate(**inputs, **GREEDY, streamer=streamer)
        assert streamer.tokens == out[0].tolist() + ["end"]

    def test_dictionary_of_everything(self, model):
        model.set_attn_implementation("eager")
        inputs = tiny_inputs()
        B, T = inputs["input_ids"].shape
        flags = ("output_attentions", "output_hidden_states", "output_scores", "output_logits")
        out = model.generate(**inputs, **GREEDY, return_dict_in_generate=True, **dict.fromkeys(flags, True))
        text = model.config.text_config
        assert len(out.scores) == len(out.logits) == len(out.attentions) == len(out.hidden_states) == NEW
        for t in range(NEW):
            new, seen = (T, T) if t == 0 else (1, T + t)
            assert [tuple(a.shape) for a in out.attentions[t]] == [(B, 4, new, seen)] * text.num_hidden_layers
            assert [tuple(h.shape) for h in out.hidden_states[t]] == [(B, new, 32)] * (text.num_hidden_layers + 1)
            assert out.scores[t].shape == out.logits[t].shape == (B, VOCAB)
            assert out.scores[t].argmax(-1).equal(out.sequences[:, T + t])
            assert torch.isneginf(out.scores[t][:, IMAGE_ID]).all()
        assert [tuple(layer.keys.shape) for layer in out.past_key_values.layers] == [(B, 2, T + NEW - 1, 8)] * 2
        torch.testing.assert_close(out.logits[0], model(**inputs).logits[:, -1], **CLOSE)

    def test_placeholder_is_never_said(self, model):
        with torch.no_grad():
            model.lm_head.weight[IMAGE_ID] = 100 * model.lm_head.weight.mean(0)
        inputs = tiny_inputs()
        assert IMAGE_ID not in sum(new_tokens(model, inputs), [])


@pytest.mark.slow
def test_compiled_static_cache_equals_eager(text_type):
    model = outspoken_model(text_type)
    compile_config = CompileConfig(fullgraph=True)
    compile_config._compile_all_devices = True  # generate() compiles on accelerators only, unless told
    torch.compiler.reset()
    for seed in (0, 1):  # the second run reuses the compiled graph
        inputs = tiny_inputs(seed=seed)
        expected = model.generate(**inputs, **GREEDY)
        kwargs = {"cache_implementation": "static", "compile_config": compile_config}
        assert model.generate(**inputs, **GREEDY, **kwargs).equal(expected)
        assert hasattr(model, "_compiled_call")


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}])
def test_stop_strings(options):
    """generate() hands the tokenizer on with the model's inputs."""
    model = type(tiny_model()).from_pretrained(ROOT)
    processor = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)
    inputs = processor(
        images=str(ROOT / "examples/chipmunk.png"), text="<|user|><image><|assistant|>", return_tensors="pt"
    )
    length = inputs["input_ids"].shape[1]
    options = {"max_new_tokens": 32, "do_sample": False} | options
    whole, stopped = (
        processor.decode(model.generate(**inputs, **options, **stop)[0, length:], skip_special_tokens=True)
        for stop in ({}, {"stop_strings": ["mu"], "tokenizer": processor.tokenizer})
    )
    assert whole == "A chipmunk." and stopped.endswith(("mu", "mun", "munk")) and whole.startswith(stopped)


@torch.no_grad()
@pytest.mark.parametrize("behind", [0, 1])
@pytest.mark.parametrize("static", [False, True])
def test_a_mask_as_long_as_the_cache_can_get(static, behind):
    """What it says of places that are not there yet counts for nothing."""
    model, inputs = outspoken_model("qwen2"), tiny_inputs(1)
    T, token = inputs["input_ids"].shape[1], torch.tensor([[9]])
    said = []
    for longer in (0, 7):
        config = model.config.text_config
        cache = StaticCache(config=config, max_cache_len=T + 8) if static else DynamicCache(config=config)
        masks = [
            torch.cat([torch.ones(1, n), torch.full((1, T + longer + 1 - n), behind)], 1).long() for n in (T, T + 1)
        ]
        masks = [mask[:, : n + longer] for mask, n in zip(masks, (T, T + 1))]
        model(**inputs | {"attention_mask": masks[0]}, past_key_values=cache)
        said.append(model(input_ids=token, attention_mask=masks[1], past_key_values=cache).logits)
    torch.testing.assert_close(said[1], said[0], rtol=1e-4, atol=1e-4)


def test_chunks_of_any_size_give_the_same_words():
    """A chunk may hold as many placeholders as a picture has, of several."""
    model = outspoken_model("qwen2")
    picture, g = [IMAGE_ID] * 5, torch.Generator().manual_seed(4)
    rows = [[9, *picture, 17, *picture, 23], [1, 1, 1, 1, 1, 11, *picture, 12, 13]]
    inputs = {
        "input_ids": torch.tensor(rows),
        "attention_mask": (torch.tensor(rows) != 1).long(),
        "pixel_values": torch.randn(3, 3, 32, 32, generator=g),
    }
    options = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 1}
    whole = model.generate(**inputs, **options)
    for size in range(2, 13):
        assert model.generate(**inputs, **options, prefill_chunk_size=size).equal(whole), size


def test_indexed_processors_are_the_librarys():
    """They give the library's scores; a caller's own processor stays the object that it is."""
    model, scores, ids = tiny_model(), torch.randn(2, 128), torch.zeros(2, 9, dtype=torch.long)
    config = GenerationConfig(suppress_tokens=[4, 17, 128, -1], min_new_tokens=3, min_length=9, eos_token_id=[0, 5])
    config._eos_token_tensor = torch.tensor([0, 5, -1])
    for length in (6, 7):  # two of three new tokens, and enough
        arguments = {"input_ids_seq_length": 9 - (8 - length), "device": "cpu"}
        ours = model._get_logits_processor(config, **arguments)
        theirs = GenerationMixin._get_logits_processor(model, config, **arguments)
        assert [type(p).__name__ for p in ours] == ["IndexedProcessor"] * 3
        for processor, library in zip(ours, theirs, strict=True):
            assert processor.supports_continuous_batching == library.supports_continuous_batching
            assert torch.equal(processor(ids, scores.clone()), library(ids, scores))
    for own in (SuppressTokensLogitsProcessor([7]), lambda ids, scores: scores):
        got = model._get_logits_processor(config, logits_processor=LogitsProcessorList([own]), **arguments)
        assert sum(p is own for p in got) == 1 and not type(own).__name__.startswith("Indexed")
        assert type(got[0]).__name__ == "IndexedProcessor"
