"""Write, find, rotate and push complete checkpoints of a run, and keep the place of its stream."""

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from ..data.layouts import list_paths
from ..files import write_json, write_text
from ..hub import TAGS, TrainingStatus, model_card, push_folder
from ..model import require
from .recipe import Recipe

MARKER = "complete.json"  # written last: a checkpoint without it, or with other files than it lists, was interrupted
logger = logging.getLogger(__name__)


def mark_complete(checkpoint: Path) -> None:
    """List a checkpoint's files and sizes in its marker."""
    files = {str(p.relative_to(checkpoint)): p.stat().st_size for p in sorted(checkpoint.rglob("*")) if p.is_file()}
    write_json(checkpoint / MARKER, {"files": files})


def is_complete(checkpoint: Path) -> bool:
    """Tell whether a checkpoint has all the files that its marker lists, in their sizes."""
    try:
        files = json.loads((checkpoint / MARKER).read_text())["files"]
    except (OSError, ValueError):  # missing, empty or damaged
        return False
    return all(
        (checkpoint / name).is_file() and (checkpoint / name).stat().st_size == size for name, size in files.items()
    )


def checkpoints(folder: str | Path) -> list[Path]:
    """List `checkpoint-N` folders, complete or not, oldest first."""
    folders = [p for p in Path(folder).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(folders, key=lambda p: int(p.name.rpartition("-")[2]))


def newest_complete(folder: str | Path) -> Path:
    """Find the newest complete checkpoint; interrupted ones are named in the log."""
    for checkpoint in reversed(checkpoints(folder)):
        if is_complete(checkpoint):
            return checkpoint
        logger.warning("%s is incomplete: the one before it is used", checkpoint)
    raise FileNotFoundError(f"{folder} has no complete checkpoint to go on from.")


def remove_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint; what an interruption leaves never passes for complete."""
    (checkpoint / MARKER).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def rotate_checkpoints(folder: str | Path, limit: int | None, best: str | None = None) -> None:
    """Keep the newest `limit` complete checkpoints, `best` among them; delete the others and interrupted ones."""
    if not limit:
        return
    complete = [c.name for c in checkpoints(folder) if is_complete(c)]
    best = None if best is None else Path(best).name
    newest = [name for name in complete if name != best]
    count = max(1, limit - (best in complete))
    for checkpoint in checkpoints(folder):
        if checkpoint.name not in {*newest[-count:], best}:
            remove_checkpoint(checkpoint)


class StreamPosition:
    """Where a run stands in its stream: its batches, and the workers' cursors."""

    def __init__(self, stream, args):
        self.stream, self.args = stream, args
        self.batches, self.cursors = 0, {}

    def advance(self, batches: list[dict]) -> None:
        """Count batches and take their cursors."""
        self.batches += len(batches)
        cursors = [batch.pop("cursor") for batch in batches]
        self.cursors.update({cursor[0]: cursor for cursor in cursors})

    def state(self) -> dict[str, Any]:
        # what the order of the rows depends on; ranks and workers share the shards
        order = {name: getattr(self.stream, name) for name in ("shuffle_buffer", "group_size", "num_shards")}
        order |= {"ranks": self.args.world_size, "dataloader_num_workers": self.args.dataloader_num_workers}
        return {"order": order, "batches": self.batches, "cursors": list(self.cursors.values())}

    def save(self, checkpoint: Path) -> None:
        write_json(checkpoint / f"data_rank{self.args.process_index}.json", self.state())

    def resume(self, checkpoint: Path) -> None:
        """Let the stream go on after the rows that this rank has read."""
        own = checkpoint / f"data_rank{self.args.process_index}.json"
        state = json.loads((own if own.exists() else checkpoint / "data_rank0.json").read_text())
        # another order of rows cannot go on
        for name, now in self.state()["order"].items():
            before = state["order"].get(name)
            problem = f"{checkpoint} was written with {name} {before!r}; a stream goes on exactly with the same only"
            require(before == now, f"{problem}, not with {now!r}.")
        # go on
        self.batches, self.cursors = state["batches"], {c[0]: c for c in state["cursors"]}
        self.stream.go_on(self.batches, state["cursors"], self.args.dataloader_num_workers)


def card_values(recipe: Recipe, name: str) -> dict[str, Any]:
    """Collect the values of `TrainingStatus` that stay the same during a run."""
    stage, validation = re.search(r"stage(\d+)", name), recipe.data.validation
    return {
        "recipe": name,
        "base_model": recipe.model,
        "stage": f"stage {stage[1]}" if stage else "training",
        "data": list_paths(recipe.data.train),
        "validation_data": list_paths(validation)[0] if validation else None,
    }


class CheckpointMixin:
    """The part of `MicroVLMTrainer` that writes, describes and pushes checkpoints."""

    def _save_checkpoint(self, model, trial) -> None:
        """Save like `super()`, then mark the checkpoint as complete, then delete old ones."""
        if self.guard.bad_steps:  # the weights may be why
            logger.warning("no checkpoint at step %d, which was not finite", self.state.global_step)
            return
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and folder.exists():
            remove_checkpoint(folder)
        self.accelerator.wait_for_everyone()
        # the library would delete old checkpoints before the new one is complete
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
            # torch names a line of its own code, and no error at all for what it flushes last
            cut = [path for path in folder.glob("*.pt") if self.args.should_save and not is_zipfile(path)]
            require(not cut, f"{cut and cut[0]} was cut short: the disk is full, or gone.")
        if self.position is not None:
            self.position.save(folder)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(folder)
            rotate_checkpoints(folder.parent, limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        """Save a complete repo: weights, code, processor and card."""
        wrapped = type(self.model)
        if self.is_fsdp_enabled:  # FSDP makes it a class of torch's, whose file would be copied, and unties its weights
            name = wrapped.__name__.removeprefix("FSDP")
            self.model.__class__ = next(cls for cls in wrapped.__mro__ if cls.__name__ == name)
            state_dict = {k: v for k, v in state_dict.items() if k not in self.model.all_tied_weights_keys}
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.model.__class__ = wrapped
        if self.options.card is not None and self.args.should_save:
            write_text(Path(output_dir or self.args.output_dir) / "README.md", str(model_card(self.training_status())))

    def training_status(self) -> TrainingStatus:
        """Describe the run as it is now, with its newest metrics."""
        metrics = {}
        for entry in self.state.log_history:
            metrics |= {k: v for k, v in entry.items() if k.startswith("eval_")}
        model = self.accelerator.unwrap_model(self.model)
        text = model.config.text_config.model_type
        return TrainingStatus(
            **self.options.card,
            parameters=model.num_parameters(),
            trainable_parameters=model.num_parameters(only_trainable=True),
            tags=[text if tag == "bitnet" else tag for tag in TAGS],
            global_step=self.state.global_step,
            max_steps=self.state.max_steps,
            metrics=metrics,
            effective_batch_size=self.get_total_train_batch_size(self.args),
            repo_id=self.args.hub_model_id,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.is_world_process_zero() and self.args.hub_strategy != "end":
            self._push(checkpoint_folder, f"Training in progress, step {self.state.global_step}")

    def push_to_hub(self, commit_message: str = "End of training"):
        """Save and push the complete repo of `output_dir`."""
        self.save_model(_internal_call=True)
        if self.is_world_process_zero():
            return self._push(self.args.output_dir, commit_message)

    def _push(self, folder: str | Path, message: str):
        args = self.args
        repo_id = self.hub_model_id or args.hub_model_id or Path(args.output_dir).name
        return push_folder(folder, repo_id, args.hub_private_repo, message, args.hub_revision, args.hub_token)
