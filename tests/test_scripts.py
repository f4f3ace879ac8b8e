"""Training the parts, calibrating: each changes what it says and nothing else."""

import json
import re
import shutil

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import ROOT, microvlm
from safetensors.torch import load_file
from toy_data import pairs, use_cache, write_parquet
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer

import train_hf
from microvlm.data.collators import CaptionCollator
from microvlm.data.rows import load_rows
from microvlm.evaluate.language import teacher_forced
from microvlm.files import locked
from microvlm.model import load_plain
from microvlm.train import calibrate, distill_vision, pretrain_text

VISION, TEXT = (ROOT / "recipes" / "nano" / f"{name}.yaml" for name in ("vision", "text"))
MISTAKES = {
    VISION: "train_file=5 train_file= train_file=/no/where image_size=x image_size=0 batch_size=1.5 batch_size=3 "
    "phases=[] phases=[5] phases=[{size:100,steps:3}] phases=[{size:112}] phases=[{size:112,steps:0}] weights=3 "
    "weights={dense:1} weights.other=1 bogus=1 style=x unlabelled_batch=0 training=3 training.bogus=1 training.seed= "
    "training.learning_rate=fast training.output_dir= training.output_dir=5",
    TEXT: "wordnet_dir=5 wordnet_dir=/no/where captions_file=5 caption_repeats=x vocab_size= block_size=0 model=3 "
    "model.bogus=1 model.vocab_size=9 model.hidden_size=x model.hidden_size=0 model.num_attention_heads=3 "
    "model.hidden_act=bogus training=3 training.bogus=1 training.learning_rate=x training.seed= training.output_dir= "
    "training.output_dir=5",
}


@pytest.mark.parametrize("recipe, change", [(path, change) for path in MISTAKES for change in MISTAKES[path].split()])
def test_a_mistake_in_a_recipe_is_one_line(recipe, change, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert microvlm("train", recipe, "--set", change.replace(":", ": ")) == 1
    error = capsys.readouterr().err
    assert len(re.findall("^microvlm: ", error, re.MULTILINE)) == 1 and "Traceback" not in error, error
    names = change.partition("=")[0].split(".")
    assert (
        any(name in error for name in names)
        or "/no/where" in error
        or "no BitNet can be made" in error
        or "phase is" in error
    ), error


def test_a_repeated_key_and_a_locked_folder_are_one_line(tmp_path, capsys):
    twice = tmp_path / "twice.yaml"
    for path in (VISION, TEXT):
        twice.write_text(f"{path.read_text()}\nkind: text\n")
        assert microvlm("train", twice) == 1 and "the key 'kind' stands twice" in capsys.readouterr().err
        with locked(tmp_path / "out"):
            assert microvlm("train", path, "--set", f"training.output_dir={tmp_path / 'out'}") == 1
        assert "is of a run that still goes on" in capsys.readouterr().err


# --- distill_vision.py


def test_a_distillation_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    """nano's recipe, small: a run that lost its end makes the same tower."""
    use_cache(monkeypatch, tmp_path / "cache")
    rows = pairs(concept=list("aabbccdd"), style=["flat", "3d"] * 4, licence=["MIT"] * 8)
    data = write_parquet(tmp_path / "rows.parquet", rows)
    features = torch.randn(16, 320, 2, 2).half(), torch.randn(16, 1280).half()
    monkeypatch.setattr(distill_vision, "cached_teacher_features", lambda *_: features)
    out = tmp_path / "out"
    changes = {f"{name}_file": data for name in ("train", "unlabelled", "validation")}
    changes |= {"image_size": 64, "batch_size": 4, "unlabelled_batch": 2}
    changes["phases"] = "[{steps: 2, size: 32}, {steps: 2, size: 64}]"
    changes |= {"training.output_dir": out, "training.save_steps": 2, "training.save_total_limit": 2}
    changes |= {"training.logging_steps": 1, "training.eval_steps": 4, "training.warmup_steps": 1}
    options = [word for name, value in changes.items() for word in ("--set", f"{name}={value}")]

    def run() -> dict[str, torch.Tensor]:
        with torch.compiler.set_stance("force_eager"):
            train_hf.main([str(VISION), *options])
        return load_file(out / "model.safetensors")

    whole = run()
    log = json.loads((out / "log.json").read_text())
    losses = [entry for entry in log if "loss" in entry]
    assert [entry["step"] for entry in losses] == [1, 2, 3, 4]
    weights = {"dense": 1.0, "pooled": 1.5, "concept": 0.6, "words": 0.1, "contrast": 0.5}
    for entry in losses:
        total = sum(weight * entry[f"{name}_loss"] for name, weight in weights.items())
        assert entry["loss"] == pytest.approx(total, rel=1e-3) and 0.1 < entry["dense_loss"] < 10
    assert [entry["eval_style_16"] for entry in log if "eval_style_16" in entry]
    shutil.rmtree(out / "checkpoint-4")
    again = run()
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_the_contrast_of_styles_by_hand():
    """Mean of -log p of what has the same concept: other images, the caption, and earlier images."""
    torch.manual_seed(0)
    student = distill_vision.Student(3, 5, {})
    images, captions, concept = torch.randn(6, 256), torch.randn(4, 256), torch.tensor([0, 1, 0, 2])
    student.queue_concepts[:3] = torch.tensor([0, 2, -1])
    queue, earlier = student.queue.double(), [0, 2, *[-1] * (len(student.queue) - 2)]
    x, y = F.normalize(images.double(), dim=-1), F.normalize(captions.double(), dim=-1)
    losses = []
    for i in range(4):
        others = [(x[j], [0, 1, 0, 2, -1, -1][j]) for j in range(6) if j != i]
        others += list(zip(y, concept.tolist())) + list(zip(queue, earlier))
        log_p = torch.stack([x[i] @ other for other, _ in others]).div(0.1).log_softmax(0)
        losses.append(-log_p[[c == concept[i].item() for _, c in others]].mean())
    expected = torch.stack(losses).mean().item()
    assert student.contrast(images, captions, concept).item() == pytest.approx(expected, rel=1e-5)
    assert student.queue_concepts[:9].tolist() == [0, 1, 0, 2, -1, -1, 0, 2, -1]
    torch.testing.assert_close(student.queue[:6], x.float())


def test_recall_over_styles_by_hand():
    rows = [{"concept": concept, "style": style} for concept in "abc" for style in ("flat", "3d")]
    rows.append({"concept": "d", "style": "flat"})  # of one style, so nobody asks for it
    features = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1], [-1, -1], [1.1, 0], [0, 0]])
    assert distill_vision.style_recall(features, rows, 3) == pytest.approx(2 / 3)
    assert distill_vision.style_recall(features, rows, 1) == 1


