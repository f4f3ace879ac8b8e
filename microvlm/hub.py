"""Write model cards and push checkpoints to the Hub."""

import json
import math
import os
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx2
import yaml
from huggingface_hub import CommitInfo, EvalResult, HfApi, ModelCard, ModelCardData
from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_imports

AUTO_CLASSES = (
    "AutoConfig",
    "AutoModel",
    "AutoModelForImageTextToText",
    "AutoModelForCausalLM",
    "AutoModelForMultimodalLM",
)
TAGS = ("vision-language", "image-captioning", "bitnet", "deit", "tiny")
LIBRARIES = ("transformers", "torch", "datasets", "huggingface_hub")
TRAINING_STATE = (
    "optimizer.pt",
    "optimizer.bin",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*.pth",
    "trainer_state.json",
    "training_args.bin",
    "data_rank*.json",
    "checkpoint-*/**",
    "captions/**",
    "runs/**",
    "*.tmp",
    "*__pycache__/*",
)
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "adapter_*")


def public_path(name: str) -> str:
    """A path as a card shows it: nothing of where it was on this machine."""
    return Path(name).name if Path(name).is_absolute() else name


REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
UNFILLED = re.compile(
    r"(?<!\$)\{+ ?[A-Za-z_][\w.]*(?:![rsa])?(?::[^{}\s/]*)? ?\}+"
)  # {step}, {loss:.4f}, {{ step }}; no ${HOME}
SPEED = re.compile(r"(^|_)(epoch|runtime|.+_per_second|model_preparation_time)$")  # Trainer logs them beside metrics


@dataclass
class TrainingStatus:
    """What a model card says about a training run.

    Args:
        recipe: name of the recipe.
        base_model: what the run started from, a Hub id or a local folder.
        stage: in words, as "stage 1".
        global_step: optimizer steps done.
        max_steps: optimizer steps planned.
        finished: the run is over.
        data: what it trained on: Hub ids, `hf://datasets/...` paths or local paths.
        validation_loss: the last one measured; None: none yet.
        date: ISO date or time, UTC; default: today.
        validation_data: what `metrics` were measured on; default: the first of `data`.
        metrics: name -> value, as `Trainer.evaluate` names them. Values that are not finite are left out.
        repo_id: the repo the card goes to; None: the card loads from the folder it is in.
        licence: identifier of the Hub.
        parameters, trainable_parameters: their number.
        effective_batch_size: rows per optimizer step, over all ranks and micro-batches.
        tags: the Hub's tags.
        versions: library -> version.

    Raises:
        ValueError: a date that is not ISO, no data, a negative step.
    """

    recipe: str
    base_model: str
    stage: str
    global_step: int
    max_steps: int
    finished: bool
    data: list[str]
    validation_loss: float | None = None
    date: str = field(default_factory=lambda: datetime.now(UTC).date().isoformat())
    validation_data: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    repo_id: str | None = None
    licence: str = "apache-2.0"
    parameters: int | None = None
    trainable_parameters: int | None = None
    effective_batch_size: int | None = None
    tags: list[str] = field(default_factory=lambda: list(TAGS))
    versions: dict[str, str] = field(default_factory=lambda: {name: version(name) for name in LIBRARIES})

    def __post_init__(self):
        datetime.fromisoformat(self.date)
        if not self.data:
            raise ValueError("data is empty: a card names what the model was trained on.")
        if self.global_step < 0 or self.max_steps < 1:
            raise ValueError(f"step {self.global_step} of {self.max_steps}: steps count from 0 to at least 1.")

    def measured(self) -> dict[str, float]:
        """The finite metrics, `validation_loss` among them as `eval_loss`; the Trainer's timings left out."""
        metrics = dict(self.metrics)
        if self.validation_loss is not None:
            metrics["eval_loss"] = self.validation_loss
        return {
            name: float(value)
            for name, value in metrics.items()
            if value is not None and math.isfinite(value) and not SPEED.search(name)
        }


def hub_id(name: str, kind: str = "datasets") -> str | None:
    """The id `owner/name` in a Hub id or a path `hf://kind/owner/name/...`; None for a local path."""
    if match := re.match(rf"hf://{kind}/([^/@]+/[^/@]+)", name):
        return match[1]
    is_file = Path(name).exists() or (kind == "datasets" and Path(name).suffix in (".parquet", ".tar"))
    return name if REPO_ID.fullmatch(name) and not is_file else None


