"""A run whose every save is a complete repo, pushed to the stand-in for the Hub as it goes; and one that trains on a
stream from there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, microvlm
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_train import run, write_recipe  # noqa: F401
from toy_data import pairs, png, same_state, toy_checkpoint, toy_processor, write_tar

from microvlm.hub import check_repo
from microvlm.model import load_plain
from train_hf import main

pytest_plugins = ["hub_server"]
MEMORY = {"num_slots": 16, "code_size": 32, "key_hidden_size": 16, "max_content_tokens": 8, "scope_hidden_size": 16}
CODE = ("modeling", "configuration", "processing", "memory", "cache", "quantization")


def train(hub, folder: Path, recipe: str, *options: str) -> str:
    command = [sys.executable, str(ROOT / "train_hf.py"), recipe, *(x for o in options for x in ("--set", o))]
    environment = hub.environment(folder / "home")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_save_is_a_complete_repo(run, tmp_path):  # noqa: F811
    run["training"] |= {"eval_strategy": "steps", "eval_steps": 3, "save_total_limit": 1}
    recipe = write_recipe(tmp_path, "toy_stage1.yaml", **run)
    main([recipe])
    out = tmp_path / "out"
    assert [c.name for c in out.glob("checkpoint-*")] == ["checkpoint-6"]
    log = [e for e in json.loads((out / "log.json").read_text()) if "eval_loss" in e]
    for folder in (out / "checkpoint-6", out):
        check_repo(folder)
        assert all((folder / f"{name}_microvlm.py").exists() for name in CODE)
        card = ModelCard.load(folder / "README.md")
        assert card.data.tags == ["vision-language", "image-captioning", "qwen2", "deit", "tiny"]
        assert "step 6 of 6" in card.text.lower() and f"{log[-1]['eval_loss']:.4f}" in card.text
        measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
        assert any(value == pytest.approx(log[-1]["eval_perplexity"]) for value in measured.values())
        assert str(tmp_path) not in (folder / "README.md").read_text()


def test_pushes_as_it_goes(run, hub, tmp_path):  # noqa: F811
    run["training"] |= {"push_to_hub": True, "hub_model_id": "someone/toy-run", "hub_private_repo": True}
    run["training"] |= {"hub_strategy": "every_save", "eval_strategy": "steps", "eval_steps": 3}
    train(hub, tmp_path, write_recipe(tmp_path, **run))
    repo = hub.repos["someone/toy-run"]
    assert repo.private
    titles = [commit.title for commit in repo.history()]
    assert sorted(t for t in titles if "step" in t) == ["Training in progress, step 3", "Training in progress, step 6"]
    assert titles[0] == "End of training" and titles[-1] == "initial commit" and len(titles) == 4
    files = set(repo.files())
    assert {"config.json", "model.safetensors", "README.md", "modeling_microvlm.py", "tokenizer.json"} <= files
    assert not [
        f for f in files if f.startswith(("checkpoint-", "optimizer", "rng_state", "training_args", "captions"))
    ]
    assert hub.read("someone/toy-run", "model.safetensors") == (tmp_path / "out" / "model.safetensors").read_bytes()


PUBLISH = """
import json, sys
from transformers import AutoModelForImageTextToText, AutoProcessor
from microvlm import hub

picture, folders = sys.argv[1], sys.argv[2:]
for name, folder in zip(("someone/packed", "someone/merged"), folders):
    hub.main(folder, name, True, None, "a message")
    model = AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
    fact = processor(images=picture, text="<image>a blue circle", return_tensors="pt")
    memory = model.write_memory(**fact)
    answer = model.generate(pixel_values=fact["pixel_values"], memory=memory, max_new_tokens=4)
    print(json.dumps([int(memory.active.sum()), answer.shape[0]]))
