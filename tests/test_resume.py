"""A run that is killed, stopped or interrupted while it writes goes on bit for bit; a loss that is not finite changes
nothing."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from test_train import hub_environment, run, state, toy_trainer, write_recipe  # noqa: F401
from toy_data import pairs, same_state, toy_model, toy_processor, use_cache, write_parquet, write_tar

from microvlm.data.collators import CaptionCollator
from microvlm.data.rows import load_rows
from microvlm.train.checkpoints import (
    MARKER,
    checkpoints,
    is_complete,
    mark_complete,
    newest_complete,
    remove_checkpoint,
    rotate_checkpoints,
)
from microvlm.train.trainer import MicroVLMTrainer
from train_hf import main

STEPS = 24


@pytest.fixture
def stream_run(run, tmp_path):  # noqa: F811
    """The run on a stream of three tars, with two readers, augmentation and dropout, a checkpoint every fourth step."""
    shards = tmp_path / "shards"
    shards.mkdir()
    for shard in range(3):
        write_tar(shards / f"{shard}.tar", [row | {"id": f"{shard}-{row['id']}"} for row in pairs(8 - shard)])
    run["data"] |= {"train": str(shards / "*.tar"), "stream": {"shuffle_buffer": 3}}
    del run["data"]["validation"]
    run["training"] |= {"max_steps": STEPS, "save_steps": 4, "save_total_limit": 2, "dataloader_num_workers": 2}
    run["training"] |= {"gradient_accumulation_steps": 2}
    return run


def start(recipe: str, folder: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train_hf.py"), recipe, *options]
    log = (folder / "victim.log").open("a")
    return subprocess.Popen(
        command, cwd=folder, stdout=log, stderr=log, env=hub_environment(folder), start_new_session=True
    )


def wait_for(process: subprocess.Popen, what) -> bool:
    """Until `what()` holds, looked at every millisecond; False if the process ended before."""
    while process.poll() is None:
        if what():
            return True
        time.sleep(0.001)
    return False


def complete(out: Path) -> list[int]:
    return [int(c.name.rpartition("-")[2]) for c in checkpoints(out) if is_complete(c)]


def test_killed_at_random_points_ends_with_the_same_weights(stream_run, tmp_path):
    reference = tmp_path / "reference"
    main([write_recipe(tmp_path, "reference.yaml", **stream_run), "--set", f"training.output_dir={reference}"])
    recipe, out, draw = write_recipe(tmp_path, **stream_run), tmp_path / "out", random.Random(os.urandom(8))
    interrupted_write = False
    for attempt in range(3):
        done = complete(out)
        process = start(recipe, tmp_path, *(["--resume"] if done else []))
        try:
            if attempt % 2 == 0:  # while a checkpoint is being written
                known = {c.name for c in checkpoints(out)}
                new = lambda known=known: [c for c in checkpoints(out) if c.name not in known]  # noqa: E731
                assert wait_for(process, new), (tmp_path / "victim.log").read_text()
            else:  # at any time after the next checkpoint
                assert wait_for(process, lambda done=done: complete(out) != done), (tmp_path / "victim.log").read_text()
                time.sleep(draw.uniform(0, 0.4))
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        interrupted_write |= any(not is_complete(c) for c in checkpoints(out))
        assert not (out / "model.safetensors").exists(), "it ended before it could be killed: more STEPS are needed"
    assert interrupted_write
    before = complete(out)
    process = start(recipe, tmp_path, *(["--resume"] if before else []))
    assert process.wait(timeout=240) == 0, (tmp_path / "victim.log").read_text()
    log = (tmp_path / "victim.log").read_text()
    assert "is incomplete: the one before it is used" in log
    assert same_state(load_file(out / "model.safetensors"), load_file(reference / "model.safetensors"))
    optimizers = [torch.load(f / f"checkpoint-{STEPS}" / "optimizer.pt")["state"] for f in (out, reference)]
    for index, entry in optimizers[1].items():
        for name, value in entry.items():
            assert torch.equal(optimizers[0][index][name], value), (index, name)
    parts = ("step", "epoch", "loss", "lm_loss", "align_loss", "learning_rate")
    histories = [json.loads((f / "log.json").read_text()) for f in (out, reference)]
    steps = [[{k: e[k] for k in parts} for e in history if "lm_loss" in e] for history in histories]
    assert steps[0] == steps[1] and len(steps[0]) == STEPS
    assert complete(out) == [STEPS - 4, STEPS]  # what was interrupted is gone


def test_sigterm_saves_and_stops(stream_run, tmp_path, monkeypatch, capsys):
    stream_run["training"]["dataloader_num_workers"] = 0
    recipe, out = write_recipe(tmp_path, **stream_run), tmp_path / "out"
    whole = tmp_path / "whole"
    main([recipe, "--set", f"training.output_dir={whole}"])
    calls, step = [], MicroVLMTrainer.training_step

    def terminated(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 13:  # in the first micro-batch of step 7
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(MicroVLMTrainer, "training_step", terminated)
    with pytest.raises(SystemExit) as stopped:
        main([recipe])
    assert stopped.value.code == 143 and len(calls) == 14 and complete(out) == [4, 7]
    assert "stopped by SIGTERM at step 7: --resume goes on from there" in capsys.readouterr().out
    assert not (out / "model.safetensors").exists() and signal.getsignal(signal.SIGTERM) == handler
    main([recipe, "--resume"])
    assert len(calls) == 2 * STEPS
    assert same_state(load_file(out / "model.safetensors"), load_file(whole / "model.safetensors"))


def test_ends_before_the_first_log(stream_run, tmp_path, monkeypatch, capsys):
    stream_run["training"] |= {"max_steps": 2, "logging_steps": 3, "dataloader_num_workers": 0}
    recipe, out = write_recipe(tmp_path, **stream_run), tmp_path / "out"
    step = MicroVLMTrainer.training_step

    def terminated(self, *args, **kwargs):
        if self.state.global_step == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(MicroVLMTrainer, "training_step", terminated)
        with pytest.raises(SystemExit) as stopped:
            main([recipe])
    assert stopped.value.code == 143 and complete(out) == [1]
    assert "stopped by SIGTERM at step 1: --resume goes on from there" in capsys.readouterr().out
    main([recipe, "--resume"])
    assert (out / "model.safetensors").exists()


def test_other_readers_are_refused(stream_run, tmp_path):
    stream_run["training"] |= {"max_steps": 4, "dataloader_num_workers": 0}
    recipe = write_recipe(tmp_path, **stream_run)
    main([recipe])
    with pytest.raises(ValueError) as error:
        main([recipe, "--resume", "--set", "training.dataloader_num_workers=2"])
    assert str(error.value) == (
        f"{tmp_path}/out/checkpoint-4 was written with dataloader_num_workers 0; a stream goes on exactly with the same "
        "only, not with 2."
    )


def test_another_order_of_rows_is_refused(stream_run, tmp_path):
    stream_run["training"] |= {"max_steps": 4, "dataloader_num_workers": 0, "seed": 1}
    recipe = write_recipe(tmp_path, **stream_run)
    main([recipe])
    changes = [
        ("data.stream.shuffle_buffer=4", "shuffle_buffer 3", "4"),
        ("training.train_sampling_strategy=group_by_length", "group_size 1", "4"),
    ]
    (tmp_path / "shards" / "3.tar").write_bytes((tmp_path / "shards" / "2.tar").read_bytes())
    changes.append(("data.stream.shuffle_buffer=3", "num_shards 3", "4"))
    for change, written, now in changes:
        with pytest.raises(ValueError) as error:
            main([recipe, "--resume", "--set", change])
        assert str(error.value) == (
            f"{tmp_path}/out/checkpoint-4 was written with {written}; a stream goes on exactly with the same only, not with {now}."
        )


# --- complete and incomplete checkpoints


def fake_checkpoint(folder: Path, step: int, finished: bool = True) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(b"x" * 100)
    (checkpoint / "optimizer.pt").write_bytes(b"y" * 50)
    if finished:
        mark_complete(checkpoint)
    return checkpoint


def test_what_counts_as_complete(tmp_path):
    first, second = fake_checkpoint(tmp_path, 5), fake_checkpoint(tmp_path, 10)
    (tmp_path / "checkpoint-best").mkdir()
    assert checkpoints(tmp_path) == [first, second] and newest_complete(tmp_path) == second
    (second / "optimizer.pt").write_bytes(b"y" * 49)
    assert not is_complete(second) and newest_complete(tmp_path) == first
    (first / "model.safetensors").unlink()
    assert not is_complete(first)
    with pytest.raises(FileNotFoundError, match=f"^{tmp_path} has no complete checkpoint to go on from.$"):
        newest_complete(tmp_path)
    assert not is_complete(fake_checkpoint(tmp_path, 15, finished=False))


@pytest.mark.parametrize("content", [b"", b'{"files": {"model', b"\x00" * 80, b"\xff"])
def test_a_damaged_marker_is_none(tmp_path, content):
    first, second = fake_checkpoint(tmp_path, 5), fake_checkpoint(tmp_path, 10)
    (second / MARKER).write_bytes(content)
    assert not is_complete(second) and newest_complete(tmp_path) == first


def test_a_removal_cut_short_leaves_nothing_that_passes(tmp_path, monkeypatch):
    checkpoint = fake_checkpoint(tmp_path, 5)

    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        remove_checkpoint(checkpoint)
    assert (checkpoint / "model.safetensors").exists() and not is_complete(checkpoint)


@pytest.mark.parametrize(
    "keep,best,left",
    [(2, None, [20, 25]), (2, "checkpoint-5", [5, 25]), (1, "checkpoint-5", [5, 25]), (2, "checkpoint-25", [20, 25])],
)
def test_rotation_keeps_the_newest_complete_ones_and_the_best(tmp_path, keep, best, left):
    for step in (5, 10, 20, 25):
        fake_checkpoint(tmp_path, step)
    fake_checkpoint(tmp_path, 15, finished=False)
    (tmp_path / "checkpoint-5-mine").mkdir()  # no checkpoint of ours
    rotate_checkpoints(tmp_path, None)
    assert len(checkpoints(tmp_path)) == 5
    rotate_checkpoints(tmp_path, keep, None if best is None else str(tmp_path / best))
    assert [c.name for c in checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in left]
    assert (tmp_path / "checkpoint-5-mine").is_dir()


def test_the_marker_is_written_last_and_lists_everything(run, tmp_path):  # noqa: F811
    main([write_recipe(tmp_path, **run)])
    checkpoint = tmp_path / "out" / "checkpoint-6"
    listed = json.loads((checkpoint / MARKER).read_text())["files"]
    found = {str(p.relative_to(checkpoint)): p.stat().st_size for p in checkpoint.rglob("*") if p.name != MARKER}
    assert listed == found
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= set(found)
    newest = max(p.stat().st_mtime_ns for p in checkpoint.rglob("*") if p.name != MARKER)
    assert (checkpoint / MARKER).stat().st_mtime_ns >= newest


# --- a loss that is not finite


class Poisoned(CaptionCollator):
    """One picture is not a number."""

    def __call__(self, rows):
        batch = super().__call__(rows)
        for i, row in enumerate(rows):
            if row["id"] in ("toy-2", "toy-5"):
                batch["pixel_values"][i] = torch.nan
        return batch


@pytest.fixture
def poisoned(monkeypatch, tmp_path):
    use_cache(monkeypatch, tmp_path / "cache")
    rows = load_rows(str(write_parquet(tmp_path / "toy.parquet", pairs())))

    def build(**kwargs):
        trainer_kwargs = kwargs.pop("trainer_kwargs", {})
        model = toy_model()
        settings = {"max_steps": 4, "per_device_train_batch_size": 2, "optim": "adamw_torch", "weight_decay": 0.1}
        trainer = toy_trainer(tmp_path, rows, model, trainer_kwargs=trainer_kwargs, **settings | kwargs)
        trainer.data_collator = Poisoned(toy_processor(), model.default_prompt(1)[0].tolist())
        return trainer

    return build


def test_a_step_without_a_finite_loss_changes_nothing(poisoned, caplog):
    trainer, states, step = poisoned(), [], MicroVLMTrainer.training_step

    def spy(model, inputs, *args, **kwargs):
        states.append(state(trainer.model))
        return step(trainer, model, inputs, *args, **kwargs)

    trainer.training_step = spy
    trainer.train()
    states.append(state(trainer.model))
    changed = [not same_state(a, b) for a, b in zip(states, states[1:])]
    assert changed == [True, False, False, True]  # rows 0 1, 2 3, 4 5, 6 7
    assert all(torch.isfinite(t).all() for t in states[-1].values())
    assert "the loss of step 2 is not finite: rows toy-2, toy-3" in caplog.text
    assert "the loss of step 3 is not finite: rows toy-4, toy-5" in caplog.text
    losses = [e["lm_loss"] for e in trainer.state.log_history if "lm_loss" in e]
    assert len(losses) == 2 and all(loss == loss for loss in losses)  # logged where there was one


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_changes_nothing(tmp_path, monkeypatch, caplog, clip):
    """Though the loss is; the checkpoint before stays, and the run goes on."""
    use_cache(monkeypatch, tmp_path / "cache")
    rows = load_rows(str(write_parquet(tmp_path / "toy.parquet", pairs())))
    model, calls, states = toy_model(), [], []

    def overflow(gradient):
        calls.append(1)
        return gradient * torch.inf if len(calls) in (3, 4) else gradient  # both micro-batches of step 2

    model.model.adapter.q_proj.weight.register_hook(overflow)
    sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 3, "max_grad_norm": clip}
    saves = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "optim": "adamw_torch"}
    trainer = toy_trainer(tmp_path, rows, model, **sizes, **saves)
    saved = MicroVLMTrainer._save_checkpoint

    def spy(model, trial):
        states.append(state(trainer.model))
        saved(trainer, model, trial)
        assert all(torch.isfinite(t).all() for t in states[-1].values())
        names.append([c.name for c in checkpoints(tmp_path / "out")])

    names, trainer._save_checkpoint = [], spy
    trainer.train()
    assert same_state(states[0], states[1]) and not same_state(states[1], states[2])
    assert names == [["checkpoint-1"], ["checkpoint-1"], ["checkpoint-3"]]
    assert "the gradient of step 2 is not finite: rows toy-2, toy-3" in caplog.text
    assert "no checkpoint at step 2, which was not finite" in caplog.text


def test_too_many_of_them_end_the_run_and_are_named(poisoned):
    trainer = poisoned(trainer_kwargs={"max_nonfinite_steps": 2})
    with pytest.raises(RuntimeError) as error:
        trainer.train()
    assert str(error.value) == (
        "the loss of step 3 is not finite, nor were those of the 1 steps before it: stopped. Rows: toy-4, toy-5."
    )
    assert trainer.state.global_step == 2


def test_rows_of_every_bad_micro_batch_are_named(poisoned):
    trainer = poisoned(
        trainer_kwargs={"max_nonfinite_steps": 1}, per_device_train_batch_size=1, gradient_accumulation_steps=8
    )
    with pytest.raises(RuntimeError, match=r"^the loss of step 1 is not finite.* Rows: toy-2, toy-5.$"):
        trainer.train()