def model_card(status: TrainingStatus) -> ModelCard:
    """The model card of a run: metadata with the validation metrics as model-index, and a short text."""
    name = status.repo_id.split("/")[-1] if status.repo_id else "MicroVLM"
    repo = status.repo_id or "."
    measured = status.measured()
    validation = status.validation_data or status.data[0]
    metadata = ModelCardData(
        language="en",
        license=status.licence,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        base_model=hub_id(status.base_model, "models"),
        datasets=list(dict.fromkeys(filter(None, map(hub_id, status.data)))) or None,
        tags=status.tags,
        model_name=name if measured else None,
        eval_results=[
            EvalResult(
                task_type="image-text-to-text",
                dataset_type=hub_id(validation) or public_path(validation),
                dataset_name=hub_id(validation) or public_path(validation),
                dataset_split="validation",
                metric_type=metric.removeprefix("eval_"),
                metric_name=metric_label(metric),
                metric_value=value,
            )
            for metric, value in measured.items()
        ]
        or None,
    )
    done = f"step {status.global_step:,} of {status.max_steps:,}"
    loss = f"{measured['eval_loss']:.4f}" if "eval_loss" in measured else "not measured yet"
    lines = [
        f"- Status: {status.stage}, {'finished' if status.finished else 'training in progress'}",
        f"- Training step: {status.global_step:,} of {status.max_steps:,}",
        f"- Validation loss: {loss}",
        f"- Last updated: {status.date} (UTC)",
        f"- Recipe: {status.recipe}, started from {linked(status.base_model, 'models')}",
    ]
    if status.parameters is not None:
        trains = "" if status.trainable_parameters is None else f", of which {status.trainable_parameters:,} train"
        lines.append(f"- Parameters: {status.parameters:,}{trains}")
    if status.effective_batch_size is not None:
        lines.append(f"- Batch: {status.effective_batch_size:,} rows per step")
    if status.versions:
        lines.append("- Libraries: " + ", ".join(f"{k} {v}" for k, v in status.versions.items()))
    table = f"Nothing was measured up to {done}."
    if measured:
        rows = "\n".join(f"| {metric_label(metric)} | {number(value)} |" for metric, value in measured.items())
        table = f"On {linked(validation)}, measured up to {done}.\n\n| metric | value |\n|---|---:|\n{rows}"
    experimental = (
        "It can be wrong about what it sees, and it describes nothing outside that data well."
        if status.finished
        else f"Experimental: training is at {done}, and the weights will change."
    )
    text = f"""
# {name}

A tiny vision-language model: a DeiT-Tiny sees a picture, an adapter turns its patches into prefix tokens, a language model
writes the caption. The code comes with the weights.

## Training status

{chr(10).join(lines)}

## Data

{chr(10).join(f"- {linked(data)}" for data in status.data)}

## How to load

```python
from PIL import Image
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{repo}", trust_remote_code=True)  # pin revision="..." to keep this version
processor = AutoProcessor.from_pretrained("{repo}", trust_remote_code=True)

inputs = processor.image_processor(Image.open("picture.png"), return_tensors="pt")
out = model.generate(**inputs, max_new_tokens=32)
print(processor.decode(out[0, model.default_prompt(1).shape[1] :], skip_special_tokens=True))
```

## Evaluation

{table}

## Limits

Trained only on the data named above. {experimental}
"""
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n{text}")


def metric_label(name: str) -> str:
    return name.removeprefix("eval_").replace("_", " ")


def number(value: float) -> str:
    """Four decimals; small values by exponent, so that none is shown as zero."""
    return f"{value:,.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.2e}"


def linked(name: str, kind: str = "datasets") -> str:
    """A Hub id as a link, a local path as code."""
    repo_id = hub_id(name, kind)
    prefix = "" if kind == "models" else f"{kind}/"
    return f"[{repo_id}](https://huggingface.co/{prefix}{repo_id})" if repo_id else f"`{public_path(name)}`"


def write_card(folder: str | Path, status: TrainingStatus) -> Path:
    """Write the model card as `README.md` of a folder; returns its path."""
    path = Path(folder) / "README.md"
    temporary = path.with_name("README.md.tmp")
    temporary.write_text(str(model_card(status)), encoding="utf-8")
    os.replace(temporary, path)
    return path


def check_repo(folder: str | Path) -> None:
    """Check that a folder is a complete Hub repo that `from_pretrained` loads with its own code.

    Raises:
        ValueError: names everything that is missing or cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder.")
    config, processor, tokenizer = (
        _read_json(folder / name) for name in ("config.json", "processor_config.json", "tokenizer_config.json")
    )
    problems = [content for content in (config, processor, tokenizer) if isinstance(content, str)]
    if not (folder / "tokenizer.json").is_file():
        problems.append("tokenizer.json is missing")
    for name, content, classes in (
        ("config.json", config, AUTO_CLASSES),
        ("processor_config.json", processor, ("AutoProcessor",)),
        ("tokenizer_config.json", tokenizer, ()),
    ):
        if isinstance(content, dict):
            auto_map = content.get("auto_map") or {}
            if isinstance(auto_map, dict):
                problems += _check_code(folder, name, auto_map, classes)
            else:
                problems.append(f"auto_map of {name} is not an object")
    problems += _check_weights(folder) + _check_card(folder)
    if problems:
        raise ValueError(f"{folder} is not a complete Hub repo: {'; '.join(dict.fromkeys(problems))}.")


def _read_json(path: Path) -> dict[str, Any] | str:
    """The object in a JSON file, or in words why there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{path.name} is missing"
    except ValueError as error:
        return f"{path.name} is not JSON ({error})"
    return content if isinstance(content, dict) else f"{path.name} is not a JSON object"


