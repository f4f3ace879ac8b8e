"""Write files and folders whole or not at all, and check outputs before the work."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]


def _temporary(path: str | os.PathLike) -> tuple[int, str]:
    """Handle and name of a new file beside `path`.

    Raises:
        OSError: `path` cannot be written.
    """
    folder, name = os.path.split(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise OSError(f"cannot write {path}: there is no folder {folder}.")
    if not os.path.basename(path) or (os.path.exists(path) and not os.path.isfile(path)):
        raise OSError(f"cannot write {path}: it is not a regular file.")
    try:
        return tempfile.mkstemp(prefix=f".{name}.", dir=folder)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}.") from error


def check_outputs(inputs: Iterable[str], **outputs: str | None) -> None:
    """Refuse, before any work, what could not be written after it.

    Args:
        inputs: paths that are read.
        outputs: option -> path, or None.

    Raises:
        OSError: a path that cannot be written.
        ValueError: two options with one path, or one with the path of an input.
    """
    options, read = {}, {os.path.realpath(path) for path in inputs}
    for option, path in outputs.items():
        if path is None:
            continue
        handle, temporary = _temporary(path)
        os.close(handle)
        os.unlink(temporary)
        if os.path.realpath(path) in read:
            raise ValueError(f"--{option} would be written over the input {path}.")
        if (other := options.setdefault(os.path.realpath(path), option)) != option:
            raise ValueError(f"--{other} and --{option} are the same file, {path}.")


@contextmanager
def atomic_file(path: str, mode: str) -> Iterator[IO]:
    """Open a new file that takes the place of `path` when all went well, and disappears when not."""
    encoding = {} if "b" in mode else {"encoding": "utf-8", "errors": "backslashreplace"}
    handle, temporary = _temporary(path)
    try:
        with os.fdopen(handle, mode, **encoding) as file:
            yield file
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's files are private
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def check_out(out: Path, force: bool, sources: list[str], made: str = "config.json") -> None:
    """Refuse to overwrite what should not be.

    Args:
        out: folder to write.
        force: whether it may replace one of its kind.
        sources: folders or files it is made of; what does not exist is a Hub id.
        made: what a folder of its kind has.

    Raises:
        ValueError: `out` is a file, is or contains a source or this repository, or is a folder that is not empty and
            either not `force`d or without `made`.
    """
    kept = [Path(source).resolve() for source in sources if os.path.exists(source)] + [ROOT]
    for path in kept:
        if path.is_relative_to(out.resolve()):
            raise ValueError(f"OUT {out} would overwrite {path}: choose another folder.")
    if out.exists() and not out.is_dir():
        raise ValueError(f"OUT {out} is a file, expected a folder.")
    if out.is_dir() and any(out.iterdir()):
        if not force:
            raise ValueError(f"OUT {out} exists and is not empty: choose another folder, or replace it with --force.")
        if not (out / made).exists():
            raise ValueError(f"OUT {out} has no {made}, so --force does not replace it: choose another folder.")


def put_folder(temporary: Path, out: Path) -> None:
    """Rename a finished folder to `out`, replacing what is there; readable again (safetensors writes private files)."""
    mask = os.umask(0)
    os.umask(mask)
    temporary.chmod(0o777 & ~mask)
    for path in temporary.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
    if not out.exists():
        temporary.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    out.rename(old)  # a rename replaces an empty folder
    temporary.rename(out)
    shutil.rmtree(old)


def write_text(path: Path, text: str) -> None:
    """Write under another name and rename."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1))
