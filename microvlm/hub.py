"""Write model cards and push checkpoints to the Hub."""

import json
import math
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import httpx2
import yaml
from huggingface_hub import CommitInfo, EvalResult, HfApi, ModelCard, ModelCardData
from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import cached_file

from .files import write_text
from .model import AUTO_MAP, require
from .tables import TEMPLATES, markdown_table

TASK = "image-text-to-text"
# the classes that a repo's auto_map names
AUTO_MAPS = {"config.json": tuple(AUTO_MAP), "processor_config.json": ("AutoProcessor", "AutoImageProcessor")}
TAGS = ("vision-language", "image-captioning", "bitnet", "deit", "tiny")
LIBRARIES = ("transformers", "torch", "datasets", "huggingface_hub")
TRAINING_STATE = ["optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth", "trainer_state.json"]
TRAINING_STATE += ["training_args.bin", "data_rank*.json", ".lock", "checkpoint-*/**", "captions/**", "runs/**"]
TRAINING_STATE += ["*.tmp", "*__pycache__/*"]
WEIGHTS = ["model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "adapter_*"]
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SPEED = re.compile(r"(^|_)(epoch|runtime|.+_per_second|model_preparation_time)$")  # the Trainer logs them as metrics


@dataclass
class TrainingStatus:
    """What a model card says about a training run.

    The model it started from and the data are Hub ids or paths; `metrics` are of `validation_data`, as
    `Trainer.evaluate` names them.
    """

    recipe: str
    base_model: str
    stage: str
    data: list[str]
    validation_data: str | None
    global_step: int
    max_steps: int
    metrics: dict[str, float]
    repo_id: str | None
    parameters: int
    trainable_parameters: int
    effective_batch_size: int
    tags: list[str]
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="minutes"))
    versions: dict[str, str] = field(default_factory=lambda: {name: version(name) for name in LIBRARIES})

    def measured(self) -> dict[str, float]:
        """List the finite metrics, without `eval_` and the Trainer's timings."""
        return {
            name.removeprefix("eval_"): float(value)
            for name, value in self.metrics.items()
            if math.isfinite(value) and not SPEED.search(name)
        }


def hub_id(name: str, kind: str = "datasets") -> str | None:
    """Find `owner/name` in a Hub id or a path `hf://kind/owner/name/...`; None: a local path."""
    if match := re.match(rf"hf://{kind}/([^/@]+/[^/@]+)", name):
        return match[1]
    is_file = Path(name).exists() or (kind == "datasets" and Path(name).suffix in (".parquet", ".tar"))
    return name if REPO_ID.fullmatch(name) and not is_file else None


def check_source(source: str) -> None:
    """Refuse what is neither a path on this machine nor a Hub id."""
    is_known = Path(source).exists() or REPO_ID.fullmatch(source)
    require(is_known, f"{source!r} is neither a folder on this machine nor a Hub id (owner/name).")


def public_path(name: str) -> str:
    """Drop the folders of an absolute path: a card tells nothing of this machine."""
    return Path(name).name if Path(name).is_absolute() else name


def link(name: str, kind: str = "datasets") -> str:
    """Write a Hub id as a link, a local path as code."""
    repo_id = hub_id(name, kind)
    prefix = "" if kind == "models" else f"{kind}/"
    return f"[{repo_id}](https://huggingface.co/{prefix}{repo_id})" if repo_id else f"`{public_path(name)}`"


def metric_entry(data: str, split: str | None, metric: str, label: str, value: float, details=None) -> EvalResult:
    """Make one entry of a card's `model-index`."""
    return EvalResult(
        task_type=TASK,
        dataset_type=data,
        dataset_name=data,
        dataset_split=split,
        metric_type=metric,
        metric_name=label,
        metric_value=value,
        metric_args=details,
    )


def format_metric(value: float) -> str:
    """Write four decimals, or an exponent where they would all be zero."""
    return f"{value:,.4f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.2e}"