def _check_code(folder: Path, name: str, auto_map: dict, classes: tuple[str, ...]) -> list[str]:
    """What is missing for the `auto_map` of file `name`: entries, and the code files they need, directly or not."""
    problems = [f"{name} has no auto_map entry {c}" for c in classes if c not in auto_map]
    needed = []
    for auto_class, references in auto_map.items():
        for reference in references if isinstance(references, list) else [references]:
            if reference and not isinstance(reference, str):
                problems.append(f"{name}: auto_map entry {auto_class} is {reference!r}, not a class")
            elif reference and "--" in reference:
                problems.append(f"{name}: auto_map entry {auto_class} is code of another repo ({reference})")
            elif reference:
                needed.append((reference.rpartition(".")[0], f"{auto_class} in {name}"))
    seen = set()
    while needed:
        module, reason = needed.pop(0)
        if module in seen:
            continue
        seen.add(module)
        path = folder / f"{module}.py"
        if path.is_file():
            try:
                imports = sorted(get_relative_imports(path))
            except UnicodeDecodeError:
                problems.append(f"{path.name} is not UTF-8 text")
                continue
            needed += [(imported, f"imported by {path.name}") for imported in imports]
        else:
            problems.append(f"{path.name} is missing ({reason})")
    return problems


def _check_weights(folder: Path) -> list[str]:
    """What is missing of the weights: one file, shards with their index, or a PEFT adapter."""
    problems = []
    files = {}  # file name -> tensors it has to hold
    if (folder / "model.safetensors").is_file():
        files["model.safetensors"] = set()
    elif (folder / "model.safetensors.index.json").is_file():
        index = _read_json(folder / "model.safetensors.index.json")
        if isinstance(index, str):
            return [index]
        weight_map = index.get("weight_map")
        if (
            not weight_map
            or not isinstance(weight_map, dict)
            or not all(isinstance(v, str) for v in weight_map.values())
        ):
            return ["model.safetensors.index.json has no weight_map from tensors to files"]
        for tensor, name in weight_map.items():
            files.setdefault(name, set()).add(tensor)
    elif (folder / "adapter_config.json").is_file():
        files["adapter_model.safetensors"] = set()
    else:
        return ["weights are missing (model.safetensors, shards with model.safetensors.index.json, or an adapter)"]
    for name, tensors in sorted(files.items()):
        if not (folder / name).is_file():
            problems.append(f"{name} is missing")
            continue
        try:
            with safe_open(folder / name, framework="np") as file:
                absent = tensors - set(file.keys())
        except (SafetensorError, OSError) as error:
            problems.append(f"{name} cannot be read ({error})")
            continue
        if absent:
            problems.append(f"{name} lacks {len(absent)} of its tensors, {min(absent)} the first")
    return problems


def _check_card(folder: Path) -> list[str]:
    """What is wrong with the model card."""
    path = folder / "README.md"
    if not path.is_file():
        return ["README.md is missing"]
    try:
        card = ModelCard.load(path)
    except (ValueError, yaml.YAMLError) as error:
        return [f"the metadata of README.md cannot be read ({' '.join(str(error).split())})"]
    problems = []
    if not card.data.to_dict():
        problems.append("README.md has no metadata")
    if unfilled := UNFILLED.findall(path.read_text(encoding="utf-8")):
        problems.append(f"README.md has unfilled fields ({', '.join(dict.fromkeys(unfilled))})")
    return problems


def push_folder(
    folder: str | Path,
    repo_id: str,
    private: bool | None = True,
    commit_message: str = "Upload checkpoint",
    revision: str | None = None,
    token: str | None = None,
) -> CommitInfo:
    """Push a complete folder to the Hub, the state of its training left out.

    Weights of an earlier push that the folder no longer has (shards, an adapter) are deleted on the Hub in the same push:
    `from_pretrained` would prefer them.

    Args:
        folder: config, code, processor, tokenizer, weights and card, see `check_repo`.
        repo_id: `owner/name`, created when missing.
        private: the repo has to be private; None: a new one is what its owner's settings on the Hub say.
        commit_message: first line of the commit.
        revision: branch, created when missing; default: main.
        token: default: the one of `hf auth login` or HF_TOKEN.

    Raises:
        ValueError: an incomplete folder (nothing is sent), or `private` with a repo that is public.
        HfHubHTTPError: the Hub refused.
    """
    check_repo(folder)
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    if private and not api.repo_info(repo_id).private:
        raise ValueError(f"{repo_id} is public already: make it private on the Hub, or push with private=False.")
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=commit_message,
        revision=revision,
        ignore_patterns=list(TRAINING_STATE),
        delete_patterns=list(WEIGHTS),
    )


def main(folder: str, repo_id: str, private: bool, revision: str | None, message: str) -> None:
    try:
        commit = push_folder(folder, repo_id, private, message, revision)
    except (ValueError, RuntimeError, OSError, httpx2.HTTPError) as error:
        raise OSError(f"{folder} was not pushed to {repo_id}: {error}") from error
    print(commit.commit_url)
