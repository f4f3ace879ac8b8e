"""The recipe, what trains, the composed loss against one written by hand, resuming, and a run from the command line."""

import json
import os
import re
import resource
import runpy
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import timm.optim
import torch
import yaml
from conftest import ROOT, MicroVLMForConditionalGeneration, microvlm
from microvlm.configuration_microvlm import MicroVLMConfig
from safetensors.torch import load_file
from toy_data import (
    CAPTIONS,
    pairs,
    same_state,
    toy_checkpoint,
    toy_model,
    toy_processor,
    use_cache,
    write_parquet,
)
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    Trainer,
    TrainingArguments,
    set_seed,
)

from microvlm.data.collators import CaptionCollator, FeatureCollator
from microvlm.data.feature_cache import cache_vision_features
from microvlm.data.rows import load_rows
from microvlm.files import locked
from microvlm.train.data import TrainingData
from microvlm.train.gradcache import embedded_pairs
from microvlm.train.losses import Alignment, labelled_logits
from microvlm.train.recipe import DataConfig, Recipe, load_recipe, to_dict
from microvlm.train.setup import (
    calibrate_adapter,
    change_config,
    check_patterns,
    load_model,
    set_trainable,
    trainable_table,
    training_arguments,
    unquantized_modules,
)
from microvlm.train.trainer import MicroVLMTrainer, TrainerOptions
from train_hf import KINDS, main

RECIPES = {  # of a family's models, by name
    path.relative_to(ROOT / "recipes").with_suffix("").as_posix(): path
    for path in [*sorted(ROOT.glob("recipes/*/*.yaml")), ROOT / "recipes/finetune.yaml"]
    if re.search("^trainable:", path.read_text(), re.MULTILINE)
}
FAMILIES = ("m", "v", "nano")
MINIMAL = {"model": "m", "trainable": ["adapter"], "data": {"train": "d"}, "training": {"output_dir": "o"}}


@pytest.fixture
def rows(monkeypatch, tmp_path):
    use_cache(monkeypatch, tmp_path / "cache")
    return load_rows(str(write_parquet(tmp_path / "toy.parquet", pairs())))


def write_recipe(folder: Path, name: str = "recipe.yaml", **changes) -> str:
    path = folder / name
    path.write_text(yaml.safe_dump(MINIMAL | changes, sort_keys=False))
    return str(path)


