"""Two ranks as real processes: the same step as one process, an orderly stop, disjoint streams, the same evaluation."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from conftest import ROOT
from safetensors.torch import load_file
from toy_data import pairs, same_state, toy_checkpoint, toy_model, toy_processor, use_cache, write_parquet, write_tar
from transformers import AutoModelForImageTextToText

from microvlm.data.collators import CaptionCollator
from microvlm.train.checkpoints import checkpoints, is_complete, newest_complete
from train_hf import STOPPED, main

CONFIGS = sorted(ROOT.glob("recipes/accelerate/*.yaml"))
MEMORY = {"num_slots": 16, "code_size": 32, "num_memory_tokens": 4, "num_content_slots": 4}
MEMORY |= {
    "max_content_tokens": 16,
    "max_items": 64,
    "key_hidden_size": 32,
    "scope_hidden_size": 16,
    "key_dropout": 0.0,
}
SGD = {"optim": "sgd", "learning_rate": 0.02, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
SGD |= {"train_sampling_strategy": "sequential", "save_strategy": "no", "max_steps": 2}


def environment(folder: Path) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    more = {"HF_HOME": str(folder / "home"), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": path}
    return os.environ | {"OMP_NUM_THREADS": "1"} | more


def launch(folder: Path, *command: str, **kwargs) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, command)], cwd=folder, env=environment(folder), **pipes | kwargs
    )


def torchrun(folder: Path, *command, **kwargs) -> subprocess.Popen:
    return launch(folder, "torch.distributed.run", "--standalone", "--nproc_per_node", 2, *command, **kwargs)


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate()
    assert process.returncode == 0, err[-20000:]
    return out


class Runs:
    """Recipes on the toy data in one folder, and what became of them."""

    def __init__(self, folder: Path):
        self.folder, self.jobs = folder, []
        adapter = {"vision_hidden_size": 24, "num_patches": 16, "num_prefix_tokens": 5, "mlp_hidden_size": 16}
        toy_checkpoint(folder / "plain")
        toy_checkpoint(folder / "dropout", adapter_config=adapter | {"num_attention_heads": 4, "dropout": 0.2})
        self.train = str(write_parquet(folder / "train.parquet", pairs()))
        rows = pairs()
        rows[2]["image"]["bytes"] = rows[2]["image"]["bytes"][:50]
        self.broken = str(write_parquet(folder / "broken.parquet", rows))
        self.rows = {n: str(write_parquet(folder / f"{n}.parquet", pairs(n))) for n in (5, 7)}
        self.tars = []
        for shard in range(5):  # not the same number for both ranks
            rows = pairs(4)
            for i, row in enumerate(rows):
                row["id"] = f"{shard}-{i}"
            self.tars.append(str(write_tar(folder / f"{shard}.tar", rows)))

    def write(self, name: str, data: dict | None = None, training: dict | None = None, **changes) -> str:
        """A recipe's file."""
        recipe = {
            "model": str(self.folder / "plain"),
            "trainable": ["adapter", "alignment", "language_model"],
            "loss_weights": {"lm": 0.7, "align": 1.5},
            "data": {"train": self.train} | (data or {}),
            "training": {
                "output_dir": str(self.folder / name),
                "use_cpu": True,
                "per_device_train_batch_size": 2,
                "per_device_eval_batch_size": 2,
                "logging_steps": 1,
                "disable_tqdm": True,
            }
            | (training or {}),
        } | changes
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return str(path)

    def alone(self, name: str, **changes) -> None:
        """Trains a recipe in this process."""
        main([self.write(name, **changes)])

    def together(self, name: str, job: dict | None = None, **changes) -> None:
        """A recipe for two ranks, trained by `launch`; `job`: see rank_jobs.py."""
        self.jobs.append({"name": name, "argv": [self.write(name, **changes)]} | (job or {}))

    def resume(self, name: str, of: str) -> None:
        self.jobs.append({"name": name, "argv": [str(self.folder / f"{of}.yaml"), "--resume"]})

    def launch(self, config: str = "cpu_2ranks") -> None:
        """Both ranks train all recipes of `together` and `resume`, in their order, in one launch."""
        file = self.folder / "jobs.json"
        file.write_text(json.dumps(self.jobs))
        command = ["accelerate.commands.launch", "--config_file", ROOT / f"recipes/accelerate/{config}.yaml"]
        finish(launch(self.folder, *command, "--num_processes", 2, ROOT / "tests/rank_jobs.py", file))

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / name / "model.safetensors")

    def log(self, name: str) -> list[dict]:
        return json.loads((self.folder / name / "log.json").read_text())

    def reports(self, name: str) -> list[dict]:
        return [json.loads((self.folder / f"{name}_rank{rank}.json").read_text()) for rank in range(2)]

    def evaluation(self, name: str, step: int) -> dict[str, float]:
        (found,) = (entry for entry in self.log(name) if "eval_loss" in entry and entry["step"] == step)
        return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        use_cache(patch, folder / "cache")
        runs = Runs(folder)
        evaluated = {"eval_strategy": "steps", "eval_steps": 2}
        layouts = {"whole": (4, 1), "accumulated": (2, 2), "wide": (2, 1), "narrow": (1, 2)}
        for name, (batch, steps) in layouts.items():
            sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps}
            train = runs.alone if name in ("whole", "accumulated") else runs.together
            if name in ("whole", "wide"):
                sizes |= evaluated | {"per_device_eval_batch_size": batch}
            train(name, data={"validation": runs.train}, training=SGD | sizes)
            if name in ("whole", "wide"):  # the loss of captions alone, without the embeddings of all ranks
                train(f"captions_{name}", training=SGD | sizes | {"eval_strategy": "no"}, loss_weights={"lm": 1.0})
            if name != "narrow":  # a batch of one row that cannot be read ends a run
                data = {"train": runs.broken, "max_unreadable_share": 0.5}
                train(f"broken_{name}", data=data, training=SGD | sizes | {"eval_strategy": "no"})
        for train, name, batch in ((runs.alone, "one", 4), (runs.together, "two", 2)):
            sizes = {"eval_on_start": True, "per_device_eval_batch_size": batch, "max_steps": 1}
            for rows, path in runs.rows.items():
                train(f"{name}_{rows}", data={"validation": path}, training=SGD | evaluated | sizes)

        memory = {"config": {"use_memory": True} | {f"memory_config.{k}": v for k, v in MEMORY.items()}}
        memory |= {"trainable": ["adapter", "memory", "scope"], "evaluation": {"memory": 2}}
        weights = {"memory_kl": 0.02, "address_kl": 0.005, "reconstruction": 0.5, "scope": 0.2, "key": 0.3}
        taught = {"validation": runs.train, "episodes": {"size": 2}}
        teaching = SGD | evaluated | {"eval_on_start": True, "per_device_train_batch_size": 4}
        for train, name, batch in ((runs.alone, "memory_one", 4), (runs.together, "memory_two", 2)):
            sizes = {"per_device_eval_batch_size": batch}
            train(name, data=taught, training=teaching | sizes, loss_weights={"lm": 1.0, **weights}, **memory)
        runs.together("memory_only", data=taught, training=teaching, loss_weights={"lm": 0.0, **weights}, **memory)

        # AdamW with a schedule, dropout, augmentation and a drawn order: what a resumed run has to take up
        augmentation = {"degrees": 5, "shift": 0.05, "scale": 0.05, "color": 0.1}
        model = {"model": str(folder / "dropout")}
        long = {"max_steps": 40, "learning_rate": 1.0e-3, "warmup_steps": 2, "per_device_train_batch_size": 1}
        runs.write("stopped", data={"augmentation": augmentation}, training=long | {"save_steps": 4}, **model)
        runs.together("through", data={"augmentation": augmentation}, training=long | {"save_strategy": "no"}, **model)
        with open(folder / "out.txt", "w") as out, open(folder / "err.txt", "w") as err:
            stopped = torchrun(folder, ROOT / "train_hf.py", folder / "stopped.yaml", stdout=out, stderr=err)
            while stopped.poll() is None and not is_complete(folder / "stopped" / "checkpoint-4"):
                time.sleep(0.005)
            stopped.send_signal(signal.SIGTERM)
            stopped.wait()
        shutil.copytree(folder / "stopped", folder / "as_stopped")
        runs.resume("resumed", of="stopped")

        data = {"train": runs.tars, "stream": {"shuffle_buffer": 3}, "augmentation": augmentation}
        long |= {"max_steps": 14}
        runs.together("stream", data=data, training=long | {"save_strategy": "no"}, **model)
        job = {"stop": [1, str(folder / "stream_stopped" / "checkpoint-3")]}
        runs.together("stream_stopped", job, data=data, training=long | {"save_steps": 3}, **model)
        runs.resume("stream_resumed", of="stream_stopped")
        runs.alone("stream_one", data=data, training=long | {"max_steps": 2, "save_steps": 2}, **model)
        runs.resume("stream_more", of="stream_one")
        runs.together("poisoned", {"poison": [1, 0]}, training=SGD | {"max_steps": 3}, loss_weights={"lm": 1.0})
        runs.launch()
        yield runs


