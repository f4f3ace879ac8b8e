"""benchmarks/quality.py: every row is a checkpoint that opens, and fewer bits are fewer bytes."""

import json
import sys

import pytest
from toy_data import pairs, toy_checkpoint, use_cache, write_parquet

from benchmarks import quality


def test_a_table_of_bytes_and_scores(tmp_path, monkeypatch, capsys):
    use_cache(monkeypatch, tmp_path / "cache")
    start = toy_checkpoint(tmp_path / "start", text="qwen2")
    rows = {r"language_model\.layers\..*_proj": "row"}
    trained = toy_checkpoint(
        tmp_path / "trained", text="qwen2", qat_config={"ternary_modules": [*rows], "group_size": "row"}
    )
    data = write_parquet(tmp_path / "data.parquet", pairs(style=["flat"] * 8))
    chosen = quality.variants(True)
    assert chosen.pop("decoder ternary, trained; the rest as recipes/v/pack.yaml")[0]  # names parts that the toy lacks
    assert chosen.pop("NF4")[1] == "nf4"  # takes rows divisible by 32
    monkeypatch.setattr(quality, "variants", lambda trained: chosen)
    arguments = [str(start), "--trained", str(trained), "--data", str(data), "--counts", str(data)]
    monkeypatch.setattr(sys, "argv", ["quality.py", *arguments, "--json", str(tmp_path / "out.json")])
    quality.main()
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_text())
    assert list(found) == list(chosen) and all(f"| {name} |" in printed for name in found)
    size = {name: values["bytes"] for name, values in found.items()}
    assert size["bf16"] > size["vocabulary int8"] > size["vocabulary int4"] > size["vocabulary ternary"]
    assert size["bf16"] > size["decoder ternary, trained"] > size["decoder ternary, trained; vocabulary int8"]
    assert found["bf16"]["same"] == 1
    assert found["vocabulary int8"]["perplexity"] == pytest.approx(found["bf16"]["perplexity"], rel=0.05)
    assert all(values["perplexity"] > 1 for values in found.values())
