"""The model card, what a complete repo is, and pushes to a stand-in for the Hub by the real client, in processes of
its own."""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
from conftest import ROOT
from huggingface_hub import EvalResult, ModelCard
from safetensors.numpy import load_file, save_file
from toy_data import CAPTIONS, pairs, png, toy_checkpoint, write_tar
from transformers import AutoModelForImageTextToText, AutoProcessor

from microvlm.hub import TAGS, TrainingStatus, check_repo, hub_id, model_card

pytest_plugins = ["hub_server"]

STATUS = TrainingStatus(
    recipe="toy_stage1",
    base_model="someone/toy-start",
    stage="stage 1",
    global_step=1200,
    max_steps=5000,
    date="2025-11-22",
    validation_data=None,
    tags=list(TAGS),
    data=["pixparse/cc12m-wds", "hf://datasets/someone/more/a-*.tar", "/home/me/data/own.parquet"],
    metrics={"eval_loss": 2.345678, "eval_memory_kl_loss": 2.5e-5, "eval_caption_cider": 0.5},
    repo_id="someone/toy",
    parameters=10515521,
    trainable_parameters=1000000,
    effective_batch_size=2048,
    versions={"transformers": "5.23.0"},
)
TRAINING_STATE = (
    "optimizer.pt",
    "optimizer.bin",
    "scheduler.pt",
    "scaler.pt",
    "rng_state.pth",
    "rng_state_1.pth",
    "trainer_state.json",
    "training_args.bin",
    "data_rank0.json",
    "checkpoint-10/model.safetensors",
    "checkpoint-10/optimizer.pt",
    "captions/step_10.json",
    "runs/today/events.out",
    "model.safetensors.tmp",
    "__pycache__/modeling_microvlm.pyc",
)
CODE = {path.name for path in ROOT.glob("*_microvlm.py")}
REPO = CODE | {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
PUSH = """
import json, sys
from microvlm.hub import push_folder
commit = push_folder(sys.argv[1], "someone/toy", commit_message=sys.argv[2], **json.loads(sys.argv[3]))
print(json.dumps({"oid": commit.oid, "url": commit.commit_url}))
"""


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> Path:
    """A finished run: model, processor, code, card, and what the trainer left."""
    folder = toy_checkpoint(tmp_path_factory.mktemp("run") / "toy")
    (folder / "README.md").write_text(str(model_card(STATUS)))
    for name in TRAINING_STATE:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"state")
    return folder


@pytest.fixture
def run(complete, tmp_path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(complete, tmp_path / "toy"))


def client(hub, code: str, *arguments, token: str | None = None, home: str = "home") -> dict:
    """What a new process that talks to the stand-in prints as JSON on its last line."""
    folder = hub.folder.parent
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=folder,
        env=hub.environment(folder / home, token) | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def push(hub, folder: Path, message: str = "Upload checkpoint", **kwargs) -> dict:
    return client(hub, PUSH, folder, message, json.dumps(kwargs))