def arguments(folder: Path, **kwargs) -> TrainingArguments:
    defaults = {
        "output_dir": str(folder / "out"),
        "use_cpu": True,
        "bf16": False,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "learning_rate": 0.1,
        "max_grad_norm": 0.0,
        "max_steps": 1,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return TrainingArguments(**(defaults | kwargs))


def toy_trainer(folder: Path, rows, model=None, loss_weights=None, trainer_kwargs=None, **kwargs) -> MicroVLMTrainer:
    model, processor = model or toy_model(), toy_processor()
    options = {"loss_weights": loss_weights or {"lm": 1.0, "align": 0.0}} | (trainer_kwargs or {})
    names = {option.name for option in fields(TrainerOptions)}
    return MicroVLMTrainer(
        model=model,
        args=arguments(folder, **kwargs),
        train_dataset=rows,
        data_collator=CaptionCollator(processor, model.default_prompt(1)[0].tolist()),
        processing_class=processor,
        options=TrainerOptions(**{k: v for k, v in options.items() if k in names}),
        **{k: v for k, v in options.items() if k not in names},
    )


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def by_hand(model, batches, weights) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, LM part and alignment part of one step over micro-batches, from logits and embeddings alone."""
    tokens = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    lm, images, texts = 0.0, [], []
    for batch in batches:
        out = model(**batch, return_alignment=True)
        nll = -out.logits[:, :-1].log_softmax(-1).gather(2, batch["labels"][:, 1:].clamp(min=0).unsqueeze(2))[..., 0]
        lm = lm + nll[batch["labels"][:, 1:] != -100].sum() / tokens
        images.append(out.image_embeds)
        texts.append(out.text_embeds)
    similarity = torch.cat(images) @ torch.cat(texts).mT / 0.07  # every other pair of the step is a negative
    picture_to_text, text_to_picture = similarity.softmax(1).diagonal(), similarity.softmax(0).diagonal()
    align = -(picture_to_text.log() + text_to_picture.log()).mean() / 2
    return weights["lm"] * lm + weights["align"] * align, lm, align


def test_processes_that_would_train_alone_are_refused(run, tmp_path, monkeypatch):
    recipe = write_recipe(tmp_path, **run)
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = "^2 processes were started, but each would train alone: without a GPU set training.use_cpu: true.$"
    with pytest.raises(ValueError, match=message):
        main([recipe, "--set", "training.use_cpu=false"])


# --- distillation


@pytest.mark.parametrize("batch,steps", [(4, 1), (2, 2), (1, 4)])
def test_distillation_by_hand(tmp_path, rows, batch, steps):
    """The KL divergence from the teacher, in float64, over all the step's tokens, however they come; and its
    gradient."""
    torch.manual_seed(1)
    teacher, T = toy_model("llama"), 2.0
    model = toy_model()
    start = state(model)
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps}
    more = {"teacher": teacher, "temperature": T}
    trainer = toy_trainer(tmp_path, rows, model, {"lm": 0.3, "distill": 0.7}, more, **sizes)
    trainer.train()
    logged = trainer.state.log_history[0]

    wide, teacher_wide = toy_model().double(), teacher.double()
    wide.load_state_dict({k: v.double() for k, v in start.items()})
    whole = trainer.data_collator(list(rows.select(range(4))))
    whole["pixel_values"] = whole["pixel_values"].double()
    labels = whole.pop("labels")[:, 1:]
    on = labels != -100
    log_q = wide(**whole).logits[:, :-1][on]
    log_p = teacher_wide(**whole).logits[:, :-1][on].detach()
    lm = torch.nn.functional.cross_entropy(log_q, labels[on])
    p, log_p, log_q = (log_p / T).softmax(-1), (log_p / T).log_softmax(-1), (log_q / T).log_softmax(-1)
    distill = (p * (log_p - log_q)).sum(-1).mean() * T**2
    assert logged["distill_loss"] == pytest.approx(distill.item(), rel=1e-4)
    assert logged["lm_loss"] == pytest.approx(lm.item(), rel=1e-4)
    assert logged["loss"] == pytest.approx(0.3 * lm.item() + 0.7 * distill.item(), rel=1e-4)
    (0.3 * lm + 0.7 * distill).backward()
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    moved = (start[name] - state(model)[name]) / 0.1  # SGD
    torch.testing.assert_close(moved.double(), wide.get_parameter(name).grad, rtol=1e-3, atol=1e-5)


def test_a_run_learns_from_its_teacher(run, tmp_path):
    run |= {"distillation": {"teacher": run["model"]}, "loss_weights": {"lm": 0.0, "distill": 1.0}}
    run |= {"config": {"qat_config.ternary_modules": [r"language_model\.layers\..*_proj"]}, "calibration_rows": 0}
    main([write_recipe(tmp_path, **run)])
    log = [e["distill_loss"] for e in json.loads((tmp_path / "out" / "log.json").read_text()) if "distill_loss" in e]
    assert log[-1] < log[0]


@pytest.mark.parametrize("same", [True, False])
def test_a_teacher_sees_with_its_own_tower(run, tmp_path, same):
    teacher = toy_model()
    student = AutoModelForImageTextToText.from_pretrained(run["model"], trust_remote_code=True)
    teacher.model.vision_tower.load_state_dict(student.model.vision_tower.state_dict())
    if not same:
        torch.nn.init.normal_(next(teacher.model.vision_tower.parameters()))
    teacher.save_pretrained(tmp_path / "teacher")
    run |= {"distillation": {"teacher": str(tmp_path / "teacher")}, "loss_weights": {"lm": 0.0, "distill": 1.0}}
    run["data"]["vision_cache"] = {"views": 1, "folder": str(tmp_path / "features")}
    run["training"]["max_steps"] = 1
    if same:
        return main([write_recipe(tmp_path, **run)])
    with pytest.raises(ValueError) as error:
        main([write_recipe(tmp_path, **run)])
    assert str(error.value) == (
        "distillation.teacher has another vision tower than the model, whose features data.vision_cache gives to both: "
        "leave data.vision_cache out."
    )


# --- groups of similar length


def test_groups_of_similar_length_are_the_same_after_a_resume(tmp_path, monkeypatch):
    use_cache(monkeypatch, tmp_path / "cache")
    rows = [row | {"caption": "x" * (1 + i)} for i, row in enumerate(pairs() * 4)]
    rows = load_rows(str(write_parquet(tmp_path / "train.parquet", rows)))

    def lengths_seen(folder, strategy, resume=None):
        kwargs = {"per_device_train_batch_size": 2, "train_sampling_strategy": strategy, "max_steps": 24}
        trainer = toy_trainer(tmp_path / folder, rows, save_strategy="steps", save_steps=20, **kwargs)
        collate, seen = trainer.data_collator, []
        trainer.data_collator = lambda rows: (seen.append([len(row["caption"]) for row in rows]), collate(rows))[1]
        trainer.train(resume_from_checkpoint=resume)
        return seen

    mixed, grouped = lengths_seen("mixed", "random"), lengths_seen("grouped", "group_by_length")
    first, second = grouped[:16], grouped[16:24]
    assert sorted(sum(first, [])) == list(range(1, 33)) and first[:8] != second
    apart = lambda batches: sum(max(b) - min(b) for b in batches) / len(batches)  # noqa: E731
    assert apart(grouped) < apart(mixed) / 2
    torch.manual_seed(7)
    resumed = lengths_seen("resumed", "group_by_length", str(tmp_path / "grouped" / "out" / "checkpoint-20"))
    assert resumed[:4] == grouped[20:24]


# --- recipes


@pytest.mark.parametrize(
    "changes,message",
    [
        (
            {"modle": "x", "colour": 1},
            "unknown key in {path}: colour, modle. Known: attn_implementation, calibration_rows, compile, config, data, "
            "distillation, evaluation, learning_rates, loss_weights, max_nonfinite_steps, model, optimizer, "
            "quantization, revision, trainable, training.",
        ),
        (
            {"data": {"train": "d", "validate": "v"}},
            "unknown key in data: validate. Known: augmentation, episodes, exclude_copyleft, limit, "
            "max_caption_tokens, max_unreadable_share, replay, replay_share, revision, stream, train, validation, "
            "validation_limit, vision_cache.",
        ),
        (
            {"optimizer": "sgd"},
            "{path}: Field 'optimizer' with value 'sgd' doesn't match any type in (typing.Literal['muon'], <class 'NoneType'>). "
            "Errors: Field 'optimizer' expected one of ('muon',), got sgd; Field 'optimizer' expected NoneType, got str (value: 'sgd').",
        ),
        (
            {"data": {"train": "d", "vision_cache": {"views": 2, "path": "p"}}},
            "unknown key in data.vision_cache: path. Known: folder, views.",
        ),
        (
            {"loss_weights": {"lm": 1, "kl": 2}},
            "unknown key in loss_weights: kl. Known: address_kl, align, distill, key, lm, match, memory_kl, reconstruction, scope.",
        ),
        ({"loss_weights": {"lm": 1, "distill": 1}}, "loss_weights.distill and distillation.teacher go together."),
        ({"distillation": {"teacher": "t"}}, "loss_weights.distill and distillation.teacher go together."),
        ({"distillation": {"student": "t"}}, "unknown key in distillation: student. Known: teacher, temperature."),
        ({"data": {"validation": "v"}}, "data has no 'train': the training data: paths, globs, hf:// addresses."),
        ({"trainable": 3}, "{path}: Field 'trainable' expected a list, got int."),
        (
            {"trainable": None},
            "{path} has no 'trainable': regular expressions on parameter names; a parameter trains when one matches.",
        ),
        ({"compile": ["a", 1]}, "{path}: Invalid item at index 1 in list 'compile'."),
        ({"data": "d"}, "data is a section of keys, got 'd'."),
        ({"data": {"train": "d", "stream": [3]}}, "data.stream is a section of keys, got [3]."),
        ({"calibration_rows": "many"}, "{path}: Field 'calibration_rows' expected int, got str (value: 'many')."),
        (
            {"data": {"train": "d", "augmentation": {"flip": 0.5}}},
            "unknown key in data.augmentation: flip. Known: color, degrees, scale, shift, style.",
        ),
        (
            {"loss_weights": {"lm": 1, "scope": 0.2, "key": 0.0, "memory_kl": 0.1}},
            "loss_weights: memory_kl, scope need data.episodes, which teach the memory.",
        ),
    ],
)
def test_unknown_keys_are_refused(changes, message, tmp_path):
    path = write_recipe(tmp_path, **changes)
    with pytest.raises(ValueError) as caught:
        load_recipe(path)
    assert str(caught.value) == message.format(path=path)


@pytest.mark.parametrize("key", ["model", "trainable", "data", "training"])
def test_missing_sections_are_named(key, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in MINIMAL.items() if k != key}))
    with pytest.raises(ValueError) as caught:
        load_recipe(str(path))
    (option,) = (option for option in fields(Recipe) if option.name == key)
    assert str(caught.value) == f"{path} has no {key!r}: {option.metadata['help']}."


def test_overrides(tmp_path):
    path = write_recipe(tmp_path)
    recipe = load_recipe(path)
    assert {key: to_dict(recipe)[key] for key in MINIMAL} == MINIMAL | {"data": to_dict(recipe.data)}
    assert recipe.loss_weights == {"lm": 1.0, "align": 0.0} and recipe.data.train == "d"
    recipe = load_recipe(
        path,
        [
            "training.max_steps=20",
            "training.output_dir=runs/a=b",
            "training.bf16=false",
            "training.lr_scheduler_kwargs.min_lr=1.0e-6",
            "trainable=[adapter, 'alignment']",
            "data.augmentation={degrees: 5}",
            "data.exclude_copyleft=yes",
            "data.validation=null",
            "calibration_rows=7",
            "training.eval_strategy=no",
        ],
    )
    assert recipe.training == {
        "output_dir": "runs/a=b",
        "max_steps": 20,
        "bf16": False,
        "lr_scheduler_kwargs": {"min_lr": 1e-6},
        "eval_strategy": "no",
    }
    assert recipe.trainable == ["adapter", "alignment"]
    assert recipe.data == DataConfig(train="d", augmentation={"degrees": 5}, exclude_copyleft=True)
    assert recipe.calibration_rows == 7
    with pytest.raises(ValueError, match="^--set takes key=value, got 'training.max_steps'.$"):
        load_recipe(path, ["training.max_steps"])
    with pytest.raises(ValueError, match="^unknown key in data: trian"):
        load_recipe(path, ["data.trian=x"])
    with pytest.raises(ValueError, match="^--set model.name: model is 'm', not a section.$"):
        load_recipe(path, ["model.name=x"])
    with pytest.raises(ValueError, match="^--set data.limit is not YAML: "):
        load_recipe(path, ["data.limit=["])
    with pytest.raises(ValueError, match="^unknown key in training: learning_rat. Known: "):
        load_recipe(path, ["training.learning_rat=0.1"])


@pytest.mark.parametrize(
    "text,message",
    [
        ("model: a\ndata: {train: x}\nmodel: b\n", "is not YAML: the key 'model' stands twice"),
        ("data: {train: x, train: y}\n", "is not YAML: the key 'train' stands twice"),
        ("- a\n", r"is no recipe: expected keys with values, got \['a'\].$"),
        ("", "is no recipe: expected keys with values, got None.$"),
    ],
)
def test_what_is_no_recipe_is_named(text, message, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"training": {"max_steps": "many"}}, "training: Field 'max_steps' expected int, got str (value: 'many')"),
        (
            {"training": {"learning_rate": "fast"}},
            "training: Field 'learning_rate' with value 'fast' doesn't match any",
        ),
        ({"training": {"seed": "x"}}, "training: Field 'seed' expected int, got str (value: 'x')"),
        ({"training": {"bf16": "yes"}}, "training: Field 'bf16' expected bool, got str (value: 'yes')"),
        ({"training": {"output_dir": 5}}, "training: Field 'output_dir' with value 5 doesn't match any type"),
        (
            {"training": {"gradient_accumulation_steps": 0}},
            "gradient_accumulation_steps is not positive.",
        ),
        ({"training": {1: 2}}, "{path}: Invalid key or value in dict 'training'."),
        ({"training": [1]}, "{path}: Field 'training' expected a dict, got list."),
        ({"loss_weights": {"lm": 0}}, "loss_weights has no weight above zero: nothing would train."),
        ({"quantization": {"load_in_4bit": "x"}}, "load_in_4bit must be a boolean"),
        ({1: 2}, "unknown key in {path}: 1. Known: "),
        ({"kind": ["distill"]}, "unknown key in {path}: kind. Known: "),
    ],
)
def test_values_of_another_type_are_named(changes, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | changes))
    with pytest.raises(ValueError) as caught:
        main([str(path)])
    assert str(caught.value).startswith(message.format(path=path))


def test_a_key_without_a_value_is_one_left_out(tmp_path):
    path = write_recipe(tmp_path, training={"output_dir": "o", "seed": None, "save_strategy": False, "max_steps": 1})
    assert load_recipe(path).training == {"output_dir": "o", "save_strategy": "no", "max_steps": 1}


@pytest.mark.parametrize(
    "text,message",
    [
        ("model: a\nmodel: b\n", "is not YAML: the key 'model' stands twice"),
        ("model: a\n", "has no 'trainable'"),
        ("a: [", "is not YAML"),
    ],
)
def test_the_script_ends_in_one_line_as_the_command_does(text, message, tmp_path, monkeypatch, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    said = []
    assert microvlm("train", path) == 1
    said.append(capsys.readouterr().err)
    monkeypatch.setattr(sys, "argv", ["train_hf.py", str(path)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "train_hf.py"), run_name="__main__")
    said.append(capsys.readouterr().err)
    assert stopped.value.code == 1 and said[0] == said[1]
    assert re.fullmatch(f"microvlm: {re.escape(str(path))} {message}.*\n", said[0])


def test_recipes_of_other_kinds_go_to_their_own_training(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(KINDS["distill"], "main", calls.append)
    path, out = ROOT / "recipes" / "nano" / "vision.yaml", str(tmp_path / "out")
    main([str(path), "--set", "style=0.2", "--set", f"training.output_dir={out}"])
    recipe = yaml.safe_load(path.read_text()) | {"style": 0.2}
    recipe["training"] |= {"output_dir": out, "learning_rate": 8e-4}
    assert calls == [recipe]
    with pytest.raises(ValueError, match="^unknown key in .*: kind. Known: "):
        main([write_recipe(tmp_path, kind="vision")])


def test_a_recipe_is_what_it_writes(tmp_path):
    for path in RECIPES.values():
        recipe = load_recipe(path)
        (tmp_path / "again.yaml").write_text(yaml.safe_dump(to_dict(recipe)))
        assert load_recipe(tmp_path / "again.yaml") == recipe
        assert load_recipe(path, ["data.limit=3"]) != recipe


def test_one_text_is_a_list_of_one(tmp_path):
    recipe = load_recipe(write_recipe(tmp_path), ["trainable=adapter", "compile=model.adapter"])
    assert recipe.trainable == ["adapter"] and recipe.compile == ["model.adapter"]


def test_overrides_of_dotted_names_leave_the_rest_of_a_section(tmp_path):
    config = toy_model(use_memory=True, memory_config={"num_slots": 16}).config
    rates = {r"layers\.1\.": 1e-3}
    path = write_recipe(tmp_path, config={"memory_config.code_size": 32}, learning_rates=rates)
    overrides = [
        "config.memory_config.observation_noise=0.02",
        "config.use_fusion=true",
        r"learning_rates.layers\.0\.=0.5",
    ]
    recipe = load_recipe(path, overrides)
    assert recipe.learning_rates == rates | {r"layers\.0\.": 0.5}
    changed = change_config(config, recipe.config)
    found, before = changed.memory_config, config.memory_config
    assert (found.code_size, found.observation_noise, found.num_slots) == (32, 0.02, 16) and changed.use_fusion
    assert before.num_slots != type(before)().num_slots
    for value in ({"code_size": 32}, None):
        with pytest.raises(ValueError) as error:
            change_config(config, {"memory_config": value})
        message = "config: memory_config is a section: name its values one by one, as memory_config.NAME."
        assert str(error.value) == message


def test_numbers_without_a_point_are_numbers(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(write_recipe(tmp_path) and yaml.safe_dump(MINIMAL) + "learning_rates: {adapter: 5e-4}\n")
    recipe = load_recipe(str(path), ["training.learning_rate=1e-4", "training.adam_epsilon=1E-8", "data.limit=10"])
    assert recipe.learning_rates == {"adapter": 5e-4}
    assert recipe.training == {"output_dir": "o", "learning_rate": 1e-4, "adam_epsilon": 1e-8}
    assert recipe.data.limit == 10 and isinstance(recipe.data.limit, int)


def recipe_model(name: str, recipe: Recipe) -> MicroVLMForConditionalGeneration:
    """The model a recipe trains, without its weights."""
    family = re.match("[a-z]+", name.replace("finetune", "nano"))[0]
    assert family in FAMILIES, f"{name} is of none of the families {', '.join(FAMILIES)}"
    config = MicroVLMConfig.from_json_file(str(ROOT / "configs" / f"microvlm-{family}.json"))
    if "135m" in name:  # the same around SmolLM2-135M
        text = {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
        text |= {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49153}
        adapter = config.adapter_config.to_dict() | {"num_attention_heads": 8}
        config = config.to_dict() | {"text_config": text, "image_token_id": 49152, "adapter_config": adapter}
        config = MicroVLMConfig.from_dict(config)
    with torch.device("meta"):
        return MicroVLMForConditionalGeneration(change_config(config, recipe.config))


def nf4(name: str) -> list[str]:
    """What the first lines of a recipe say to set for NF4."""
    return [
        option.replace("'", "")
        for option in re.findall(r"--set ((?:quantization|config)\S*(?: .*)?)", RECIPES[name].read_text())
    ]


@pytest.mark.parametrize(
    ("name", "quantized"), [*((name, False) for name in RECIPES), *((f"{name}/stage1", True) for name in "mv")]
)
def test_every_recipe_fits_its_model(name, quantized, tmp_path):
    recipe = load_recipe(RECIPES[name], nf4(name) if quantized else [])
    training = {"report_to": "none"} | recipe.training | {"output_dir": str(tmp_path)}
    TrainingArguments(**{k: v for k, v in training.items() if k not in ("bf16", "fp16")}, bf16=False, fp16=False)
    model = recipe_model(name, recipe)
    set_trainable(model, recipe.trainable)
    check_patterns("learning_rates", recipe.learning_rates, model)
    assert any(p.requires_grad for p in model.parameters())
    for pattern in recipe.learning_rates:
        trains = (p.requires_grad for n, p in model.named_parameters() if re.search(pattern, n))
        assert any(trains), f"{pattern} is frozen"
    assert (recipe.quantization is not None) == quantized
    if quantized:
        assert BitsAndBytesConfig(**recipe.quantization).quantization_method() == "nf4"
        skip = set(unquantized_modules(model, recipe.trainable))
        linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        for part, module in linear.items():
            assert (part in skip) >= module.weight.requires_grad, f"{part} trains in 4 bits"
        quantised = [n for n in linear if n not in skip]
        assert {n.split(".")[1] for n in quantised} == {"vision_tower", "language_model"}
    if episodes := recipe.data.episodes:
        assert recipe.training["per_device_train_batch_size"] % (episodes.size or episodes.groups) == 0
        assert model.config.use_memory
    assert recipe.training["output_dir"] == f"runs/{name}"


SEED_TRAINING = {  # of the source documents
    "per_device_train_batch_size": 10,
    "gradient_accumulation_steps": 2,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "weight_decay": 0.01,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr": 1e-6},
    "max_steps": 50_000,
    "bf16": True,
}


def test_the_seeds_numbers():
    m1, m2, v1, v2 = (load_recipe(RECIPES[name]) for name in ("m/stage1", "m/stage2", "v/stage1", "v/stage2"))
    for recipe in (m1, v1):
        assert {k: recipe.training[k] for k in SEED_TRAINING} == SEED_TRAINING
    for recipe in (m1, m2, v1, v2):
        assert recipe.data.limit == 110_002 and recipe.data.validation_limit == 5_789
        assert recipe.training["warmup_steps"] > 0
    assert m2.training["learning_rate"] == v2.training["learning_rate"] == 5e-5
    weights = {k: m1.loss_weights[k] for k in ("lm", "align", "reconstruction", "scope")}
    assert weights == {"lm": 1.0, "align": 0.5, "reconstruction": 0.1, "scope": 0.01}
    assert v1.loss_weights == {"lm": 1.0, "align": 1.0}
    weights = {k: v2.loss_weights[k] for k in ("lm", "align", "memory_kl", "address_kl")}
    assert weights == {"lm": 1.0, "align": 1.0, "memory_kl": 0.02, "address_kl": 0.005}
    assert v2.data.episodes.size == 4


def trains(name: str) -> dict[str, bool]:
    """Per parameter whether a recipe trains it."""
    recipe = load_recipe(str(ROOT / "recipes" / f"{name}.yaml"))
    model = recipe_model(name, recipe)
    set_trainable(model, recipe.trainable)
    return {name: (p.requires_grad, p.numel()) for name, p in model.named_parameters()}


def blocks(parameters: dict, prefix: str) -> set[int]:
    """Numbers of the layers under a prefix that train."""
    found = ((re.match(prefix + r"(\d+)\.", name), on) for name, (on, _) in parameters.items())
    return {int(match[1]) for match, on in found if match and on}


def test_what_the_seeds_freeze():
    parameters = trains("m/stage1")
    assert blocks(parameters, r"model\.vision_tower\.timm_model\.blocks\.") == {8, 9, 10, 11}
    assert blocks(parameters, r"model\.language_model\.layers\.") == {26, 27, 28, 29}
    words = parameters["model.language_model.embed_tokens.weight"][1]
    training, whole = sum(n for on, n in parameters.values() if on), sum(n for _, n in parameters.values())
    assert (
        0.13 < training / whole < 0.15 < training / (whole - words) < 0.20
    )  # the seed's 15 to 20 %, the vocabulary apart
    parameters = trains("v/stage1")
    assert {name.split(".")[1] for name, (on, _) in parameters.items() if on} == {"adapter", "alignment"}
    parameters = trains("v/stage2")
    assert blocks(parameters, r"model\.language_model\.layers\.") == {20, 21, 22, 23}
    assert not any(on for name, (on, _) in parameters.items() if "vision_tower" in name)
    assert blocks(trains("m/stage2"), r"model\.language_model\.layers\.") == {26, 27, 28, 29}


def test_stage_2_starts_where_a_stage_1_ends():
    recipes = {name: load_recipe(path) for name, path in RECIPES.items()}
    for name, start in (("m", "stage1"), ("v", "stage1"), ("v-135m", "stage1"), ("v-135m", "stage2")):
        after = {"stage1": "stage2", "stage2": "ternary"}[start]
        assert recipes[f"{name}/{after}"].model == recipes[f"{name}/{start}"].training["output_dir"]


# --- what trains


def test_set_trainable():
    model = toy_model()
    set_trainable(model, ["adapter", r"language_model\.layers\.1\."])
    for name, p in model.named_parameters():
        assert p.requires_grad == ("adapter" in name or "language_model.layers.1." in name), name
    with pytest.raises(ValueError, match="^trainable: 'adaptor' matches no parameter of the model.$"):
        set_trainable(model, ["adapter", "adaptor"])
    set_trainable(model, [".*"])
    assert all(p.requires_grad for p in model.parameters())


def test_trainable_table():
    model = toy_model()
    set_trainable(model, ["adapter", r"language_model\.layers\.1\."])
    lines = trainable_table(model).splitlines()
    assert lines[0].split() == ["part", "parameters", "trainable", "share"]
    table = {line.split()[0]: [int(n.replace(",", "")) for n in line.split()[1:3]] for line in lines[1:]}
    assert list(table)[-1] == "total"
    assert table["total"][0] == sum(p.numel() for p in model.parameters())
    assert table["total"][1] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    for i in range(2):
        assert sum(counts[i] for name, counts in table.items() if name != "total") == table["total"][i]
    assert table["model.adapter"] == [sum(p.numel() for p in model.model.adapter.parameters())] * 2
    assert table["model.vision_tower"][1] == 0 < table["model.vision_tower"][0]
    assert lines[-1].split()[-1] == f"{table['total'][1] / table['total'][0]:.1%}"


@pytest.mark.parametrize("text", ["qwen2", "bitnet"])
def test_frozen_parts_stay_bit_identical_and_trainable_ones_move(text, rows, tmp_path):
    model = toy_model(text)
    set_trainable(model, ["adapter", "alignment", r"language_model\.layers\.1\."])
    before = state(model)
    weights = {"lm": 1.0, "align": 1.0}
    toy_trainer(tmp_path, rows, model, weights, max_steps=3, optim="adamw_torch", weight_decay=0.1).train()
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    moved = {name for name, tensor in state(model).items() if not torch.equal(tensor, before[name])}
    assert moved <= trains  # buffers included
    # a bias of keys shifts all scores of a query alike: its gradient is zero
    assert all(name.endswith("k_proj.bias") for name in trains - moved), trains - moved


def test_learning_rates_make_groups(rows, tmp_path):
    model = toy_model()
    set_trainable(model, ["adapter", "language_model", "alignment"])
    rates = {r"adapter\.query_tokens": 0.5, "adapter": 0.25, "language_model": 0.125}
    trainer = toy_trainer(
        tmp_path, rows, model, trainer_kwargs={"learning_rates": rates}, weight_decay=0.03, optim="adamw_torch"
    )
    optimizer = trainer.create_optimizer()
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in optimizer.param_groups)
    assert len(found) == sum(p.requires_grad for p in model.parameters())
    for name, p in model.named_parameters():
        if not p.requires_grad:
            assert id(p) not in found
            continue
        rate = next((rate for part, rate in rates.items() if re.search(part, name)), 0.1)
        decay = 0.0 if name.endswith("bias") or "norm" in name else 0.03
        assert (found[id(p)]["lr"], found[id(p)]["weight_decay"]) == (rate, decay), name
    with pytest.raises(ValueError, match="^learning_rates: 'vision_towr' matches no parameter of the model.$"):
        toy_trainer(tmp_path, rows, model, trainer_kwargs={"learning_rates": {"vision_towr": 1.0}})


def test_muon_takes_the_weights_of_linear_layers(rows, tmp_path):
    model = toy_model("bitnet")
    set_trainable(model, ["adapter", "language_model", "alignment"])
    options = {"muon": True, "learning_rates": {"adapter": 0.25}}
    trainer = toy_trainer(tmp_path, rows, model, trainer_kwargs=options, weight_decay=0.03)
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, timm.optim.Muon)
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(found) == sum(p.requires_grad for p in model.parameters())
    for name, p in model.named_parameters():
        if p.requires_grad:
            linear = p.ndim == 2 and "embed_tokens" not in name and "query_tokens" not in name
            group = found[id(p)]
            assert group["use_fallback"] != linear, name
            assert group["lr"] == (0.25 if "adapter" in name else 0.1), name
            decay = 0.0 if name.endswith("bias") or "norm" in name else 0.03
            assert group["weight_decay"] == decay, name
    before = state(model)
    trainer.train()
    weight = "model.language_model.layers.0.self_attn.q_proj.weight"
    update = state(model)[weight] - before[weight] * (1 - 0.1 * 0.03)
    spread = torch.linalg.svdvals(update)
    assert spread[15] > 0.5 * spread[0]  # the gradient of four captions has rank 17; all of it moves alike


@pytest.mark.parametrize("muon", [True, False])
def test_the_lowest_rate_is_the_one_asked_for(muon, rows, tmp_path):
    """A part with a rate of its own falls to the same share of it."""
    options = {"muon": muon, "learning_rates": {"adapter": 0.5}}
    schedule = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 0.01}}
    trainer = toy_trainer(tmp_path, rows, trainer_kwargs=options, optim="adamw_torch", **schedule)
    trainer.create_optimizer_and_scheduler(5)
    for _ in range(5):
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert sorted(set(trainer.lr_scheduler.get_last_lr())) == pytest.approx([0.01, 0.05])


def test_a_rate_of_zero_keeps_a_part(rows, tmp_path):
    model = toy_model()
    before = state(model)
    toy_trainer(tmp_path, rows, model, trainer_kwargs={"learning_rates": {"adapter": 0.0}}).train()
    moved = {name for name, tensor in state(model).items() if not torch.equal(tensor, before[name])}
    assert moved and not any("adapter" in name for name in moved)


def test_calibrate_adapter(rows, tmp_path):
    model, processor = toy_model(), toy_processor()
    collator = CaptionCollator(processor, model.default_prompt(1)[0].tolist())
    bad = rows.add_column("text", [*CAPTIONS[:7], ""]).remove_columns("caption").rename_column("text", "caption")
    calibrate_adapter(model, collator, bad)  # one bad row does not end it
    rows = rows.select(range(7))
    with torch.no_grad():
        pixel_values = collator(list(rows))["pixel_values"]
        patches = model.model.vision_tower(pixel_values, do_pooling=False).last_hidden_state[:, 1:]
    assert patches.shape == (7, 16, 24)
    torch.testing.assert_close(model.model.adapter.patch_mean, patches.flatten(0, 1).mean(0))
    torch.testing.assert_close(model.model.adapter.patch_std, patches.flatten(0, 1).std(0))


# --- a frozen vision tower's features


def test_kept_features_train_like_the_pictures(rows, tmp_path):
    """The same loss and gradients as with the vision tower in the loop, up to the features' bfloat16."""
    model, processor = toy_model().train(), toy_processor()
    prompt = model.default_prompt(1)[0].tolist()
    plain = CaptionCollator(processor, prompt)
    features, kept = cache_vision_features(model.model.vision_tower, plain, rows, 1, str(tmp_path / "v"), "none")
    assert model.model.vision_tower.training
    trainer = toy_trainer(tmp_path, rows, model, {"lm": 1.0, "align": 0.5})
    batch, cached = plain(list(rows)), FeatureCollator(processor, prompt, features=features)(list(kept))
    model.eval()  # no dropout; compute_loss spares no logits then
    losses = [trainer.compute_loss(model, dict(inputs)) for inputs in (batch, cached)]
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-3, atol=0)
    weight = model.model.adapter.fc2.weight
    grads = [torch.autograd.grad(loss, weight)[0] for loss in losses]
    assert torch.cosine_similarity(*(g.flatten() for g in grads), dim=0) > 0.999