def test_every_job_ended_as_it_should(runs):
    expected = {"stream_stopped": STOPPED}
    for job in runs.jobs:
        for report in runs.reports(job["name"]):
            if job["name"] != "stream_more":
                assert report["ended"] == expected.get(job["name"], "done"), job["name"]


# --- one step, however its rows are spread


def assert_same_weights(runs, name: str, reference: str) -> None:
    """Equal to float32 rounding, measured by how far the weights have moved."""
    start, a, b = load_file(runs.folder / "plain" / "model.safetensors"), runs.weights(reference), runs.weights(name)
    assert a.keys() == b.keys()
    moved = max((a[key] - start[key]).abs().max().item() for key in a)
    for key in a:
        torch.testing.assert_close(b[key], a[key], rtol=1e-5, atol=1e-5 * moved, msg=lambda m, key=key: f"{key}: {m}")


def assert_same_losses(runs, name: str, reference: str) -> None:
    logs = [[e for e in runs.log(n) if "lm_loss" in e] for n in (reference, name)]
    assert [e["step"] for e in logs[0]] == [e["step"] for e in logs[1]] == [1, 2]
    for a, b in zip(*logs):
        for key in {"loss", "lm_loss", "align_loss"} & a.keys():
            assert b[key] == pytest.approx(a[key], rel=1e-4), (key, a["step"])