def model_card(status: TrainingStatus) -> ModelCard:
    """Write the model card of a run; its validation metrics go into the `model-index`."""
    name = status.repo_id.split("/")[-1] if status.repo_id else "MicroVLM"
    validation = status.validation_data or status.data[0]
    dataset, metrics = hub_id(validation) or public_path(validation), status.measured()
    labels = {metric: metric.replace("_", " ") for metric in metrics}
    results = [metric_entry(dataset, "validation", metric, labels[metric], value) for metric, value in metrics.items()]
    metadata = ModelCardData(
        language="en",
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag=TASK,
        base_model=hub_id(status.base_model, "models"),
        datasets=list(dict.fromkeys(filter(None, map(hub_id, status.data)))) or None,
        tags=status.tags,
        model_name=name if results else None,
        eval_results=results or None,
    )
    rows = [[labels[metric], format_metric(value)] for metric, value in metrics.items()]
    return ModelCard.from_template(
        metadata,
        template_path=TEMPLATES / "model_card.md.jinja",
        status=status,
        finished=status.global_step >= status.max_steps,
        name=name,
        repo=status.repo_id or ".",
        progress=f"step {status.global_step:,} of {status.max_steps:,}",
        loss=f"{metrics['loss']:.4f}" if "loss" in metrics else "not measured yet",
        base_model_link=link(status.base_model, "models"),
        data_links=[link(data) for data in status.data],
        validation_link=link(validation),
        table=markdown_table(["metric", "value"], rows) if rows else "",
    )


def write_plain_card(folder: Path, repo_id: str = ".", source: str = "") -> None:
    """Write the card of a checkpoint without a run of its own, packed or merged, if it has none."""
    if not (folder / "README.md").exists():
        base = hub_id(source, "models")
        metadata = ModelCardData(library_name="transformers", pipeline_tag=TASK, base_model=base, tags=list(TAGS[:2]))
        values = {"repo": repo_id, "source": source and link(source, "models")}
        card = ModelCard.from_template(metadata, template_path=TEMPLATES / "plain_card.md.jinja", **values)
        write_text(folder / "README.md", str(card))


def weight_files(name: str | Path, revision: str | None = None) -> list[Path]:
    """Find the safetensors files of a folder or of a checkpoint that was loaded."""
    options = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    for single in ("model.safetensors", "adapter_model.safetensors"):
        if (file := cached_file(name, single, **options)) is not None:
            return [Path(file)]
    index = cached_file(name, "model.safetensors.index.json", **options)
    require(index is not None, f"{name} has no safetensors files.")
    shards = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
    return [Path(cached_file(name, shard, revision=revision)) for shard in shards]


def check_repo(folder: str | Path) -> None:
    """Raise a ValueError that names the first thing missing or broken: code, weights, tokenizer, card."""
    folder = path = Path(folder)
    try:
        # the code that the auto_maps name, with all that it imports
        for name, classes in AUTO_MAPS.items():
            path = folder / name
            auto_map = json.loads(path.read_text(encoding="utf-8")).get("auto_map") or {}
            missing = [auto_class for auto_class in classes if auto_class not in auto_map]
            require(not missing, f"no auto_map entry {', '.join(missing)}")
            for module in {auto_map[auto_class].partition(".")[0] for auto_class in classes}:
                path = folder / f"{module}.py"
                get_relative_import_files(path)
        # weights that were written whole
        path = folder / "model.safetensors"
        for path in weight_files(folder):
            with safe_open(path, framework="np"):
                pass
        for path in (folder / "tokenizer.json", folder / "tokenizer_config.json"):
            json.loads(path.read_text(encoding="utf-8"))
        path = folder / "README.md"
        ModelCard(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder} is not a complete Hub repo: {path.name}: {reason}") from error


def push_folder(
    folder: str | Path,
    repo_id: str,
    private: bool | None = True,
    commit_message: str = "Upload checkpoint",
    revision: str | None = None,
    token: str | None = None,
) -> CommitInfo:
    """Push a complete folder to the Hub without its training state; it gets a plain card if it has none.

    Weights on the Hub that the folder no longer has are deleted in the same commit, since `from_pretrained` would
    prefer them.
    Repo and branch are created when missing. `private`: the repo must be; None: its owner's settings on the Hub decide.
    """
    # the repo, never a private folder into a public one
    if Path(folder).is_dir():
        write_plain_card(Path(folder), repo_id)
    check_repo(folder)
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    is_exposed = private and not api.repo_info(repo_id).private
    require(not is_exposed, f"{repo_id} is public already: make it private on the Hub, or push with private=False.")
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    # one commit
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=commit_message,
        revision=revision,
        ignore_patterns=TRAINING_STATE,
        delete_patterns=WEIGHTS,
    )


def main(folder: str, repo_id: str, private: bool, revision: str | None, message: str) -> None:
    try:
        commit = push_folder(folder, repo_id, private, message, revision)
    except (ValueError, RuntimeError, OSError, httpx2.HTTPError) as error:
        raise OSError(f"{folder} was not pushed to {repo_id}: {error}") from error
    print(commit.commit_url)
