"""What a training run needs beside its loss: complete checkpoints, an orderly stop, metrics, progress, curves."""

import json
import logging
import os
import re
import shutil
import signal
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler

from data_microvlm import row_name

logger = logging.getLogger(__name__)

MARKER = "complete.json"  # written last: a checkpoint without it, or with other files than it lists, was interrupted


# ------------------------------------------------------------------------------------------------------ checkpoints


def mark_complete(checkpoint: Path) -> None:
    """List a checkpoint's files and sizes in its marker."""
    files = {str(p.relative_to(checkpoint)): p.stat().st_size for p in sorted(checkpoint.rglob("*")) if p.is_file()}
    temporary = checkpoint / f"{MARKER}.tmp"
    with temporary.open("w") as file:
        json.dump({"files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, checkpoint / MARKER)


def is_complete(checkpoint: Path) -> bool:
    """True for a checkpoint with all the files that its marker lists, in their sizes."""
    marker = checkpoint / MARKER
    if not marker.exists():
        return False
    try:
        files = json.loads(marker.read_text())["files"]
    except ValueError:  # empty or damaged
        return False
    return all(
        (checkpoint / name).is_file() and (checkpoint / name).stat().st_size == size for name, size in files.items()
    )


def checkpoints(folder: str | Path) -> list[Path]:
    """`checkpoint-N` folders, complete or not, oldest first."""
    found = [p for p in Path(folder).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))


def newest_complete(folder: str | Path) -> Path:
    """The newest checkpoint that was written to its end; newer ones are named in the log.

    Raises:
        FileNotFoundError: there is none.
    """
    for checkpoint in reversed(checkpoints(folder)):
        if is_complete(checkpoint):
            return checkpoint
        logger.warning("%s is incomplete: the one before it is used", checkpoint)
    raise FileNotFoundError(f"{folder} has no complete checkpoint to go on from.")


def remove_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint so that, whenever it is interrupted, the rest does not pass for complete."""
    (checkpoint / MARKER).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def rotate_checkpoints(folder: str | Path, keep: int | None, best: str | None = None) -> None:
    """Keep the newest `keep` complete checkpoints and `best`; drop the others and what was interrupted."""
    if not keep:
        return
    best = None if best is None else Path(best).name
    complete = [c for c in checkpoints(folder) if is_complete(c)]
    kept = {c.name for c in complete[-keep:]} | {best}
    if best in {c.name for c in complete} and keep > 1:  # the best one counts
        kept = {c.name for c in [c for c in complete if c.name != best][-(keep - 1) :]} | {best}
    for checkpoint in checkpoints(folder):
        if checkpoint.name not in kept:
            remove_checkpoint(checkpoint)


# ------------------------------------------------------------------------------------------------------ callbacks


class StopOnSignal(TrainerCallback):
    """On SIGTERM finishes the step at hand, saves a checkpoint and stops. `MicroVLMTrainer` lets all ranks agree on the step."""

    def __init__(self):
        self.requested = self.agreed = False
        self.previous = None

    def _handle(self, signum, frame):
        self.requested = True

    def on_train_begin(self, args, state, control, **kwargs):
        self.previous = signal.signal(signal.SIGTERM, self._handle)

    def on_step_end(self, args, state, control, **kwargs):
        if self.agreed and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
        return control

    def on_train_end(self, args, state, control, **kwargs):
        signal.signal(signal.SIGTERM, self.previous)


class StreamEpoch(TrainerCallback):
    """For data without an end the share of the run counts as the epoch; `Trainer` would begin at 0 again after a resume."""

    def on_step_end(self, args, state, control, **kwargs):
        state.epoch = state.global_step / state.max_steps


class SeededLengthGroupedSampler(LengthGroupedSampler):
    """Rows of similar length together, in an order of seed and epoch alone; the library's own draws from the process's random numbers,
    which a resumed run and other ranks do not share.

    Args:
        batch_size: rows of a group.
        lengths: of all rows.
        seed: of all epochs.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()


class LossBar(ProgressCallback):
    """Progress bar that shows the newest loss and its parts."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and logs and "loss" in logs:
            shown = {k.removesuffix("_loss"): f"{v:.3g}" for k, v in logs.items() if k.endswith("loss")}
            if "data_wait" in logs:
                shown["wait"] = f"{logs['data_wait']:.0%}"
            self.training_bar.set_postfix(shown, refresh=False)
        elif state.is_world_process_zero and self.training_bar is not None and logs:
            self.training_bar.write(str({k: round(v, 4) if isinstance(v, float) else v for k, v in logs.items()}))


class TrackedCollator:
    """A collator that also hands on which rows a batch has (`row_names`) and where a stream stood behind it (`cursor`)."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, rows: list[dict]) -> dict:
        batch = self.collator(rows) | {"row_names": [row_name(row) for row in rows]}
        return batch | ({"cursor": rows[-1]["cursor"]} if "cursor" in rows[-1] else {})


# ------------------------------------------------------------------------------------------------------ metrics


def retrieval_recalls(image_embeds: torch.Tensor, text_embeds: torch.Tensor, ranks: Iterable[int] = (1, 5, 10)) -> dict:
    """Share of pictures whose own text is among the k nearest of all R texts, and of texts likewise.

    Args:
        image_embeds: unit vectors (R, C).
        text_embeds: unit vectors (R, C); equal texts count as each other's own.
        ranks: the k.

    Returns:
        `image_to_text_recall_at_k` and `text_to_image_recall_at_k`.
    """
    similarity = image_embeds.double() @ text_embeds.double().mT
    text = torch.unique(text_embeds, dim=0, return_inverse=True)[1]
    same = text.unsqueeze(1) == text.unsqueeze(0)  # pairs of one text
    out = {}
    for name, scores in (("image_to_text", similarity), ("text_to_image", similarity.mT)):
        best = scores.masked_fill(~same, -torch.inf).amax(1, keepdim=True)
        place = ((scores > best) & ~same).sum(1)  # how many others come before
        for k in ranks:
            out[f"{name}_recall_at_{k}"] = (place < k).float().mean().item()
    return out


def scope_metrics(probability: torch.Tensor, known: torch.Tensor) -> dict[str, float]:
    """How well ScopeNet tells written from unwritten: accuracy balanced over both at 0.5, and AUROC.

    Args:
        probability: (N,).
        known: whether the query was written, (N,) bool.
    """
    on, off = probability[known].double(), probability[~known].double()
    if not len(on) or not len(off):
        raise ValueError(
            f"scope metrics need queries that were written and such that were not, got {len(on)} and {len(off)}."
        )
    wins = (on.unsqueeze(1) > off).double() + 0.5 * (on.unsqueeze(1) == off).double()
    accuracy = ((on >= 0.5).double().mean() + (off < 0.5).double().mean()) / 2
    return {"scope_accuracy": accuracy.item(), "scope_auroc": wins.mean().item()}


# ------------------------------------------------------------------------------------------------------ curves


def plot_curves(history: list[dict], path: str | Path) -> None:
    """Draw a run's log: losses, evaluation losses, retrieval, memory and captions, rate, waiting; into a PNG.

    Args:
        history: `trainer.state.log_history`.
        path: of the file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    keys = sorted({k for entry in history for k in entry})
    train = [k for k in keys if (k == "loss" or k.endswith("_loss")) and not k.startswith(("eval_", "train_"))]
    panels = {
        "training loss": train,
        "validation loss": [k for k in keys if k.startswith("eval_") and k.endswith("loss")],
        "retrieval": [k for k in keys if "recall_at" in k],
        "memory": [k for k in keys if k.startswith("eval_scope") and not k.endswith("loss")],
        "captions": [k for k in keys if k.startswith("eval_caption")],
        "learning rate": ["learning_rate"],
        "share of time waiting for data": ["data_wait"],
        "gradient norm": ["grad_norm"],
    }
    curves = {
        title: {k: [(e["step"], e[k]) for e in history if k in e] for k in names} for title, names in panels.items()
    }
    curves = {title: {k: v for k, v in lines.items() if v} for title, lines in curves.items()}
    curves = {title: lines for title, lines in curves.items() if lines}
    if not curves:
        raise ValueError("the log has nothing to draw.")
    columns = min(3, len(curves))
    figure, axes = plt.subplots(
        -(-len(curves) // columns), columns, figsize=(5 * columns, 3.2 * -(-len(curves) // columns)), squeeze=False
    )
    for axis, (title, lines) in zip(axes.flat, curves.items()):
        for name, points in lines.items():
            steps, values = zip(*points)
            axis.plot(steps, values, marker="." if len(points) < 30 else None, linewidth=1, label=name)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
        if len(lines) > 1:
            axis.legend(fontsize=6)
    for axis in list(axes.flat)[len(curves) :]:
        axis.axis("off")
    figure.tight_layout()
    temporary = Path(path).with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=110)
    plt.close(figure)
    os.replace(temporary, path)