@pytest.mark.parametrize("layout", ["accumulated", "wide", "narrow"])
def test_a_step_is_the_same_on_any_layout(layout, runs):
    collator = CaptionCollator(toy_processor(), toy_model().default_prompt(1)[0].tolist())
    counts = [int((collator([row])["labels"] != -100).sum()) for row in pairs()]
    assert sum(counts[:2]) != sum(counts[2:4])  # a mean of the ranks' means would be another loss
    assert_same_weights(runs, layout, "whole")
    assert_same_losses(runs, layout, "whole")


def test_captions_alone_are_a_mean_over_the_tokens_of_all_ranks(runs):
    assert_same_weights(runs, "captions_wide", "captions_whole")
    assert_same_losses(runs, "captions_wide", "captions_whole")


def test_two_ranks_teach_one_memory(runs):
    """Every part is measured and what is frozen stays; gates and dropout are drawn for each rank."""
    one, two = (next(e for e in runs.log(name) if "lm_loss" in e) for name in ("memory_one", "memory_two"))
    assert {"reconstruction_loss", "key_loss", "memory_kl_loss", "scope_loss"} <= one.keys() == two.keys()
    start, end = load_file(runs.folder / "plain" / "model.safetensors"), runs.weights("memory_two")
    assert all(torch.equal(end[n], start[n]) for n in start if "vision_tower" in n or "language_model" in n)


@pytest.mark.parametrize("layout", ["accumulated", "wide"])
def test_ranks_may_have_different_numbers_of_pairs(layout, runs):
    assert_same_weights(runs, f"broken_{layout}", "broken_whole")
    assert_same_losses(runs, f"broken_{layout}", "broken_whole")
    with pytest.raises(AssertionError):  # the row counts
        assert_same_weights(runs, "broken_whole", "whole")