def shard(folder: Path) -> None:
    """The weights of a folder as two shards and their index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[:3], names[3:]), 1):
        file = f"model-0000{i}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


# --- the model card


def test_card_metadata_and_model_index():
    card = model_card(STATUS)
    result = {
        "task": {"type": "image-text-to-text"},
        "dataset": {"name": "pixparse/cc12m-wds", "type": "pixparse/cc12m-wds", "split": "validation"},
        "metrics": [
            {"type": "loss", "value": 2.345678, "name": "loss"},
            {"type": "memory_kl_loss", "value": 2.5e-5, "name": "memory kl loss"},
            {"type": "caption_cider", "value": 0.5, "name": "caption cider"},
        ],
    }
    assert card.data.to_dict() == {
        "language": "en",
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "base_model": "someone/toy-start",
        "datasets": ["pixparse/cc12m-wds", "someone/more"],
        "tags": ["vision-language", "image-captioning", "bitnet", "deit", "tiny"],
        "model-index": [{"name": "toy", "results": [result]}],
    }
    assert card.data.tags == ModelCard.load(ROOT / "README.md").data.tags
    assert card.data.eval_results[1] == EvalResult(
        task_type="image-text-to-text",
        dataset_type="pixparse/cc12m-wds",
        dataset_name="pixparse/cc12m-wds",
        dataset_split="validation",
        metric_type="memory_kl_loss",
        metric_name="memory kl loss",
        metric_value=2.5e-5,
    )
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()


def test_card_in_progress_and_finished():
    text = model_card(STATUS).text
    for line in (
        "- Status: stage 1, training in progress",
        "- Training step: 1,200 of 5,000",
        "- Validation loss: 2.3457",
        "- Last updated: 2025-11-22 (UTC)",
        "- Recipe: toy_stage1, started from [someone/toy-start](https://huggingface.co/someone/toy-start)",
        "- Parameters: 10,515,521, of which 1,000,000 train",
        "- Batch: 2,048 rows per step",
        "- Libraries: transformers 5.23.0",
        "- [pixparse/cc12m-wds](https://huggingface.co/datasets/pixparse/cc12m-wds)",
        "- [someone/more](https://huggingface.co/datasets/someone/more)",
        "- `own.parquet`",
        "| loss | 2.3457 |",
        "| memory kl loss | 2.50e-05 |",
        "| caption cider | 0.5000 |",
    ):
        assert line in text.splitlines()
    assert "Experimental: training is at step 1,200 of 5,000, and the weights will change." in text
    assert 'AutoModel.from_pretrained("someone/toy", trust_remote_code=True)' in text
    assert "/home" not in text

    finished = model_card(replace(STATUS, global_step=5000)).text
    assert "- Status: stage 1, finished" in finished.splitlines()
    assert "- Training step: 5,000 of 5,000" in finished.splitlines()
    assert "Experimental" not in finished and "in progress" not in finished


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_card_of_what_was_not_measured(loss):
    metrics = {"eval_loss": loss, "eval_perplexity": math.inf, "eval_runtime": 5.0, "epoch": 1.0}
    status = replace(STATUS, metrics=metrics, base_model=str(ROOT), data=["own.parquet"], repo_id=None)
    card = model_card(status)
    assert "- Validation loss: not measured yet" in card.text.splitlines()
    assert "Nothing was measured up to step 1,200 of 5,000." in card.text
    assert not {"model-index", "model_name", "eval_results", "datasets", "base_model"} & set(card.data.to_dict())
    for word in ("None", "nan", "inf ", "{", "null"):
        assert word not in str(card)
    assert 'AutoModel.from_pretrained(".", trust_remote_code=True)' in card.text

    some = model_card(replace(status, metrics=metrics | {"eval_scope_accuracy": np.float32(0.5), "eval_lm_loss": -0.0}))
    assert [(r.metric_type, r.metric_value) for r in some.data.eval_results] == [
        ("scope_accuracy", 0.5),
        ("lm_loss", 0),
    ]
    assert {type(r.metric_value) for r in some.data.eval_results} == {float}
    assert some.text.count("\n| ") == 4  # head, rule and two metrics


def test_status():
    values = {field.name: getattr(STATUS, field.name) for field in fields(STATUS)[:-2]}
    today = TrainingStatus(**values)
    assert today.date.startswith(datetime.now(UTC).date().isoformat())
    assert today.versions["torch"] == torch.__version__.split("+")[0]


def test_hub_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "mini").mkdir(parents=True)
    ids = {
        "pixparse/cc12m-wds": "pixparse/cc12m-wds",
        "hf://datasets/pixparse/cc12m-wds/cc12m-train-*.tar": "pixparse/cc12m-wds",
        "hf://datasets/pixparse/cc12m-wds@refs/convert/a.parquet": "pixparse/cc12m-wds",
        "data/mini": None,
        "data/mini/train.parquet": None,
        "./runs/x": None,
        "../x": None,
        "mini": None,
    }
    ids["data/gone.parquet"] = ids["data/gone.tar"] = None
    assert {name: hub_id(name) for name in ids} == ids


# --- what a complete repo is


def test_complete_repos_pass(run):
    check_repo(ROOT)
    check_repo(run)
    check_repo(str(run))
    shard(run)
    check_repo(run)


def test_an_adapter_counts_as_weights(run):
    (run / "model.safetensors").rename(run / "adapter_model.safetensors")
    check_repo(run)


def problem(folder: Path) -> str:
    with pytest.raises(ValueError) as caught:
        check_repo(folder)
    start = f"{folder} is not a complete Hub repo: "
    assert str(caught.value).startswith(start) and "\n" not in str(caught.value)
    return str(caught.value)[len(start) :]


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
        "model.safetensors",
        "configuration_microvlm.py",
        "modeling_microvlm.py",
        "processing_microvlm.py",
        "cache_microvlm.py",
        "memory_microvlm.py",
        "quantization_microvlm.py",
    ],
)
def test_a_missing_file_is_named(name, run):
    (run / name).unlink()
    assert name in problem(run)


@pytest.mark.parametrize(
    "auto_class",
    ["AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModelForMultimodalLM"],
)
def test_auto_map_is_complete(auto_class, run):
    config = json.loads((run / "config.json").read_text())
    reference = config["auto_map"].pop(auto_class)
    (run / "config.json").write_text(json.dumps(config))
    assert problem(run) == f"config.json: no auto_map entry {auto_class}"
    config["auto_map"][auto_class] = f"someone/else--{reference}"  # code of another repo
    (run / "config.json").write_text(json.dumps(config))
    assert "No such file" in problem(run) and "someone/else--" in problem(run)


def test_code_imported_by_imported_code_is_needed(run):
    with (run / "memory_microvlm.py").open("a") as file:
        file.write("\nfrom .deeper_microvlm import something\n")
    assert "deeper_microvlm.py" in problem(run)


def test_processor_needs_its_class(run):
    (run / "processor_config.json").write_text("{}")
    assert problem(run) == "processor_config.json: no auto_map entry AutoProcessor, AutoImageProcessor"
    (run / "processor_config.json").write_text("{")
    assert problem(run).startswith("processor_config.json: Expecting property name")


def test_shards_are_complete(run):
    shard(run)
    (run / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors" in problem(run)


def test_half_written_weights_are_refused(run):
    content = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").write_bytes(content[:-10])
    assert problem(run).startswith("model.safetensors: ")


@pytest.mark.parametrize(
    "content,message",
    [
        ("---\nlicense: [\n---\n", "README.md: while parsing a flow node"),
        ("---\nlicense: mit\nmodel-index: 3\n---\n", "README.md: Invalid `model_index`"),
    ],
)
def test_card_is_checked(content, message, run):
    (run / "README.md").write_text(content)
    assert problem(run).startswith(message)


# --- pushing


def test_push_and_load_in_another_process(hub, run, tmp_path):
    picture = tmp_path / "picture.png"
    picture.write_bytes(png(1))
    pushed = push(hub, run)
    repo = hub.repos["someone/toy"]
    assert repo.private
    assert set(repo.files()) == REPO | {".gitattributes"}
    for name in REPO:
        assert hub.read("someone/toy", name) == (run / name).read_bytes(), name
    assert {name for name, blob in repo.files().items() if blob.lfs} == {"model.safetensors"}
    assert [c.title for c in repo.history()] == ["Upload checkpoint", "initial commit"]
    assert pushed == {"oid": repo.branches["main"], "url": f"{hub.url}/someone/toy/commit/{repo.branches['main']}"}
    assert {r.status for r in hub.requests} == {200}

    model = AutoModelForImageTextToText.from_pretrained(run, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(run, trust_remote_code=True)
    snippet = hub.read("someone/toy", "README.md").decode().split("```python")[1].split("```")[0]
    code = """
