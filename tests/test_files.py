"""Files and folders come whole or not at all, and leave nothing behind."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from microvlm.files import atomic_file, atomic_folder, atomic_path

KILLED = """
import os, signal, sys
from pathlib import Path
from microvlm.files import atomic_folder, atomic_path
with atomic_path(sys.argv[1]) as file, atomic_folder(Path(sys.argv[2])) as folder:
    (folder / "a.txt").write_text(file.name)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    steps = []
    for name in ("fsync", "replace", "rename"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *args, name=name, real=real: (steps.append((name, args[0])), real(*args))[1]
        )
    monkeypatch.setattr(os, "fsync", lambda file: steps.append(("fsync", os.fstat(file).st_size)))
    with atomic_file(tmp_path / "a.txt") as file:
        file.write("whole")
    assert [name for name, _ in steps] == ["fsync", "replace"] and steps[0][1] == 5
    steps.clear()
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "in").mkdir()
        for name in ("a.txt", "in/b.txt"):
            (folder / name).write_text("all of it")
    assert steps[:2] == [("fsync", 9)] * 2 and steps[2][0] == "rename"


@pytest.mark.parametrize("name", ["a[1].txt", "b"])
def test_what_killed_processes_have_left_goes_after_a_day(tmp_path, name):
    out = tmp_path / f"{name} folder"
    command = [sys.executable, "-c", KILLED, tmp_path / name, out]
    killed = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)})
    left = sorted(tmp_path.iterdir())
    assert killed.returncode == -signal.SIGKILL and len(left) == 2 and not out.exists()

    def write() -> set[str]:
        with atomic_path(tmp_path / name) as file, atomic_folder(out) as folder:
            file.write_text("whole")
            (folder / "a.txt").write_text("whole")
        return {path.name for path in tmp_path.iterdir()}

    others = {f".other.{name}.0.tmp", f".{name}.longer.abcdefgh.tmp"}
    for other in others:
        (tmp_path / other).touch()
    ours = {name, out.name, *others}
    assert write() == ours | {path.name for path in left}  # they may be of a process that still writes
    for path in (*left, *(tmp_path / other for other in others)):
        os.utime(path, (time.time() - 90_000,) * 2)
    assert write() == ours