def test_every_rank_has_the_same_weights(runs):
    found = {job["name"]: [report["digest"] for report in runs.reports(job["name"])] for job in runs.jobs}
    found.pop("stream_more")
    assert all(None not in digests for digests in found.values())
    assert [name for name, (first, second) in found.items() if first != second] == []


def test_ranks_agree_to_skip_a_step_that_is_not_finite_on_one(runs):
    """Neither rank takes the step; what the other one measured is in the log."""
    steps = [e for e in runs.log("poisoned") if "loss" in e]
    assert [e["step"] for e in steps] == [1, 2, 3] and "lm_loss" in steps[0]
    assert all(torch.isfinite(t).all() for t in runs.weights("poisoned").values())
    start = load_file(runs.folder / "plain" / "model.safetensors")
    assert not same_state(runs.weights("poisoned"), start)


# --- stop and go on


def test_sigterm_to_the_launcher_ends_all_ranks_at_one_step(runs):
    """torchrun hands the signal on; both ranks leave one complete checkpoint, and the run goes on bit for bit."""
    message = re.search(r"stopped by SIGTERM at step (\d+)", (runs.folder / "out.txt").read_text())
    assert message, (runs.folder / "err.txt").read_text()
    folder = runs.folder / "as_stopped"
    newest = newest_complete(folder)
    assert newest.name == f"checkpoint-{message[1]}" and 4 <= int(message[1]) < 40
    assert all(is_complete(checkpoint) for checkpoint in checkpoints(folder))
    assert all((newest / f"rng_state_{rank}.pth").exists() for rank in range(2))
    assert not (folder / "model.safetensors").exists() and (folder / "log.json").exists()
    assert same_state(runs.weights("stopped"), runs.weights("through"))
    assert not same_state(runs.weights("through"), load_file(newest / "model.safetensors"))


def test_sigterm_to_one_rank_ends_both_at_one_step(runs):
    steps = [[len(batch) for batch in report["batches"]] for report in runs.reports("stream_stopped")]
    assert steps[0] == steps[1] and 3 <= len(steps[0]) < 14
    newest = runs.folder / "stream_stopped" / f"checkpoint-{len(steps[0])}"
    assert is_complete(newest) and all((newest / f"data_rank{rank}.json").exists() for rank in range(2))


# --- streams


def test_ranks_read_different_rows_of_a_stream(runs):
    """14 rows for each of two ranks, of 20: together an epoch and part of the next."""
    rows = [list(itertools.chain(*report["batches"])) for report in runs.reports("stream")]
    assert [len(r) for r in rows] == [14, 14]
    everything = {f"{shard}-{i}" for shard in range(5) for i in range(4)}
    first = [set(rows[0][:12]), set(rows[1][:8])]  # 3 of 5 shards, and 2
    assert len(first[0]) == 12 and len(first[1]) == 8 and first[0] | first[1] == everything
    shards = [{row.split("-")[0] for row in part} for part in first]
    assert not shards[0] & shards[1]


def test_a_stream_goes_on_bit_for_bit(runs):
    for before, after, through in zip(*(runs.reports(n) for n in ("stream_stopped", "stream_resumed", "stream"))):
        assert before["batches"] + after["batches"] == through["batches"]
    assert same_state(runs.weights("stream_stopped"), runs.weights("stream"))
    logs = [[e for e in runs.log(n) if "lm_loss" in e] for n in ("stream_stopped", "stream")]
    parts = ("step", "loss", "lm_loss", "align_loss", "learning_rate")
    assert [[e[k] for k in parts] for e in logs[0]] == [[e[k] for k in parts] for e in logs[1]]


def test_a_stream_refuses_another_number_of_ranks(runs, monkeypatch):
    use_cache(monkeypatch, runs.folder / "cache")
    newest = newest_complete(runs.folder / "stream_stopped")
    with pytest.raises(ValueError) as caught:
        main([str(runs.folder / "stream_stopped.yaml"), "--resume"])
    assert str(caught.value) == (
        f"{newest} was written with ranks 2; a stream goes on exactly with the same only, not with 1."
    )