import json, sys
exec(sys.argv[2])
by_card = out[0].tolist()
from transformers import AutoModelForImageTextToText
where = {"trust_remote_code": True, "revision": sys.argv[1]}
model = AutoModelForImageTextToText.from_pretrained("someone/toy", **where)
processor = AutoProcessor.from_pretrained("someone/toy", **where)
inputs = processor(images=[Image.open("picture.png")], text="<|user|><image><|assistant|>", return_tensors="pt")
by_sha = model.generate(**inputs, max_new_tokens=32)[0].tolist()
for part in (model, processor):
    part.save_pretrained("next")  # the next stage starts from the Hub
print(json.dumps({"card": by_card, "sha": by_sha}))
"""
    del hub.requests[:]
    other = client(hub, code, pushed["oid"], snippet, home="other")
    inputs = processor(images=[str(picture)], text="<|user|><image><|assistant|>", return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=32)[0].tolist()
    assert len(set(expected)) > 4
    assert other == {"card": expected, "sha": expected}
    assert problem(tmp_path / "next").startswith("README.md: [Errno 2]")
    assert any(r.method == "GET" and r.path.startswith("/storage/") and r.user is None for r in hub.requests)
    assert all(r.user == "someone" for r in hub.requests if r.path.startswith(("/api/models/", "/someone/")))


def test_pushes_keep_history_and_replace_weights(hub, run):
    first = push(hub, run, "step 1200")
    again = push(hub, run, "nothing new")
    assert again["oid"] == first["oid"]

    (run / "README.md").write_text(str(model_card(replace(STATUS, global_step=5000))))
    shard(run)
    second = push(hub, run, "step 5000")
    repo = hub.repos["someone/toy"]
    assert [c.title for c in repo.history()] == ["step 5000", "step 1200", "initial commit"]
    assert [c.oid for c in repo.history()][:2] == [second["oid"], first["oid"]]
    shards = {"model.safetensors.index.json", *(f"model-0000{i}-of-00002.safetensors" for i in (1, 2))}
    assert set(repo.files()) == REPO - {"model.safetensors"} | shards | {
        ".gitattributes"
    }  # no old weights beside the new
    assert "1,200 of 5,000" in hub.read("someone/toy", "README.md", first["oid"]).decode()
    assert "5,000 of 5,000" in hub.read("someone/toy", "README.md").decode()

    (run / "README.md").write_text(str(model_card(STATUS)))
    third = push(hub, run, "aside", revision="try")
    assert repo.branches == {"main": second["oid"], "try": third["oid"]}
    assert [c.title for c in repo.history("try")][:2] == ["aside", "step 5000"]


def test_who_may_not_read_gets_the_librarys_error(hub):
    hub.put_model("someone/toy", {"config.json": b'{"model_type": "microvlm"}'}, private=True)
    code = """
