"""Metrics against a count by hand, logs, the best checkpoint, and runs that teach the memory from pictures as
they come."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from test_train import hub_environment, rows, run, toy_trainer, write_recipe  # noqa: F401
from toy_data import pairs, same_state, toy_checkpoint, toy_model, toy_processor, write_parquet, write_tar
from transformers import AutoModelForImageTextToText, AutoProcessor

from microvlm.data.augment import gray_copy, image_augmentation
from microvlm.data.episodes import ImageEpisodeCollator
from microvlm.metrics import retrieval_recalls, scope_metrics, score
from microvlm.train.episodes import split_inputs
from train_hf import main

MEMORY = {"num_slots": 16, "code_size": 32, "key_hidden_size": 16, "max_content_tokens": 8, "scope_hidden_size": 16}


def unit(*shape, seed=0) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x / x.norm(dim=-1, keepdim=True)


# --- metrics


def recalls_by_hand(images, texts, k: int) -> tuple[float, float]:
    found = [0, 0]
    for i in range(len(images)):
        to_text = sorted(range(len(texts)), key=lambda j: -float(images[i] @ texts[j]))[:k]
        to_image = sorted(range(len(images)), key=lambda j: -float(texts[i] @ images[j]))[:k]
        found[0] += any(torch.equal(texts[j], texts[i]) for j in to_text)
        found[1] += any(torch.equal(texts[j], texts[i]) for j in to_image)
    return found[0] / len(images), found[1] / len(images)


def test_retrieval_recalls():
    images, noise = unit(23, 6), unit(23, 6, seed=1)
    texts = images + 0.8 * noise
    texts = texts / texts.norm(dim=-1, keepdim=True)
    texts[4] = texts[9]  # two pictures with one caption: either counts
    found = retrieval_recalls(images.float(), texts.float(), (1, 5, 10))
    assert len(found) == 6
    for k in (1, 5, 10):
        by_hand = recalls_by_hand(images.float(), texts.float(), k)
        assert found[f"image_to_text_recall_at_{k}"] == pytest.approx(by_hand[0])
        assert found[f"text_to_image_recall_at_{k}"] == pytest.approx(by_hand[1])
    assert found["image_to_text_recall_at_1"] < found["image_to_text_recall_at_10"]
    three = torch.tensor([[1, 0, 0], [0, 1, 0], [0.6, 0.6, 0.28**0.5]])
    twins = retrieval_recalls(three, three[[1, 1, 2]], (1,))  # the text of the first two shows the second
    assert twins == {"image_to_text_recall_at_1": pytest.approx(2 / 3), "text_to_image_recall_at_1": 1.0}
    perfect = retrieval_recalls(images, images)
    assert set(perfect.values()) == {1.0}


def test_scope_metrics():
    known = torch.tensor([True, True, True, False, False, False, False])
    probability = torch.tensor([0.9, 0.6, 0.3, 0.6, 0.4, 0.2, 0.1])
    found = scope_metrics(probability, known)
    assert found["scope_accuracy"] == pytest.approx((2 / 3 + 3 / 4) / 2)
    assert found["scope_auroc"] == pytest.approx((4 + 3.5 + 2) / 12)  # wins of 0.9, 0.6 (a tie), 0.3
    message = "^scope metrics need queries that were written and such that were not, got 2 and 0.$"
    with pytest.raises(ValueError, match=message):
        scope_metrics(probability[:2], known[:2])


# --- evaluation during a run


def test_evaluation_and_the_best_checkpoint(run, tmp_path):  # noqa: F811
    run["evaluation"] = {"captions": 2}
    run["training"] |= {
        "max_steps": 8,
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_total_limit": 2,
    }
    run["training"] |= {"metric_for_best_model": "eval_lm_loss", "greater_is_better": False, "learning_rate": 5e-2}
    run["training"] |= {"load_best_model_at_end": True}
    main([write_recipe(tmp_path, **run)])
    out = tmp_path / "out"
    log = json.loads((out / "log.json").read_text())
    evaluations = {e["step"]: e for e in log if "eval_loss" in e}
    assert sorted(evaluations) == [2, 4, 6, 8]
    for step, e in evaluations.items():
        assert e["eval_perplexity"] == pytest.approx(math.exp(e["eval_lm_loss"]))
        for way in ("image_to_text", "text_to_image"):
            recalls = [e[f"eval_{way}_recall_at_{k}"] for k in (1, 5, 10)]
            assert recalls == sorted(recalls) and recalls[-1] == 1.0  # of three pictures
        captions = json.loads((out / "captions" / f"step_{step}.json").read_text())
        assert len(captions) == 2
        scores = score([c["caption"] for c in captions], [c["reference"] for c in captions])
        assert {k: e[f"eval_caption_{k}"] for k in scores} == scores
    references = [[c["reference"] for c in json.loads(p.read_text())] for p in sorted((out / "captions").iterdir())]
    assert all(r == references[0] for r in references)  # the same pictures every time
    best = min(evaluations, key=lambda step: evaluations[step]["eval_lm_loss"])
    kept = {p.name for p in out.glob("checkpoint-*")}
    assert kept == {f"checkpoint-{best}", "checkpoint-8" if best != 8 else "checkpoint-6"}
    weights = load_file(out / f"checkpoint-{best}" / "model.safetensors")
    assert same_state(load_file(out / "model.safetensors"), weights)


def test_captioned_pictures_are_some_that_can_be_read(run, tmp_path):  # noqa: F811
    broken = pairs(3)
    for row in broken[:2]:
        row["image"]["bytes"] = row["image"]["bytes"][:50]
    run["data"]["validation"] = str(write_parquet(tmp_path / "broken.parquet", broken))
    run["data"]["max_unreadable_share"] = 1.0
    run["evaluation"] = {"captions": 2}
    run["training"] |= {"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    main([write_recipe(tmp_path, **run)])
    captions = json.loads((tmp_path / "out" / "captions" / "step_1.json").read_text())
    assert [c["reference"] for c in captions] == [broken[2]["caption"]]
    run["data"]["validation"] = str(write_parquet(tmp_path / "none.parquet", broken[:2]))
    run["training"]["output_dir"] = str(tmp_path / "none")
    with pytest.raises(ValueError, match="^evaluation.captions: none of the 2 validation rows can be read.$"):
        main([write_recipe(tmp_path, **run)])


def test_evaluation_beside_groups_of_similar_length(run, tmp_path):  # noqa: F811
    run["training"] |= {"max_steps": 1, "train_sampling_strategy": "group_by_length", "eval_on_start": True}
    main([write_recipe(tmp_path, **run)])
    assert "eval_lm_loss" in json.loads((tmp_path / "out" / "log.json").read_text())[0]


def test_evaluation_leaves_the_training_alone(run, tmp_path):  # noqa: F811
    run["evaluation"] = {"captions": 2}
    outputs = []
    for name, more in (("with", ["training.eval_strategy=steps", "training.eval_steps=1"]), ("without", [])):
        options = [f"training.output_dir={tmp_path / name}", *more]
        main([write_recipe(tmp_path, **run), *(x for o in options for x in ("--set", o))])
        outputs.append(load_file(tmp_path / name / "model.safetensors"))
    assert same_state(*outputs)


def test_tensorboard_gets_every_part(run, tmp_path, monkeypatch):  # noqa: F811
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    run["training"] |= {"report_to": "tensorboard", "max_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    main([write_recipe(tmp_path, **run)])
    (file,) = (tmp_path / "events").rglob("*tfevents*")
    events = EventAccumulator(str(file.parent))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/lm_loss", "train/align_loss", "train/data_wait", "eval/perplexity"} <= tags
    assert "eval/image_to_text_recall_at_5" in tags
    log = json.loads((tmp_path / "out" / "log.json").read_text())
    logged = [e["lm_loss"] for e in log if "lm_loss" in e]
    assert [event.value for event in events.Scalars("train/lm_loss")] == pytest.approx(logged)


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_other_trackers_run_offline(tracker, run, tmp_path):  # noqa: F811
    pytest.importorskip(tracker)
    run["training"] |= {"report_to": tracker, "max_steps": 2, "run_name": "toy"}
    env = hub_environment(tmp_path) | {
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(tmp_path),
        "TRACKIO_DIR": str(tmp_path),
    }
    command = [sys.executable, str(ROOT / "train_hf.py"), write_recipe(tmp_path, **run)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    found = list(tmp_path.rglob("*.wandb" if tracker == "wandb" else "*.db"))
    assert found and found[0].stat().st_size > 0


# --- the memory, taught by pictures as they come


@pytest.fixture
def memory_run(run, tmp_path):  # noqa: F811
    shards = tmp_path / "shards"
    shards.mkdir()
    for shard in range(2):
        write_tar(shards / f"{shard}.tar", [row | {"id": f"{shard}-{row['id']}"} for row in pairs()])
    run["model"] = str(toy_checkpoint(tmp_path / "start_memory"))
    run["config"] = {"use_memory": True} | {f"memory_config.{k}": v for k, v in MEMORY.items()}
    run["trainable"] = ["adapter", "memory", "scope", r"language_model\.layers\.1\."]
    run["loss_weights"] = {"lm": 1.0, "align": 1.0, "memory_kl": 0.02, "address_kl": 0.005}
    run["loss_weights"] |= {"reconstruction": 0.5, "scope": 0.2, "key": 0.3}
    run["data"] |= {"train": str(shards / "*.tar"), "stream": {"shuffle_buffer": 4}, "episodes": {"size": 4}}
    run["data"]["validation"] = run["data"]["train"]
    run["evaluation"] = {"memory": 2}
    run["training"] |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 6}
    run["training"] |= {"eval_strategy": "steps", "eval_steps": 3}
    return run


@torch.no_grad()
def test_picture_episodes_become_features_of_the_vision_tower(tmp_path, rows):  # noqa: F811
    model = toy_model(use_memory=True, memory_config=MEMORY)
    prompt, augment = model.default_prompt(1)[0].tolist(), image_augmentation()
    collator = ImageEpisodeCollator(toy_processor(), prompt, augment, size=2, max_tokens=8)
    batch = collator(list(rows.select(range(4))))
    inputs, episode = split_inputs(model, batch)
    of = lambda pixels: model.model.vision_tower(pixels, do_pooling=False).last_hidden_state  # noqa: E731
    pool = lambda pixels: model.model.memory.key_encoder.pool(of(pixels), 1)  # noqa: E731
    queries, written = batch["pixel_values"], batch["support_pixel_values"]
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # noqa: E731
    close(inputs["mm_encoder_outputs"]["image"].last_hidden_state, of(queries))
    close(episode.vision_features, of(queries))
    views = [pool(written), pool(gray_copy(written))]
    close(episode.support_features, torch.stack(views, 1).unflatten(0, (2, 2)))
    close(episode.key_features, torch.stack([views[0], pool(queries), views[1]]))
    assert not torch.allclose(pool(written), pool(queries))


def test_episodes_of_a_stream(memory_run, tmp_path):
    recipe, out = write_recipe(tmp_path, **memory_run), tmp_path / "out"
    main([recipe])
    through = load_file(out / "model.safetensors")
    log = json.loads((out / "log.json").read_text())
    steps = [e for e in log if "lm_loss" in e]
    parts = ("lm", "align", "memory_kl", "address_kl", "reconstruction", "scope", "key")
    weights = memory_run["loss_weights"]
    for e in steps:
        total = sum(weights[part] * e[f"{part}_loss"] for part in parts)
        assert e["loss"] == pytest.approx(total, rel=1e-4)
    evaluations = [e for e in log if "eval_loss" in e]
    names = {f"eval_{part}_loss" for part in parts} | {
        "eval_scope_accuracy",
        "eval_scope_auroc",
        "eval_episode_lm_loss",
    }
    assert names <= set(evaluations[0])
    start = load_file(tmp_path / "start_memory" / "model.safetensors")
    for name, tensor in start.items():
        if "vision_tower" in name or "layers.0." in name or "embed_tokens" in name:
            assert torch.equal(through[name], tensor), name
    moved = ("memory.key_encoder.image_fc1", "memory.content", "memory_projection", "scope", "layers.1.", "adapter.fc1")
    early = load_file(out / "checkpoint-3" / "model.safetensors")
    for part in moved:
        assert any(part in n and not torch.equal(through[n], early[n]) for n in through), part
    assert not torch.equal(through["model.memory.key_encoder.feature_mean"], torch.zeros(48))
    (out / "model.safetensors").unlink()

    shutil.rmtree(out / "checkpoint-6")
    main([recipe, "--resume"])
    assert same_state(load_file(out / "model.safetensors"), through)
    again = [e for e in json.loads((out / "log.json").read_text()) if "eval_loss" in e]
    timings = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    drop = lambda e: {k: v for k, v in e.items() if k not in timings}  # noqa: E731
    assert drop(again[-1]) == drop(evaluations[-1])  # the same episodes, drawn alike

    model = AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(out, trust_remote_code=True)
    pixel_values = processor.image_processor([torch.zeros(3, 32, 32, dtype=torch.uint8)], return_tensors="pt")[
        "pixel_values"
    ]
    prompt = model.default_prompt(1)
    words = torch.tensor([[*prompt[0].tolist(), 7, 9]])
    memory = model.write_memory(input_ids=words, pixel_values=pixel_values)
    out = model.generate(input_ids=prompt, pixel_values=pixel_values, memory=memory, max_new_tokens=2)
    assert out.shape[1] <= prompt.shape[1] + 2


def test_episode_recipes_say_what_is_wrong(memory_run, tmp_path):
    for change, message in (
        ("training.per_device_train_batch_size=6", "a batch of 6 does not divide into episodes of 4."),
        (
            "data.vision_cache={views: 1, folder: x}",
            "data.vision_cache stores features of a data set, data.stream stores nothing: choose one.",
        ),
        ("data.exclude_copyleft=true", "data.exclude_copyleft needs all rows at once: not with data.stream."),
        ("data.stream={buffer: 3}", "unknown key in data.stream: buffer. Known: shuffle_buffer."),
        ("evaluation={caption: 3}", "unknown key in evaluation: caption. Known: captions, memory."),
        (
            "data.episodes={groups: 2}",
            "data.episodes needs data.vision_cache, or a size: episodes of images as they come.",
        ),
    ):
        with pytest.raises(ValueError) as error:
            main([write_recipe(tmp_path, **memory_run), "--set", change])
        assert str(error.value) == message
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert os.listdir(tmp_path).count("x") == 0