@pytest.mark.parametrize("labels", [[[-100, -100, 5, 6], [-100, -100, -100, 7]], [[-100] * 4] * 2, [[3, 4, 5, 6]] * 2])
def test_spared_logits_leave_the_loss(labels):
    model, labels = toy_model().eval(), torch.tensor(labels)
    ids = torch.randint(6, 20, labels.shape, generator=torch.Generator().manual_seed(0))
    whole = model(input_ids=ids, labels=labels)
    spared = model(input_ids=ids, labels=labels, **labelled_logits(labels))
    torch.testing.assert_close(spared.loss, whole.loss, equal_nan=True)
    if labels[0, 0] == -100 and labels[0, 2] == 5:
        torch.testing.assert_close(spared.logits, whole.logits[:, 1:])


# --- the loss


def test_trainer_counts_tokens_for_our_class(rows, tmp_path):
    """What accumulation rests on: forward takes loss kwargs, labels are shifted inside, num_items reaches the loss."""
    trainer = toy_trainer(tmp_path, rows)
    assert trainer.model_accepts_loss_kwargs and trainer._loss_shifts_labels
    assert trainer.args.report_to == []
    batch = trainer.data_collator(list(rows)[:4])
    mean, tokens = trainer.model(**batch).loss, int((batch["labels"] != -100).sum())
    torch.testing.assert_close(trainer.model(**batch, num_items_in_batch=2 * tokens).loss, mean / 2)


