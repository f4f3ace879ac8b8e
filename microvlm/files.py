"""Write files and folders whole or not at all, and check outputs before the work."""

import glob
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

ROOT = Path(__file__).resolve().parents[1]
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")  # ends of lines, escapes, turned directions


def one_line(text: str) -> str:
    """Write as JSON does what a terminal would obey: `\\u001b`."""
    return CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _temporary(path: str | os.PathLike) -> Path:
    """Create an empty file with a name of its own in the folder of `path`, which can be written."""
    folder, name = os.path.split(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise OSError(f"cannot write {path}: there is no folder {folder}.")
    if not os.path.basename(path) or (os.path.exists(path) and not os.path.isfile(path)):
        raise OSError(f"cannot write {path}: it is not a regular file.")
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{name}.", suffix=".tmp", dir=folder)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}.") from error
    os.close(handle)
    return Path(temporary)


def _settle(path: Path) -> None:
    """Give a private temporary file or folder the mode of a new one; a file is on the disk before it has its name."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _sweep(path: str | os.PathLike) -> None:
    """Delete what killed processes have left next to `path`: temporary files and folders older than a day."""
    folder, name = os.path.split(os.path.abspath(path))
    for left in Path(folder).glob(f".{glob.escape(name)}.????????.tmp"):
        with suppress(OSError):  # another process was first
            if time.time() - left.stat().st_mtime > 86400:
                shutil.rmtree(left) if left.is_dir() else left.unlink()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make a folder and keep it from other runs meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise OSError(f"{folder} is of a run that still goes on: wait for it, or choose another output_dir.") from error


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Give the name of a new file that takes the place of `path` when all went well, and disappears when not."""
    temporary = _temporary(path)
    try:
        yield temporary
        _settle(temporary)
        os.replace(temporary, path)
        _sweep(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_file(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """Open a new file that takes the place of `path` when all went well, and disappears when not."""
    # a text keeps its own line ends
    encoding = {} if "b" in mode else {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
    with atomic_path(path) as temporary, open(temporary, mode, **encoding) as file:
        yield file


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Make a folder that takes the place of `out` when all went well, and disappears when not.

    Its files are readable: safetensors writes private ones.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    try:
        yield temporary
        for path in (temporary, *temporary.rglob("*")):
            _settle(path)
        if out.exists():
            # the old folder goes aside first and is deleted last: nothing is lost in between
            old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
            out.rename(old)  # a rename replaces an empty folder
            temporary.rename(out)
            shutil.rmtree(old)
        else:
            temporary.rename(out)
        _sweep(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1))


def check_outputs(inputs: Iterable[str], **outputs: str | None) -> None:
    """Refuse, before any work, outputs (option -> path, or None) that could not be written after it.

    Two options cannot have one path, nor the path of an input.
    """
    options, read = {}, {os.path.realpath(path) for path in inputs}
    for option, path in outputs.items():
        if path is None:
            continue
        # can it be written at all, and over what
        _temporary(path).unlink()
        if os.path.realpath(path) in read:
            raise ValueError(f"--{option} would be written over the input {path}.")
        if (other := options.setdefault(os.path.realpath(path), option)) != option:
            raise ValueError(f"--{other} and --{option} are the same file, {path}.")


def check_out(out: Path, force: bool, sources: list[str], marker: str = "config.json") -> None:
    """Refuse a folder that is not empty, but by `force` one with the file `marker`, or that holds a source."""
    parts = [Path(source).resolve() for source in sources if os.path.exists(source)] + [ROOT]
    inside = next((path for path in parts if path.is_relative_to(out.resolve())), None)
    is_full = out.is_dir() and any(out.iterdir())
    problems = {
        f"would overwrite {inside}: choose another folder.": inside is not None,
        "is a file, expected a folder.": out.exists() and not out.is_dir(),
        "exists and is not empty: choose another folder, or replace it with --force.": is_full and not force,
        f"has no {marker}, so --force does not replace it: choose another folder.": (
            is_full and not (out / marker).exists()
        ),
    }
    for problem, is_there in problems.items():
        if is_there:
            raise ValueError(f"OUT {out} {problem}")