import json
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoConfig
errors = []
for token in (None, "hf_wrong"):
    for call in (
        lambda: HfApi(token=token).model_info("someone/toy"),
        lambda: hf_hub_download("someone/toy", "config.json", token=token),
        lambda: HfApi(token=token).create_repo("someone/other"),
    ):
        try:
            call()
        except HfHubHTTPError as error:
            errors.append([type(error).__name__, error.response.status_code])
try:
    AutoConfig.from_pretrained("someone/toy", trust_remote_code=True)
except OSError as error:
    errors.append(str(error).splitlines()[0])
print(json.dumps(errors))
"""
    assert client(hub, code, token="") == [
        ["RepositoryNotFoundError", 401],
        ["RepositoryNotFoundError", 401],
        ["HfHubHTTPError", 401],
        ["HfHubHTTPError", 401],
        ["HfHubHTTPError", 401],
        ["HfHubHTTPError", 401],
        "someone/toy is not a local folder and is not a valid model identifier listed on 'https://huggingface.co/models'",
    ]
    assert set(hub.repos) == {"someone/toy"}


def test_incomplete_folders_reach_nobody(hub, run):
    (run / "memory_microvlm.py").unlink()
    code = PUSH.replace("commit = push", "try:\n    push").split("print")[0]
    code += "except ValueError as error:\n    print(json.dumps(str(error)))"
    message = client(hub, code, run, "m", "{}")
    assert message.startswith(f"{run} is not a complete Hub repo: ") and "memory_microvlm.py" in message
    assert not hub.requests and not hub.repos


def test_private_is_not_pushed_to_public(hub, run):
    oid = hub.put_model("someone/toy", {"a.txt": b"public"})
    code = PUSH.replace("commit = push", "try:\n    push").split("print")[0]
    code += "except ValueError as error:\n    print(json.dumps(str(error)))"
    assert client(hub, code, run, "m", "{}") == (
        "someone/toy is public already: make it private on the Hub, or push with private=False."
    )
    assert hub.repos["someone/toy"].branches == {"main": oid}
    push(hub, run, private=False)
    assert set(hub.repos["someone/toy"].files()) == REPO | {".gitattributes", "a.txt"}


def test_command_line(hub, run, tmp_path):
    def command(*arguments, **environment):
        return subprocess.run(
            [sys.executable, "-m", "microvlm", "push", *map(str, arguments)],
            env=hub.environment(tmp_path / "home") | environment,
            capture_output=True,
            text=True,
        )

    done = command(run, "euhidaman/MicroVLM-V", "--private", "--message", "stage 1")
    assert done.returncode == 0, done.stderr
    repo = hub.repos["euhidaman/MicroVLM-V"]
    assert done.stdout.strip() == f"{hub.url}/euhidaman/MicroVLM-V/commit/{repo.branches['main']}"
    assert repo.private and repo.commit().title == "stage 1"

    done = command(run, "someone/toy", HF_ENDPOINT="http://127.0.0.1:9")
    assert (done.returncode, done.stderr.splitlines()) == (
        1,
        [f"microvlm: {run} was not pushed to someone/toy: [Errno 111] Connection refused"],
    )

    code = """
import json, os, sys
from microvlm import hub
said = []
for folder, repo_id in json.loads(sys.argv[1]):
    try:
        hub.main(folder, repo_id, True, None, "a message")
    except OSError as error:
        said.append(str(error))