@pytest.mark.parametrize("batch_size,accumulation", [(4, 1), (2, 2)])
@pytest.mark.parametrize("weights", [{"lm": 1.0, "align": 0.0}, {"lm": 0.7, "align": 1.5}])
def test_step_equals_one_composed_by_hand(batch_size, accumulation, weights, rows, tmp_path):
    model = toy_model().train()
    collator = CaptionCollator(toy_processor(), model.default_prompt(1)[0].tolist())
    data = list(rows)[: batch_size * accumulation]
    batches = [collator(data[i : i + batch_size]) for i in range(0, len(data), batch_size)]
    loss, lm, align = by_hand(model, batches, weights)
    names, parameters = zip(*((name, p) for name, p in model.named_parameters()))
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)

    trained = toy_model()
    before = state(trained)
    trainer = toy_trainer(
        tmp_path,
        rows,
        trained,
        weights,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
    )
    trainer.train()
    after = state(trained)
    scale = max(g.abs().max() for g in grads if g is not None)
    for name, grad in zip(names, grads):
        moved = (before[name] - after[name]) / 0.1  # one step of SGD
        torch.testing.assert_close(
            moved, torch.zeros_like(moved) if grad is None else grad, rtol=1e-4, atol=1e-5 * scale
        )

    entry = trainer.state.log_history[0]
    assert entry["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert entry["lm_loss"] == pytest.approx(lm.item(), rel=1e-5)
    assert ("align_loss" in entry) == bool(weights["align"])
    if weights["align"]:
        assert entry["align_loss"] == pytest.approx(align.item(), rel=1e-5)


def test_both_passes_of_a_step_draw_the_same_dropout(rows, tmp_path, monkeypatch):
    adapter = {"vision_hidden_size": 24, "num_patches": 16, "num_prefix_tokens": 5, "mlp_hidden_size": 16}
    model = toy_model(adapter_config=adapter | {"num_attention_heads": 4, "dropout": 0.2})
    passes, alignment = [], Alignment.__call__

    def spy(self, step):
        live, first = embedded_pairs(step.outputs).detach(), step.pairs.first
        passes.append((live, step.pairs.pairs[first : first + len(live)]))
        return alignment(self, step)

    monkeypatch.setattr(Alignment, "__call__", spy)
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    toy_trainer(tmp_path, rows, model, {"lm": 1.0, "align": 1.0}, max_steps=2, **sizes).train()
    assert len(passes) == 4
    for live, first in passes:
        torch.testing.assert_close(live, first, rtol=1e-5, atol=1e-6)
    model.train()
    batch = CaptionCollator(toy_processor(), model.default_prompt(1)[0].tolist())(list(rows)[:2])
    one, two = (embedded_pairs(model(**batch, return_alignment=True)) for _ in range(2))
    assert not torch.allclose(one, two, atol=1e-2)  # it has dropout


def test_losses_that_would_do_nothing_are_refused(rows, tmp_path):
    with pytest.raises(
        ValueError, match="^training.label_smoothing_factor does not reach the losses here: leave it out.$"
    ):
        toy_trainer(tmp_path, rows, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="^loss_weights: match needs a model with config.use_fusion.$"):
        toy_trainer(tmp_path, rows, loss_weights={"lm": 1.0, "match": 0.5})
    toy_trainer(tmp_path, rows, toy_model(use_fusion=True), {"lm": 1.0, "match": 0.5})


def test_accumulated_weights_equal_those_of_one_batch(rows, tmp_path):
    """Micro-batches of unequal token counts: a mean of their means would be another loss."""
    collator = CaptionCollator(toy_processor(), toy_model().default_prompt(1)[0].tolist())
    counts = [int((collator(list(rows)[i : i + 2])["labels"] != -100).sum()) for i in range(0, 4, 2)]
    assert counts[0] != counts[1]
    models = []
    for batch_size, accumulation in ((4, 1), (2, 2), (1, 4)):
        models.append(toy_model())
        toy_trainer(
            tmp_path,
            rows,
            models[-1],
            max_steps=2,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
        ).train()
    for other in models[1:]:
        for (name, a), b in zip(models[0].named_parameters(), other.parameters()):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_logs_are_means_since_the_last_log_and_evaluation_is_apart(rows, tmp_path):
    weights = {"lm": 0.5, "align": 2.0}
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "per_device_eval_batch_size": 3,
        "num_train_epochs": 2,
    }
    evaluated = {"eval_dataset": rows.select(range(5))}  # the last batch is smaller
    histories = []
    for logging_steps in (1, 4):
        trainer = toy_trainer(
            tmp_path, rows, loss_weights=weights, trainer_kwargs=evaluated, logging_steps=logging_steps, **settings
        )
        trainer.train()
        histories.append(trainer.state.log_history)
    every, (last,) = ([e for e in h if "lm_loss" in e] for h in histories)
    assert [e["step"] for e in every] == [1, 2, 3, 4] and last[
        "step"
    ] == 4  # an evaluation in between takes nothing away
    for part in ("lm_loss", "align_loss", "loss"):
        assert last[part] == pytest.approx(sum(e[part] for e in every) / 4, rel=1e-5)
    for entry in [*every, last]:
        assert entry["loss"] == pytest.approx(0.5 * entry["lm_loss"] + 2.0 * entry["align_loss"], rel=1e-5)
        assert not any(key.startswith("eval_") for key in entry)
    for history in histories:
        evaluations = [e for e in history if "eval_loss" in e]
        assert [e["step"] for e in evaluations] == [2, 4]
        for e in evaluations:
            assert e["eval_loss"] == pytest.approx(0.5 * e["eval_lm_loss"] + 2.0 * e["eval_align_loss"], rel=1e-5)
            assert not {"lm_loss", "align_loss"} & set(e)


