"""The benchmarks run on a tiny model and count what they say they count; nothing here asserts a time."""

import pytest
import torch
from conftest import IMAGE_ID, ROOT, TEXT, tiny_config, tiny_model

from benchmarks import models, parameters
from benchmarks.models import build_on_meta, make_prompt
from microvlm.evaluate.speed import time_generate


def test_sizes_count_every_stored_parameter_once():
    model = build_on_meta(tiny_config())
    sizes = parameters.sizes(model)
    total = sizes.pop("total")
    stored = {id(p): p.numel() for p in model.parameters()}
    assert total == sum(sizes.values()) == sum(stored.values())
    assert sizes[parameters.EMBEDDINGS] == 128 * 32  # tied: once


def test_an_untied_head_counts_as_embeddings():
    text = TEXT["qwen2"] | {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = tiny_config(text_config=text | {"num_key_value_heads": 2, "tie_word_embeddings": False})
    sizes = parameters.sizes(build_on_meta(config))
    assert sizes[parameters.EMBEDDINGS] == 2 * 128 * 32


def test_the_fusion_block_counts_as_alignment_and_an_unknown_part_is_refused():
    plain = parameters.sizes(build_on_meta(tiny_config()))
    model = build_on_meta(tiny_config(use_fusion=True))
    fusion = sum(p.numel() for p in model.model.fusion.parameters())
    assert parameters.sizes(model)["alignment"] == plain["alignment"] + fusion
    model.model.unknown = torch.nn.Linear(2, 2)
    with pytest.raises(KeyError, match="unknown"):
        parameters.sizes(model)


def test_shapes_are_those_of_a_real_forward(text_type):
    shapes = parameters.shapes(build_on_meta(tiny_config(text_type)))
    model = tiny_model(text_type)
    ids = make_prompt(model)
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=torch.zeros(1, 3, 32, 32))
    B, T = ids.shape
    assert shapes["prefix tokens"] == str(("N", *out.image_hidden_states.shape[1:])).replace("'", "")
    assert shapes["logits"] == f"(B, T, {out.logits.shape[-1]})"
    keys = out.past_key_values.layers[0].keys
    assert keys.shape[0] == B and keys.shape[2] == T
    assert shapes["text keys, per layer"] == f"(B, {keys.shape[1]}, T, {keys.shape[3]})"


def test_the_table_in_the_docs_is_the_one_printed(capsys):
    parameters.main()
    shape_table, parameter_table = capsys.readouterr().out.strip().split("\n\n")
    assert shape_table in (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert parameter_table.count("total") == 3


def test_the_prompt_has_placeholders_once_and_text_without_them(monkeypatch):
    monkeypatch.setattr(models, "TEXT_TOKENS", 2000)  # every id of the vocabulary is drawn
    model = tiny_model()
    ids = make_prompt(model)
    P = model.config.num_prefix_tokens
    assert ids.shape == (1, P + models.TEXT_TOKENS)
    assert (ids[:, :P] == IMAGE_ID).all()
    assert set(ids[0, P:].tolist()) == set(range(128)) - {IMAGE_ID}


def test_the_end_of_text_does_not_stop_the_clock():
    model = tiny_model()
    model.generation_config.sequence_bias = {(0,): 1e4}  # it wants nothing but to stop
    ids = make_prompt(model)[:, 5:]
    assert model.generate(ids, max_new_tokens=4).shape[1] == ids.shape[1] + 1
    first, rate = time_generate(model, 4, input_ids=ids)
    assert first > 0 and rate > 0


def test_generate_looks_for_placeholders_once_per_call(monkeypatch):
    """The wrapper's check of the placeholders is no cost of a decoding step."""
    model = tiny_model()
    calls = []
    check = type(model.model).get_placeholder_mask
    monkeypatch.setattr(
        type(model.model), "get_placeholder_mask", lambda self, *a, **k: calls.append(1) or check(self, *a, **k)
    )
    time_generate(model, 6, input_ids=make_prompt(model), pixel_values=torch.zeros(1, 3, 32, 32))
    assert len(calls) == 1
