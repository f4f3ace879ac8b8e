"""Training the parts, calibrating: each changes what it says and nothing else."""

import json
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import ROOT, microvlm
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
    VISION: "train_file=5 train_file= train_file=/no/where image_size=x image_size=0 batch_size=1.5 learning_rate=fast "
    "phases=[] phases=[5] phases=[{size:100,steps:3}] phases=[{size:112}] phases=[{size:112,steps:0}] weights=3 "
    "weights={dense:1} weights.other=1 optimizer=sgd compile=3 seed= warmup_steps=0 bogus=1 output_dir= output_dir=5",
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
        option = "output_dir" if path == VISION else "training.output_dir"
        with locked(tmp_path / "out"):
            assert microvlm("train", path, "--set", f"{option}={tmp_path / 'out'}") == 1
        assert "is of a run that still goes on" in capsys.readouterr().err


# --- distill_vision.py


def test_a_distillation_that_goes_on_keeps_its_log(tmp_path, monkeypatch, capsys):
    """nano's recipe, small."""
    use_cache(monkeypatch, tmp_path / "cache")
    data = write_parquet(tmp_path / "rows.parquet", pairs(concept=list("aabbccdd"), licence=["MIT"] * 8))
    features = torch.randn(12, 320, 2, 2).half(), torch.randn(12, 1280).half()
    monkeypatch.setattr(distill_vision, "cached_teacher_features", lambda *_: features)
    small = {"output_dir": tmp_path / "out", "image_size": 32, "batch_size": 2, "warmup_steps": 1, "compile": "false"}
    small |= {f"{name}_file": data for name in ("train", "unlabelled", "validation")} | {"unlabelled_rows": 4}

    def run(steps: int, save_steps: int = 1) -> list[int]:
        changes = small | {"save_steps": save_steps, "phases": f"[{{steps: {steps}, size: 32}}]"}
        options = [word for name, value in changes.items() for word in ("--set", f"{name}={value}")]
        train_hf.main([str(ROOT / "recipes/nano/vision.yaml"), *options])
        return [entry["step"] for entry in json.loads((tmp_path / "out/log.json").read_text())]

    assert run(2) == [1, 2]
    assert run(2) == [1, 2]  # nothing is left to do
    assert run(3) == [1, 2, 3]
    with pytest.raises(ValueError, match="state.pt is of a run with other data: choose another output_dir.$"):
        other = pairs(concept=list("abcdefgh"), licence=["MIT"] * 8)
        small["train_file"] = write_parquet(tmp_path / "other.parquet", other)
        run(3)
    small["train_file"] = data
    state = torch.load(tmp_path / "out/state.pt", weights_only=True)
    torch.save(state | {"step": 98}, tmp_path / "out/state.pt")
    capsys.readouterr()
    assert run(100, save_steps=100) == [1, 2, 3, 100]
    dense = float(re.search(r"^step 100/100 .* dense ([\d.]+) ", capsys.readouterr().out, re.MULTILINE)[1])
    assert 0.1 < dense < 10  # smooth L1 of standardised targets, a mean over the two steps since


def test_a_student_changes_nothing_outside_itself():
    fused = timm.layers.use_fused_attn()
    student = distill_vision.Student(1, 1, 0.0)
    assert not any(block.attn.fused_attn for block in student.backbone.blocks)
    assert timm.layers.use_fused_attn() == fused
    assert timm.create_model("deit_tiny_patch16_224").blocks[0].attn.fused_attn == bool(fused)


# --- pretrain_text.py


def test_synsets_become_sentences():
    line = '02084071 05 n 03 dog 0 domestic_dog 0 Canis_familiaris(a) 0 001 @ 1 n 0 | a domestic animal; "the dog barked"  '
    text = pretrain_text.synset_text(line, "noun")
    assert text == "A dog. A domestic animal. Also: domestic dog, Canis familiaris. The dog barked."
    assert pretrain_text.synset_text("1 00 v 01 Ask 0 000 | inquire ", "verb") == "Ask. Inquire."


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