def test_evaluation_uses_its_own_collator(rows, tmp_path):
    model, processor = toy_model(), toy_processor()
    calls = []

    class Recording(CaptionCollator):
        def __call__(self, batch):
            calls.append((self, len(batch)))
            return super().__call__(batch)

    train, plain = (Recording(processor, model.default_prompt(1)[0].tolist()) for _ in range(2))
    trainer = toy_trainer(
        tmp_path, rows, model, trainer_kwargs={"eval_collator": plain, "eval_dataset": rows.select(range(3))}
    )
    trainer.data_collator = train
    trainer.train()
    assert calls and set(calls) == {(train, 4)}
    calls.clear()
    trainer.evaluate()
    assert calls == [(plain, 3)] and trainer.data_collator is train


def test_bf16_autocast_on_the_cpu(rows, tmp_path):
    model = toy_model()
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    weights = {"lm": 1.0, "align": 1.0}
    trainer = toy_trainer(tmp_path, rows, model, weights, bf16=True, max_steps=2)
    trainer.train()
    assert set(seen) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in model.parameters())
    reference = toy_trainer(tmp_path, rows, toy_model(), weights, max_steps=2)
    reference.train()
    for a, b in zip(trainer.state.log_history[:2], reference.state.log_history[:2]):
        assert a["lm_loss"] == pytest.approx(b["lm_loss"], rel=0.05)
        assert a["align_loss"] == pytest.approx(b["align_loss"], rel=0.1)