print(json.dumps(said))
"""
    nowhere = str(tmp_path / "nowhere")
    refused = ([nowhere, "someone/toy"], [str(run), "nobody/toy"], [str(run), "not a repo"])
    reasons = (
        f"{nowhere} is not a complete Hub repo: config.json: [Errno 2]",
        "403 Forbidden: You don't have the right",
        "Repo id must use alphanumeric",
    )
    for (folder, repo_id), reason, said in zip(refused, reasons, client(hub, code, json.dumps(refused))):
        assert said.startswith(f"{folder} was not pushed to {repo_id}: ") and reason in said
    assert set(hub.repos) == {"euhidaman/MicroVLM-V"}


# --- the stand-in


def test_data_sets_stream_from_the_stand_in(hub, tmp_path):
    rows = pairs()
    shards = {}
    for i in range(2):
        path = write_tar(tmp_path / f"cc12m-train-000{i}.tar", rows[4 * i : 4 * i + 4])
        shards[path.name] = path.read_bytes()
    hub.put_dataset("pixparse/cc12m-wds", shards | {"README.md": b"---\nlicense: other\n---\n"})
    code = """
import json
from datasets import load_dataset
from huggingface_hub import HfFileSystem
by_id = load_dataset("pixparse/cc12m-wds", split="train", streaming=True)
files = "hf://datasets/pixparse/cc12m-wds/cc12m-train-*.tar"
by_path = load_dataset("webdataset", data_files={"train": files}, split="train", streaming=True)
said = [[[row["__key__"], row["txt"], list(row["png"].getpixel((16, 16)))] for row in d] for d in (by_id, by_path)]
part = HfFileSystem().cat_file("datasets/pixparse/cc12m-wds/cc12m-train-0001.tar", start=500, end=3000).hex()
shards = [by_id.num_shards, by_path.num_shards]
print(json.dumps({"by_id": said[0], "by_path": said[1], "shards": shards, "part": part}))
"""
    out = client(hub, code, token="")
    assert bytes.fromhex(out.pop("part")) == shards["cc12m-train-0001.tar"][500:3000]
    pixels = [[255, 0, 0], [0, 0, 255], [0, 128, 0], [0, 0, 0], [255, 255, 0], [255, 0, 0], [0, 0, 255], [128, 0, 128]]
    expected = [[f"toy-{i}", CAPTIONS[i], pixels[i]] for i in range(8)]
    assert out == {"by_id": expected, "by_path": expected, "shards": [2, 2]}
    assert any(r.status == 206 for r in hub.requests) and any(r.status == 302 for r in hub.requests)


def test_files_are_served_as_the_hub_does(hub):
    body = bytes(range(256)) * 8
    sha = hub.put_dataset("someone/set", {"a/b.tar": body, "a/c.txt": b"text"}, private=True)

    def get(path, **headers):
        headers = {"Authorization": f"Bearer {hub.token}"} | headers
        try:
            answer = urlopen(Request(f"{hub.url}/{path}", headers=headers))
        except HTTPError as error:
            answer = error
        return answer.status, answer.headers, answer.read()

    for revision in ("main", sha):
        status, headers, content = get(f"datasets/someone/set/resolve/{revision}/a/c.txt")
        assert (status, content, headers["X-Repo-Commit"]) == (200, b"text", sha)
        assert headers["ETag"] == '"f3a34851d44d6b97c90fbb99dd3d18c261b9a237"'  # git hash-object
    tar = "datasets/someone/set/resolve/main/a/b.tar"
    for given, expected in (("0-9", body[:10]), ("2000-", body[2000:]), ("-5", body[-5:]), ("2040-9999", body[2040:])):
        status, headers, content = get(tar, Range=f"bytes={given}")
        assert (status, content) == (206, expected)
    assert headers["Content-Range"] == "bytes 2040-2047/2048"
    assert get(tar, Range="bytes=2048-")[0] == 416
    for path, status, code in (
        ("datasets/someone/set/resolve/main/no.txt", 404, "EntryNotFound"),
        ("datasets/someone/set/resolve/dev/a/c.txt", 404, "RevisionNotFound"),
        ("datasets/someone/no/resolve/main/a/c.txt", 404, "RepoNotFound"),
        ("someone/set/resolve/main/a/c.txt", 404, "RepoNotFound"),
    ):
        answer = get(path)
        assert (answer[0], answer[1]["X-Error-Code"]) == (status, code)
    assert get(tar, Authorization="Bearer no")[0] == 401
    assert [entry["path"] for entry in json.loads(get("api/datasets/someone/set/tree/main")[2])] == [
        ".gitattributes",
        "a",
    ]
    deep = json.loads(get("api/datasets/someone/set/tree/main/a?recursive=true")[2])
    assert [(entry["path"], entry["size"]) for entry in deep] == [("a/b.tar", 2048), ("a/c.txt", 4)]