def test_a_student_changes_nothing_outside_itself():
    fused = timm.layers.use_fused_attn()
    student = distill_vision.Student(1, 1, {})
    assert not any(block.attn.fused_attn for block in student.backbone.blocks)
    assert timm.layers.use_fused_attn() == fused
    assert timm.create_model("deit_tiny_patch16_224").blocks[0].attn.fused_attn == bool(fused)


# --- pretrain_text.py


def test_synsets_become_sentences():
    line = '02084071 05 n 03 dog 0 domestic_dog 0 Canis_familiaris(a) 0 001 @ 1 n 0 | a domestic animal; "the dog barked"  '
    sentences = pretrain_text.synset_sentences(line, "noun")
    assert sentences == ["A dog.", "A domestic animal.", "Also: domestic dog, Canis familiaris.", "The dog barked."]
    assert pretrain_text.synset_sentences("1 00 v 01 Ask 0 000 | inquire ", "verb") == ["Ask.", "Inquire."]


def test_a_language_model_learns_glosses_and_captions(tmp_path, monkeypatch):
    """nano's recipe, small: what it leaves opens in transformers and has nano's tokens."""
    use_cache(monkeypatch, tmp_path / "cache")
    data = write_parquet(tmp_path / "rows.parquet", pairs(licence=["MIT"] * 8))
    for part in ("noun", "verb", "adj", "adv"):
        lines = ["  1 the licence", *(f"{i} 05 n 01 thing_{i} 0 000 | it is {part} number {i}" for i in range(300))]
        (tmp_path / f"data.{part}").write_text("\n".join(lines))
    out, changes = (
        tmp_path / "out",
        {"wordnet_dir": tmp_path, "captions_file": data, "vocab_size": 320, "block_size": 16},
    )
    changes |= {"model.hidden_size": 32, "model.intermediate_size": 32, "model.num_hidden_layers": 1}
    changes |= {"training.output_dir": out, "training.max_steps": 1, "training.per_device_train_batch_size": 2}
    options = [word for name, value in changes.items() for word in ("--set", f"{name}={value}")]
    with torch.compiler.set_stance("force_eager"):
        train_hf.main([str(ROOT / "recipes/nano/text.yaml"), *options])
        model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.convert_ids_to_tokens(range(5)) == pretrain_text.SPECIAL_TOKENS and len(tokenizer) == 320
    assert tokenizer.padding_side == "left" and tokenizer.chat_template == (ROOT / "chat_template.jinja").read_text()
    assert model.config.vocab_size == 320 and model.config.quantization_config.quantization_mode == "online"
    assert tokenizer.tokenize("thing 407") == [*tokenizer.tokenize("thing"), "Ġ", "4", "0", "7"]  # digits apart
    sentences = (out / "sentences.txt").read_text().splitlines()
    assert len(sentences) == 1200 and sentences[0] == "It is noun number 0."


# --- calibrate.py


def test_temperature_of_least_loss():
    """Against a grid in float64, where targets are drawn at a known temperature."""
    generator = torch.Generator().manual_seed(0)
    states, head = torch.randn(4000, 8, generator=generator), torch.randn(8, 20, generator=generator)
    logits = (2 * states @ head).double()
    targets = torch.multinomial((logits / 2.5).softmax(-1), 1, generator=generator)[:, 0]
    grid = torch.linspace(2, 3, 2001, dtype=torch.float64)
    nats = torch.stack([F.cross_entropy(logits / t, targets) for t in grid])
    found = calibrate.best_temperature(logits.float(), targets)
    assert abs(found - float(grid[nats.argmin()])) < 1e-3 and abs(found - 2.5) < 0.1


def test_a_calibrated_checkpoint_divides_its_logits(tmp_path, capsys):
    """The shipped model on pictures it does not know, where it is too sure: less loss, the same words."""
    rows = load_rows(str(ROOT / "data/mini/validation.parquet")).select(range(12))
    rows.to_parquet(tmp_path / "rows.parquet")
    arguments = str(ROOT), str(tmp_path / "out"), str(tmp_path / "rows.parquet")
    calibrate.main(*arguments, only="temperature")
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
    with pytest.raises(ValueError, match="exists and is not empty"):
        calibrate.main(*arguments)
    calibrate.main(*arguments, only="temperature", force=True)
    assert f"temperature {temperature:.4f}:" in capsys.readouterr().out