# --- 4 bits beside modules that train


def quantised_run(run: dict, tmp_path) -> dict:
    checkpoint = toy_checkpoint(tmp_path / "start4", text="llama")
    run |= {"model": str(checkpoint), "trainable": ["adapter", "alignment", r"language_model\.layers\.1\."]}
    run["quantization"] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    run["training"] |= {"max_steps": 4, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    return run


def test_training_beside_4_bits(run, tmp_path):
    """Evaluation before a step must not cost its gradients; what is quantised stays; the output opens as it is and
    goes on exactly."""
    run = quantised_run(run, tmp_path)
    recipe, out = write_recipe(tmp_path, **run), tmp_path / "out"
    main([recipe, "--set", "training.eval_on_start=true"])
    through = load_file(out / "model.safetensors")
    early = load_file(out / "checkpoint-2" / "model.safetensors")
    packed = {name for name, tensor in through.items() if tensor.dtype == torch.uint8 and "quant" not in name}
    layer = "model.language_model.layers.{}.self_attn.q_proj.weight"
    assert layer.format(0) in packed and layer.format(1) not in packed
    assert {name.split(".")[1] for name in packed} == {"language_model", "vision_tower"}
    moved = {name for name in through if not torch.equal(through[name], early[name])}
    assert not moved & packed
    named = ("adapter", "alignment", "language_model.layers.1.")
    expected = {
        n
        for n in through
        if any(part in n for part in named) and not n.endswith(("k_proj.bias", "patch_mean", "patch_std"))
    }
    assert moved - {"model.adapter.k_proj.bias"} == expected
    model = AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=True)
    assert model.is_quantized and model.config.quantization_config.bnb_4bit_quant_type == "nf4"
    plain = AutoModelForImageTextToText.from_pretrained(run["model"], trust_remote_code=True)
    assert f"{plain.num_parameters():,}" in trainable_table(model)  # two numbers in a byte are two
    shutil.rmtree(out / "checkpoint-4")
    main([recipe, "--set", "training.eval_on_start=true", "--resume"])
    assert same_state(load_file(out / "model.safetensors"), through)


def test_ternary_linears_are_not_quantised_again(run, tmp_path):
    checkpoint = toy_checkpoint(
        tmp_path / "ternary", text="bitnet", qat_config={"ternary_modules": [r"language_model\.layers\..*_proj"]}
    )
    run = quantised_run(run, tmp_path) | {"model": str(checkpoint)}
    with pytest.raises(ValueError) as error:
        main([write_recipe(tmp_path, **run)])
    assert str(error.value) == (
        "quantization: the config makes linears ternary, from weights that NF4 would change. Compose from ternary weights and set "
        "config: {qat_config.ternary_modules: null}."
    )


