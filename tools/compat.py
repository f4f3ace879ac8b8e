"""Run the fast tests with the other supported versions of transformers: the lowest and the newest that there is.

    python tools/compat.py              # what `make compat` does
    python tools/compat.py 5.23.0       # with a version of your choice

The range is the one of pyproject.toml; `TRANSFORMERS` in configuration_microvlm.py has to say the same. Of its two ends those are run that
differ from the installed version, which `make test` has run. A version is put into `build/compat/transformers-X.Y.Z` with `pip install
--target`, and comes first on PYTHONPATH; everything else is the installed environment. First the shipped checkpoint is used (captions, a
taught fact, pipeline, a saved copy), and has to say what it says with the installed version; then `TESTS` run, without the slow ones.

Exit code: 0, all passed or nothing differs; 1, something failed; 2, the ranges do not agree or pip cannot find a version.
"""

import argparse
import ast
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from release import FILES, ReleaseError, code_files, load

ROOT = Path(__file__).resolve().parents[1]

FOLDER = ROOT / "build" / "compat"
TESTS = (
    "tests/test_modeling.py",
    "tests/test_processing.py",
    "tests/test_generation.py",
    "tests/test_memory_generation.py",
    "tests/test_cache.py",
    "tests/test_export.py",
)


class CompatError(Exception):
    """The ranges do not agree, or pip does not find a version."""


def supported(root: Path = ROOT) -> SpecifierSet:
    """The range of transformers in pyproject.toml, as `>=A,<B`.

    Raises:
        CompatError: the remote code says another range, or the range has no lowest version.
    """
    dependencies = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    (found,) = (r.specifier for r in map(Requirement, dependencies) if r.name == "transformers")
    ranges = {}
    for node in ast.parse((root / "configuration_microvlm.py").read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "TRANSFORMERS":
            ranges = dict(zip((">=", "<"), ast.literal_eval(node.value)))
    if {s.operator: s.version for s in found} != ranges:
        raise CompatError(f"pyproject.toml says transformers{found}, configuration_microvlm.py {ranges}.")
    return found


def newest(wanted: SpecifierSet) -> str | None:
    """The newest version in a range that pip can find; None: pip cannot look."""
    done = pip("--dry-run", "--quiet", "--no-deps", "--ignore-installed", "--report", "-", f"transformers{wanted}")
    return json.loads(done.stdout)["install"][0]["metadata"]["version"] if done.returncode == 0 else None


def pip(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def overlay(wanted: str) -> Path:
    """A folder that holds a version of transformers and nothing else; it stays for the next run.

    Raises:
        CompatError: pip's last line.
    """
    folder = FOLDER / f"transformers-{wanted}"
    if not folder.is_dir():
        FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDER) as temporary:
            done = pip("--quiet", "--no-deps", "--target", f"{temporary}/new", f"transformers=={wanted}")
            if done.returncode:
                raise CompatError(f"transformers {wanted}: {done.stderr.strip().splitlines()[-1]}")
            os.replace(f"{temporary}/new", folder)
    return folder


def use(path: Path | None) -> dict:
    """What the shipped checkpoint says, with what is at `path` first on PYTHONPATH. Raises ReleaseError."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "checkpoint")
        for name in {*FILES, *code_files(ROOT)}:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
        return load(folder, sys.executable, Path(scratch), {"PYTHONPATH": str(path)} if path else {})


def differs(said: dict, expected: dict, wanted: str) -> str | None:
    """In words, how what `use` gave with version `wanted` is not what it gave with the installed one; None: it is."""
    if Version(said["transformers"]) != Version(wanted):
        return f"it ran with {said['transformers']}."
    changed = [name for name in expected if name != "transformers" and said.get(name) != expected[name]]
    return (
        f"{changed[0]} is {said.get(changed[0])!r}, with the installed version {expected[changed[0]]!r}."
        if changed
        else None
    )


def run(wanted: str, expected: dict) -> bool:
    """Use the checkpoint, then run the tests, with a version; whether all went well."""
    folder = overlay(wanted)
    try:
        said = use(folder)
    except ReleaseError as error:
        print(f"transformers {wanted}: {error}", flush=True)
        return False
    if difference := differs(said, expected, wanted):
        print(f"transformers {wanted}: {difference}", flush=True)
        return False
    print(f"transformers {wanted}: the checkpoint says the same; the tests:", flush=True)
    command = [sys.executable, "-m", "pytest", "-m", "not slow", "-p", "no:cacheprovider", *TESTS]
    environment = os.environ | {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment).returncode == 0


def version_number(text: str) -> str:
    return str(Version(text))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", type=version_number, help="default: the ends of the supported range")
    options = parser.parse_args(argv)
    installed, chosen = version("transformers"), options.versions
    try:
        wanted = supported()
        if not chosen:
            (lowest,) = (s.version for s in wanted if s.operator == ">=")
            highest = newest(wanted)
            print(
                f"transformers{wanted}: lowest {lowest}, newest {highest or 'unknown, pip cannot look'}, installed {installed}."
            )
            chosen = [v for v in (lowest, highest) if v is not None]
        # 5.23 and 5.23.0 are one version
        chosen = sorted({Version(v): v for v in chosen if Version(v) != Version(installed)}.values(), key=Version)
        if not chosen:
            print("Nothing differs from the installed version, with which `make test` has run: nothing to do.")
            return 0
        expected = use(None)
        return 0 if all([run(v, expected) for v in chosen]) else 1
    except (CompatError, ReleaseError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
