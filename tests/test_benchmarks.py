"""The benchmarks run on a tiny model and count what they say they count; nothing here asserts a time."""

import json
import math

import pytest
import torch
from conftest import IMAGE_ID, ROOT, TEXT, tiny_config, tiny_model

from benchmarks import overhead, parameters
from benchmarks.models import build_on_meta

TERNARY = {"ternary_modules": [r"language_model\.layers\..*_proj"]}


def test_sizes_count_every_stored_parameter_once():
    model = build_on_meta(tiny_config())
    sizes = parameters.sizes(model)
    total = sizes.pop("total")
    stored = {id(p): p.numel() for p in model.parameters()}
    assert total.parameters == sum(size.parameters for size in sizes.values()) == sum(stored.values())
    assert sizes[parameters.EMBEDDINGS].parameters == 128 * 32  # tied: once


def test_an_untied_head_counts_as_embeddings():
    text = TEXT["qwen2"] | {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = tiny_config(text_config=text | {"num_key_value_heads": 2, "tie_word_embeddings": False})
    sizes = parameters.sizes(build_on_meta(config))
    assert sizes[parameters.EMBEDDINGS].parameters == 2 * 128 * 32


def test_packed_bytes_are_five_values_a_byte_for_matrices_of_decoder_layers_only():
    model = build_on_meta(tiny_config("bitnet"))
    expected = 0
    for name, p in model.model.language_model.layers.named_parameters():
        expected += math.ceil(p.numel() / 5) if name.endswith("_proj.weight") else 2 * p.numel()
    expected += 2 * model.model.language_model.norm.weight.numel()
    sizes = parameters.sizes(model)
    assert sizes[parameters.LAYERS].packed_bytes == expected
    assert sizes["adapter"].packed_bytes == 2 * sizes["adapter"].parameters


def test_the_fusion_block_counts_as_alignment_and_an_unknown_part_is_refused():
    plain = parameters.sizes(build_on_meta(tiny_config()))
    model = build_on_meta(tiny_config(use_fusion=True))
    fusion = sum(p.numel() for p in model.model.fusion.parameters())
    assert parameters.sizes(model)["alignment"].parameters == plain["alignment"].parameters + fusion
    model.model.unknown = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="model.unknown.weight belongs to none of"):
        parameters.sizes(model)


def test_shapes_are_those_of_a_real_forward(text_type):
    shapes = parameters.shapes(build_on_meta(tiny_config(text_type)))
    model = tiny_model(text_type)
    ids = overhead.prompt(model)
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
    monkeypatch.setattr(overhead, "TEXT_TOKENS", 2000)  # every id of the vocabulary is drawn
    model = tiny_model()
    ids = overhead.prompt(model)
    P = model.config.num_prefix_tokens
    assert ids.shape == (1, P + overhead.TEXT_TOKENS)
    assert (ids[:, :P] == IMAGE_ID).all()
    assert set(ids[0, P:].tolist()) == set(range(128)) - {IMAGE_ID}


def test_the_end_of_text_does_not_stop_the_clock():
    model = tiny_model()
    model.generation_config.sequence_bias = {(0,): 1e4}  # it wants nothing but to stop
    ids = overhead.prompt(model)[:, 5:]
    assert model.generate(ids, max_new_tokens=4).shape[1] == ids.shape[1] + 1
    first, rate = overhead.time_generate(model, 4, input_ids=ids)
    assert first > 0 and rate > 0


def test_generate_looks_for_placeholders_once_per_call(monkeypatch):
    """The wrapper's check of the placeholders is no cost of a decoding step."""
    model = tiny_model()
    calls = []
    check = type(model.model).get_placeholder_mask
    monkeypatch.setattr(
        type(model.model), "get_placeholder_mask", lambda self, *a, **k: calls.append(1) or check(self, *a, **k)
    )
    overhead.time_generate(model, 6, input_ids=overhead.prompt(model), pixel_values=torch.zeros(1, 3, 32, 32))
    assert len(calls) == 1


@pytest.mark.parametrize("text,qat", [("qwen2", {}), ("bitnet", TERNARY)])
def test_the_overhead_command_measures_a_config(text, qat, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(overhead, "ROOT", tmp_path)  # without a checkpoint
    monkeypatch.setattr(
        overhead.transformers.utils.logging, "disable_progress_bar", lambda: None
    )  # it is for all tests
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(tiny_config(text, qat_config=qat).to_dict()))
    overhead.main(["--config", str(path), "--repeats", "2", "--new-tokens", "3"])
    out = capsys.readouterr().out
    assert "tiny with random weights: 4" in out and "bfloat16" in out
    assert "| greedy decoding, tokens/s |" in out and out.count("%") == 2


def test_different_weights_are_not_compared(tmp_path):
    model = tiny_model()
    overhead.write_text_model(model, tmp_path)
    text_model = overhead.load_text_model(tmp_path)
    with torch.no_grad():
        text_model.model.norm.weight.add_(1)
    with pytest.raises(ValueError, match="different logits"):
        overhead.lend_layers(model, text_model)