def test_4_bits_cannot_train(run, tmp_path):
    run = quantised_run(run, tmp_path)
    recipe = write_recipe(tmp_path, **run)
    main([recipe, "--set", "training.max_steps=2"])
    again = ["--set", f"model={tmp_path / 'out'}", "--set", f"training.output_dir={tmp_path / 'again'}"]
    with pytest.raises(ValueError, match=r"^trainable: model\.\S+ is quantised \(torch.uint8\) and cannot train.$"):
        main([recipe, *again, "--set", "trainable=['.*']", "--set", "quantization=null"])


# --- runs


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A recipe on the toy data and a checkpoint with dropout, written to `tmp_path`."""
    use_cache(monkeypatch, tmp_path / "cache")
    adapter = {"vision_hidden_size": 24, "num_patches": 16, "num_prefix_tokens": 5, "mlp_hidden_size": 16}
    adapter |= {"num_attention_heads": 4, "dropout": 0.2}
    return {
        "model": str(toy_checkpoint(tmp_path / "start", adapter_config=adapter)),
        "trainable": ["adapter", "language_model"],
        "learning_rates": {"adapter": 2.0e-3},
        "calibration_rows": 8,
        "loss_weights": {"lm": 1.0, "align": 0.5},
        "data": {
            "train": str(write_parquet(tmp_path / "train.parquet", pairs())),
            "validation": str(write_parquet(tmp_path / "validation.parquet", pairs(3))),
            "augmentation": {"degrees": 5, "shift": 0.05, "scale": 0.05, "color": 0.1},
        },
        "training": {
            "output_dir": str(tmp_path / "out"),
            "use_cpu": True,
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "learning_rate": 1.0e-3,
            "warmup_steps": 2,
            "logging_steps": 1,
            "save_steps": 3,
            "disable_tqdm": True,
        },
    }


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("share", [0.25, 0.75])
def test_rows_are_mixed_with_those_to_replay(share, cached, run, tmp_path):
    if cached:
        run["data"]["vision_cache"] = {"views": 1, "folder": str(tmp_path / "features")}
    old = [row | {"caption": f"Old {i}.", "source": "x"} for i, row in enumerate(pairs(8, source=["y"] * 8))]
    run["data"] |= {"replay": str(write_parquet(tmp_path / "old.parquet", old)), "replay_share": share}
    recipe = load_recipe(write_recipe(tmp_path, **run))
    parts = recipe, training_arguments(recipe), *load_model(recipe)
    data = TrainingData(*parts)
    rows = data.rows
    if cached:  # every image once
        assert data.collator.features.shape[1] == len(pairs()) + 8
        assert {row["feature_row"]: row["caption"] for row in rows} == dict(
            enumerate([*CAPTIONS, *(r["caption"] for r in old)])
        )
    assert set(rows["caption"]) == {*CAPTIONS, *(row["caption"] for row in old)}
    assert "source" not in rows.column_names  # which the new rows do not have
    found = sum(caption.startswith("Old ") for caption in rows["caption"]) / len(rows)
    assert abs(found - share) < 0.2 and rows["caption"][:] == TrainingData(*parts).rows["caption"][:]


def test_run_on_kept_features(run, tmp_path):
    run["trainable"] = ["adapter", "language_model"]
    run["optimizer"] = "muon"
    run["attn_implementation"] = "eager"
    run["data"]["vision_cache"] = {"views": 2, "folder": str(tmp_path / "features")}
    main([write_recipe(tmp_path, **run)])
    through = load_file(tmp_path / "out" / "model.safetensors")
    start = load_file(tmp_path / "start" / "model.safetensors")
    moved = {name for name in through if not torch.equal(through[name], start[name])}
    assert moved and not any("vision_tower" in name for name in moved)
    (file,) = (tmp_path / "features").glob("*.bin")
    written = file.stat().st_mtime_ns
    shutil.rmtree(tmp_path / "out" / "checkpoint-6")
    main([write_recipe(tmp_path, **run), "--resume"])
    assert file.stat().st_mtime_ns == written  # taken, not made again
    assert same_state(load_file(tmp_path / "out" / "model.safetensors"), through)
    run["trainable"] = [".*"]
    run["training"]["output_dir"] = str(tmp_path / "out2")
    message = "^data.vision_cache needs a frozen vision tower, but `trainable` matches its parameters.$"
    with pytest.raises(ValueError, match=message):
        main([write_recipe(tmp_path, **run)])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resume_continues_bit_for_bit(accumulation, run, tmp_path, capsys):
    out = tmp_path / "out"
    run["training"]["gradient_accumulation_steps"] = accumulation
    recipe = write_recipe(tmp_path, **run)
    main([recipe])
    assert "model.adapter" in capsys.readouterr().out
    through = load_file(out / "model.safetensors")
    log = json.loads((out / "log.json").read_text())

    checkpoint = out / "checkpoint-3"
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)  # a checkpoint is a model repo too
    assert type(processor).__name__ == "MicroVLMProcessor" and (checkpoint / "processing_microvlm.py").exists()
    assert not same_state(load_file(checkpoint / "model.safetensors"), through)
    written = (checkpoint / "model.safetensors").stat().st_mtime_ns
    shutil.rmtree(out / "checkpoint-6")
    (out / "model.safetensors").unlink()
    set_seed(999)
    main([recipe, "--resume"])
    assert (checkpoint / "model.safetensors").stat().st_mtime_ns == written  # it did not begin anew
    assert same_state(load_file(out / "model.safetensors"), through)
    again = json.loads((out / "log.json").read_text())
    parts = ("step", "epoch", "loss", "lm_loss", "align_loss", "learning_rate")
    steps = [[{k: e[k] for k in parts} for e in entries if "lm_loss" in e] for entries in (log, again)]
    assert steps[0] == steps[1] and len(steps[0]) == 6

    recipe, new = write_recipe(tmp_path, **run), tmp_path / "new"
    with pytest.raises(FileNotFoundError, match=f"^{new} has no complete checkpoint to go on from.$"):
        main([recipe, "--resume", "--set", f"training.output_dir={new}"])
    message = f"^{out} has checkpoints of a run: --resume goes on with it, or choose another output_dir.$"
    with pytest.raises(FileExistsError, match=message):
        main([recipe])


def test_what_a_resumed_run_cannot_change_is_refused(run, tmp_path):
    run["training"] |= {"max_steps": 2, "save_steps": 2, "seed": 1}
    run["calibration_rows"] = 0
    recipe, out = write_recipe(tmp_path, **run), tmp_path / "out"
    main([recipe])
    written = {name: (out / name).read_bytes() for name in ("recipe.yaml", "training_arguments.json", "log.json")}
    train, other = run["data"]["train"], str(write_parquet(tmp_path / "other.parquet", pairs(4)))
    changes = {
        f"data.train={other}": f"train {train!r}",
        "data.limit=5": "limit None",
        "training.seed=2": "seed 1",
        "training.learning_rate=0.5": "learning_rate 0.001",
        "learning_rates={adapter: 0.5}": "learning_rates {'adapter': 0.002}",
        "trainable=[adapter]": "trainable ['adapter', 'language_model']",
    }
    for change, before in changes.items():
        with pytest.raises(ValueError) as error:
            main([recipe, "--resume", "--set", change, "--set", "training.max_steps=3"])
        assert str(error.value).startswith(
            f"{out}/checkpoint-2 was written with {before}; a run goes on exactly with the"
        )
    assert {name: (out / name).read_bytes() for name in written} == written
    main([recipe, "--resume", "--set", "training.max_steps=3"])
    assert load_recipe(out / "recipe.yaml").training["max_steps"] == 3


def test_two_runs_do_not_share_a_folder(run, tmp_path):
    recipe, out = write_recipe(tmp_path, **run), tmp_path / "out"
    with locked(out), pytest.raises(OSError) as error:
        main([recipe])
    advice = "wait for it, or choose another output_dir."
    assert str(error.value) == f"{out} is of a run that still goes on: {advice}"
    assert [path.name for path in out.iterdir()] == [".lock"]
    with locked(out):  # free again
        pass


@pytest.mark.parametrize("missing", [100, 3000, 20000])  # torch sees no error in what it flushes at the end
def test_a_full_disk_is_named(missing, run, tmp_path, monkeypatch):
    """A limit on the sizes of files, as a disk that is full after so many bytes."""
    save, out = torch.save, tmp_path / "out"

    def full(values, path, *args, **kwargs):
        save(values, path, *args, **kwargs)
        if str(path).endswith("optimizer.pt"):
            limits, size = resource.getrlimit(resource.RLIMIT_FSIZE), os.path.getsize(path)
            os.remove(path)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size - missing, limits[1]))
            try:
                save(values, path, *args, **kwargs)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises((OSError, ValueError), match=f"{out}/checkpoint-3.*: the disk is full, or gone.$"):
        main([write_recipe(tmp_path, **run | {"calibration_rows": 0})])
    assert not (out / "checkpoint-3" / "complete.json").exists()


def test_what_no_loss_reaches_is_named(run, tmp_path, caplog):
    run |= {"loss_weights": {"lm": 1}, "trainable": ["adapter", "alignment"], "calibration_rows": 0}
    run["training"] |= {"max_steps": 2, "save_strategy": "no"}
    main([write_recipe(tmp_path, **run)])
    said = [r.getMessage() for r in caplog.records if "get no gradient" in r.getMessage()]
    assert said == [
        "8 trainable tensors get no gradient, such as model.alignment.image_norm.weight: leave them out of `trainable`, "
        "or give the loss that trains them a weight in `loss_weights`"
    ]


@pytest.mark.parametrize(
    "expression,message",
    [
        ("trainable=[adapter(]", "missing ), unterminated subpattern at position 7"),
        ("learning_rates={'adapter(': 1.0}", "missing ), unterminated subpattern at position 7"),
        ("compile=[model.nothing]", "compile: the model has no module 'model.nothing'."),
    ],
)
def test_what_is_no_regular_expression_or_module_is_one_line(expression, message, run, tmp_path, capsys):
    recipe = write_recipe(tmp_path, **run | {"calibration_rows": 0})
    assert microvlm("train", recipe, "--set", expression) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"microvlm: {message}"


@pytest.mark.parametrize("key", ["model", "distillation.teacher"])
def test_the_folder_it_starts_from_is_not_written_to(run, tmp_path, key):
    if key != "model":
        run |= {"distillation": {"teacher": run["model"]}, "loss_weights": {"distill": 1.0}, "model": "x"}
    (tmp_path / "link").symlink_to(tmp_path / "start")
    before = {path: path.read_bytes() for path in (tmp_path / "start").iterdir()}
    run["training"]["output_dir"] = str(tmp_path / "link")
    with pytest.raises(ValueError) as error:
        main([write_recipe(tmp_path, **run)])
    assert (
        str(error.value)
        == f"training.output_dir {tmp_path}/link is the folder of {key}, which the run would overwrite."
    )
    assert {path: path.read_bytes() for path in (tmp_path / "start").iterdir()} == before


def test_the_log_of_a_resumed_run_between_logging_steps(run, tmp_path):
    """Weights go on exactly; the first line after a checkpoint between two of them is the mean since the checkpoint."""
    run["training"] |= {"logging_steps": 2}
    recipe, out = write_recipe(tmp_path, **run), tmp_path / "out"
    main([recipe])
    through, log = load_file(out / "model.safetensors"), json.loads((out / "log.json").read_text())
    shutil.rmtree(out / "checkpoint-6")
    main([recipe, "--resume"])
    again = json.loads((out / "log.json").read_text())
    assert same_state(load_file(out / "model.safetensors"), through)
    losses = [{e["step"]: e["lm_loss"] for e in entries if "lm_loss" in e} for entries in (log, again)]
    assert [step for step in losses[0] if losses[0][step] != losses[1][step]] == [4]


@pytest.mark.parametrize("private", [None, True, False])
def test_who_may_see_the_repo_is_handed_on(private, rows, tmp_path, monkeypatch):
    given = []
    push = "microvlm.train.checkpoints.push_folder"
    monkeypatch.setattr(push, lambda folder, repo_id, private, *args: given.append(private))
    toy_trainer(tmp_path, rows, hub_private_repo=private)._push(tmp_path, "message")
    assert given == [private]


def hub_environment(folder: Path) -> dict[str, str]:
    return os.environ | {"HF_HOME": str(folder / "home"), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}


def test_command_line_run(run, tmp_path):
    rows = pairs()
    rows[2]["image"]["bytes"] = rows[2]["image"]["bytes"][:50]
    run["data"] |= {"train": str(write_parquet(tmp_path / "bad.parquet", rows)), "max_unreadable_share": 0.5}
    run["calibration_rows"] = 0
    run["trainable"] = ["adapter"]
    recipe = write_recipe(tmp_path, **run)
    command = [sys.executable, str(ROOT / "train_hf.py"), recipe, "--set", "training.max_steps=3"]
    for setting in ("per_device_train_batch_size=8", "bf16=true", "eval_strategy=steps", "eval_steps=3"):
        command += ["--set", f"training.{setting}"]
    command += ["--set", "training.dataloader_num_workers=1", "--set", "data.augmentation=null"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=hub_environment(tmp_path))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["part", "parameters", "trainable", "share"]
    assert lines[-2] == "3 of 24 training rows could not be read and were skipped"
    assert re.fullmatch(r"waiting for data: \d+\.\d% of the training time", lines[-1])
    assert "row toy-2: picture cannot be read" in done.stderr

    out = tmp_path / "out"
    for name in (
        "config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "modeling_microvlm.py",
        "configuration_microvlm.py",
        "processing_microvlm.py",
        "quantization_microvlm.py",
    ):
        assert (out / name).exists(), name
    assert load_recipe(str(out / "recipe.yaml")).training["max_steps"] == 3
    log = json.loads((out / "log.json").read_text())
    assert [e["step"] for e in log if "lm_loss" in e] == [1, 2, 3]
    assert {"eval_loss", "eval_lm_loss", "eval_align_loss"} <= set(log[-2])
    assert log[-1]["train_loss"] > 0

    processor = AutoProcessor.from_pretrained(out, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=True)
    start, end = load_file(tmp_path / "start" / "model.safetensors"), load_file(out / "model.safetensors")
    changed = {name for name in end if not torch.equal(start[name], end[name])}
    assert changed and all("adapter" in name for name in changed)
    assert model.dtype == torch.float32
    batch = CaptionCollator(processor, model.default_prompt(1)[0].tolist())(pairs(2))
    assert model.generate(pixel_values=batch["pixel_values"], max_new_tokens=3).shape[0] == 2


def test_plain_trainer_learns_captions_by_heart(rows, tmp_path):
    """No subclass, four pairs: the loss falls and free generation says the captions."""
    model, processor = toy_model(), toy_processor()
    collator = CaptionCollator(processor, model.default_prompt(1)[0].tolist())
    four = rows.select(range(4))
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, max_steps=60, optim="adamw_torch", learning_rate=5e-3, max_grad_norm=1.0),
        train_dataset=four,
        data_collator=collator,
        processing_class=processor,
    )
    trainer.train()
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    assert losses[-1] < 0.1 < 1 < losses[0]
    model.eval()
    out = model.generate(pixel_values=collator(list(four))["pixel_values"], max_new_tokens=12, do_sample=False)
    said = processor.batch_decode(out[:, len(collator.prompt_ids) :], skip_special_tokens=True)
    assert [s.strip() for s in said] == CAPTIONS[:4]