def test_a_stream_refuses_more_ranks(runs):
    message = (
        f"ValueError: {newest_complete(runs.folder / 'stream_one')} was written with ranks 1; a "
        "stream goes on exactly with the same only, not with 2."
    )
    assert [report["ended"] for report in runs.reports("stream_more")] == [message, message]


# --- evaluation


def metrics(entry: dict) -> dict:
    timed = ("runtime", "per_second", "epoch", "step")
    return {k: v for k, v in entry.items() if k.startswith("eval_") and not k.endswith(timed)}


@pytest.mark.parametrize("one,two,step", [("whole", "wide", 2), ("one_7", "two_7", 0), ("one_5", "two_5", 0)])
def test_two_ranks_measure_what_one_does(one, two, step, runs):
    """Of 7 or 5 rows in batches of 2, two ranks fill up the last round with rows they have had: these must not count
    twice."""
    a, b = (metrics(runs.evaluation(name, step)) for name in (one, two))
    assert a.keys() == b.keys() and {"eval_lm_loss", "eval_perplexity", "eval_text_to_image_recall_at_1"} <= a.keys()
    assert a["eval_text_to_image_recall_at_1"] < 1
    for key in a.keys() - {"eval_loss", "eval_align_loss"}:  # in evaluation, a batch's own pairs
        assert b[key] == pytest.approx(a[key], rel=1e-4), key


def test_two_ranks_measure_the_memory_as_one_does(runs):
    a, b = (metrics(runs.evaluation(name, 0)) for name in ("memory_one", "memory_two"))
    assert {"eval_scope_accuracy", "eval_scope_auroc", "eval_reconstruction_loss"} <= a.keys()
    for key in ("scope_accuracy", "scope_auroc", "scope_loss", "reconstruction_loss", "key_loss", "episode_lm_loss"):
        assert b[f"eval_{key}"] == pytest.approx(a[f"eval_{key}"], rel=1e-5, abs=1e-6), key


# --- launchers


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_open(path):
    config = load_config_from_file(str(path))
    assert config.num_processes > 1 and config.to_dict()["compute_environment"] == "LOCAL_MACHINE"


@pytest.mark.slow
def test_sharded_training_is_the_same(tmp_path, monkeypatch):
    """FSDP through recipes/accelerate/fsdp.yaml, made to run on CPUs: the weights of one process, in a checkpoint
    that loads and goes on."""
    use_cache(monkeypatch, tmp_path / "cache")
    runs = Runs(tmp_path)
    runs.alone("whole", training=SGD | {"per_device_train_batch_size": 4})
    for name, batch, steps in (("wide", 2, 1), ("narrow", 1, 2)):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps}
        runs.together(name, training=SGD | sizes)
    adam = {"optim": "adamw_torch", "learning_rate": 1.0e-3, "save_strategy": "steps", "save_steps": 1}
    runs.together("adam", training=SGD | adam)
    memory = {"config": {"use_memory": True} | {f"memory_config.{k}": v for k, v in MEMORY.items()}}
    taught = {"data": {"episodes": {"size": 2}}, "loss_weights": {"lm": 1.0, "scope": 0.2}, **memory}
    runs.together("memory", training=SGD, **taught)
    runs.launch("fsdp")
    refused = "ValueError: the memory's losses are not for FSDP or DeepSpeed, which gather weights for the model's own forward alone: use DDP."
    assert [report["ended"] for report in runs.reports("memory")] == [refused, refused]
    for name in ("wide", "narrow"):
        assert [report["ended"] for report in runs.reports(name)] == ["done", "done"]
        assert_same_losses(runs, name, "whole")
        assert_same_weights(runs, name, "whole")
    checkpoint = runs.folder / "adam" / "checkpoint-1"
    assert is_complete(checkpoint) and (checkpoint / "pytorch_model_fsdp.bin").exists()  # not DDP by another name
    AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=True)
    through = runs.weights("adam")
    shutil.rmtree(runs.folder / "adam" / "checkpoint-2")
    runs.jobs.clear()
    runs.resume("resumed", of="adam")
    runs.launch("fsdp")
    assert [report["ended"] for report in runs.reports("resumed")] == ["done", "done"]
    assert same_state(runs.weights("adam"), through)