"""


def test_fine_tuned_packed_published_opened_and_taught(run, hub, tmp_path):  # noqa: F811
    """From a recipe to a memory; a merged LoRA as well, which no run has written a card for."""
    run["model"] = str(toy_checkpoint(tmp_path / "memory", use_memory=True, memory_config=MEMORY))
    run["training"] |= {"max_steps": 1, "save_strategy": "no"}
    main([write_recipe(tmp_path, **run | {"calibration_rows": 0})])
    tuned, packed, merged = (tmp_path / name for name in ("out", "packed", "merged"))
    # pack
    (tmp_path / "pack.yaml").write_text(json.dumps({"modules": {r"model\.language_model\.layers\..*_proj": {}}}))
    assert microvlm("pack", tuned, packed, "--recipe", tmp_path / "pack.yaml") == 0
    check_repo(packed)
    # a LoRA
    model = get_peft_model(load_plain(tuned), LoraConfig(r=2, target_modules=r".*layers\..*\.q_proj"))
    model.merge_and_unload().save_pretrained(merged)
    toy_processor().save_pretrained(merged)
    # publish, open, teach
    picture = tmp_path / "picture.png"
    picture.write_bytes(png(1))
    done = subprocess.run(
        [sys.executable, "-c", PUBLISH, picture, packed, merged],
        env=hub.environment(tmp_path / "home") | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines() if line[0] == "["] == [[1, 1], [1, 1]]
    for name in ("packed", "merged"):
        card = ModelCard(hub.read(f"someone/{name}", "README.md").decode())
        assert card.data.library_name == "transformers" and str(tmp_path) not in card.content
    assert not [file for repo in hub.repos.values() for file in repo.files() if file.endswith(".lock")]


def test_a_token_is_not_published(run, tmp_path):  # noqa: F811
    run["training"] |= {"max_steps": 1, "save_strategy": "no"}
    main([write_recipe(tmp_path, **run), "--set", "training.hub_token=hf_secret"])
    out = tmp_path / "out"
    assert "hub_token" not in (out / "recipe.yaml").read_text()
    published = [p for p in out.rglob("*") if p.is_file() and p.name != "training_args.bin"]  # it is not pushed
    assert published and not [p.name for p in published if b"hf_secret" in p.read_bytes()]


def test_trains_on_a_stream_from_the_hub(run, hub, tmp_path):  # noqa: F811
    """As the CC12M recipes do: shards of the same layout under the same names, by address."""
    rows, shards = pairs(), {}
    for shard in range(3):
        path = write_tar(
            tmp_path / f"cc12m-train-000{shard}.tar", [row | {"id": f"{shard}-{row['id']}"} for row in rows]
        )
        shards[path.name] = path.read_bytes()
    hub.put_dataset("pixparse/cc12m-wds", shards)
    address = "hf://datasets/pixparse/cc12m-wds/cc12m-train-000"
    run["data"] |= {"train": [f"{address}[01].tar"], "stream": {"shuffle_buffer": 3}}
    run["data"] |= {"validation": f"{address}2.tar", "validation_limit": 3, "limit": 12}
    run["training"] |= {"eval_strategy": "steps", "eval_steps": 6}
    recipe = write_recipe(tmp_path, **run)
    train(hub, tmp_path, recipe)
    remote = load_file(tmp_path / "out" / "model.safetensors")
    local = [f"data.train={tmp_path}/cc12m-train-000[01].tar", f"training.output_dir={tmp_path / 'local'}"]
    validation = [f"data.validation={tmp_path}/cc12m-train-0002.tar"]
    main([recipe, *(x for o in (*local, *validation) for x in ("--set", o))])
    assert same_state(remote, load_file(tmp_path / "local" / "model.safetensors"))
    logs = [json.loads((tmp_path / name / "log.json").read_text()) for name in ("out", "local")]
    evaluations = [[e["eval_lm_loss"] for e in log if "eval_lm_loss" in e] for log in logs]
    assert evaluations[0] == pytest.approx(evaluations[1]) and len(evaluations[0]) == 1
