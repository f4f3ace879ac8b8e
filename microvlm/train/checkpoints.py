"""Mark, find and rotate complete checkpoints of a run."""

import json
import os
import re
import shutil
from pathlib import Path

from .callbacks import logger

MARKER = "complete.json"  # written last: a checkpoint without it, or with other files than it lists, was interrupted


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
