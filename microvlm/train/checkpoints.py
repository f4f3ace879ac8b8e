"""Write, find and rotate complete checkpoints of a run, and the place of its stream."""

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

from ..files import write_json
from ..hub import check_repo, write_card

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
    """Find the newest complete checkpoint; interrupted ones are named in the log.

    Raises:
        FileNotFoundError: there is none.
    """
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
    """Where a run stands in its stream: its batches, and the workers' cursors.

    Args:
        stream: a `CaptionStream`.
        args: `TrainingArguments`.
        sources: the paths it reads.
    """

    def __init__(self, stream, args, sources: list[str] | None):
        self.stream, self.args, self.sources = stream, args, sources
        self.batches, self.cursors = 0, {}

    def advance(self, batches: list[dict]) -> None:
        """Count batches and take their cursors."""
        self.batches += len(batches)
        cursors = [batch.pop("cursor") for batch in batches]
        self.cursors.update({cursor[0]: cursor for cursor in cursors})

    def state(self) -> dict[str, Any]:
        readers = [self.args.world_size, self.args.dataloader_num_workers]
        names = ("shuffle_buffer", "seed", "limit", "group_size", "num_shards")
        order = {name: getattr(self.stream, name) for name in names} | {"sources": self.sources}
        return {"readers": readers, "order": order, "batches": self.batches, "cursors": list(self.cursors.values())}

    def save(self, checkpoint: Path) -> None:
        write_json(checkpoint / f"data_rank{self.args.process_index}.json", self.state())

    def resume(self, checkpoint: Path) -> None:
        """Let the stream go on after the rows that this rank has read.

        Raises:
            ValueError: the run had other ranks or workers, which share the shards, or another order of rows.
        """
        # what was written, what is now
        own = checkpoint / f"data_rank{self.args.process_index}.json"
        state = json.loads((own if own.exists() else checkpoint / "data_rank0.json").read_text())
        now = self.state()
        texts = [
            (f"{name} {value!r}", repr(now["order"][name]), value == now["order"][name])
            for name, value in state.get("order", {}).items()
        ]
        (ranks, workers), (own_ranks, own_workers) = state["readers"], now["readers"]
        readers = f"{ranks} ranks of {workers} data loader workers"
        texts.append((readers, f"{own_ranks} of {own_workers}", state["readers"] == now["readers"]))
        for written, current, same in texts:
            if not same:
                raise ValueError(
                    f"{checkpoint} was written with {written}; a stream goes on exactly with the same only, not with "
                    f"{current}."
                )
        # go on
        self.batches, self.cursors = state["batches"], {c[0]: c for c in state["cursors"]}
        self.stream.go_on(self.batches, state["cursors"], self.args.dataloader_num_workers)


class CheckpointMixin:
    """The part of `MicroVLMTrainer` that writes checkpoints."""

    def _save_checkpoint(self, model, trial) -> None:
        """Save like `super()`, then mark the checkpoint as complete, then delete old ones.

        After a step that was not finite nothing is saved: the weights may be why.
        """
        if self.guard.bad_steps:
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
            folder = Path(output_dir or self.args.output_dir)
            write_card(folder, self.training_status())
            check_repo(folder)
