"""benchmarks/quality.py: every row is a checkpoint that opens, and fewer bits are fewer bytes."""

import ast
import sys

import pytest
from toy_data import pairs, toy_checkpoint, use_cache, write_parquet

from benchmarks import quality


def test_a_table_of_bytes_and_scores(tmp_path, monkeypatch, capsys):
    use_cache(monkeypatch, tmp_path / "cache")
    start = toy_checkpoint(tmp_path / "start", text="qwen2")
    ternary = {"ternary_modules": [r"language_model\.layers\..*_proj"], "group_size": "row"}
    trained = toy_checkpoint(tmp_path / "trained", text="qwen2", qat_config=ternary)
    data = write_parquet(tmp_path / "data.parquet", pairs(style=["flat"] * 8))
    rows = quality.variants()
    # names parts that the toy lacks; NF4 takes rows divisible by 32
    assert rows.pop("decoder ternary, trained; the rest as recipes/v-135m/pack.yaml")[0]
    assert rows.pop("NF4")[1] is quality.NF4
    monkeypatch.setattr(quality, "variants", lambda: rows)
    monkeypatch.setattr(quality, "COUNTS", str(data))
    arguments = [str(start), "--trained", str(trained), "--data", str(data)]
    monkeypatch.setattr(sys, "argv", ["quality.py", *arguments])
    quality.main()
    printed, progress = capsys.readouterr()
    lines = [line.partition(": ") for line in progress.splitlines() if line.partition(": ")[0] in rows]
    results = {name: ast.literal_eval(values) for name, _, values in lines}
    assert list(results) == list(rows) and all(f"| {name} |" in printed for name in results)
    size = {name: values["bytes"] for name, values in results.items()}
    assert size["bf16"] > size["vocabulary int8"] > size["vocabulary int4"] > size["vocabulary ternary"]
    assert size["bf16"] > size["decoder ternary, trained"] > size["decoder ternary, trained; vocabulary int8"]
    assert results["bf16"]["same"] == 1
    int8, bf16 = (results[name]["perplexity"] for name in ("vocabulary int8", "bf16"))
    assert int8 == pytest.approx(bf16, rel=0.05)
    assert all(values["perplexity"] > 1 for values in results.values())
