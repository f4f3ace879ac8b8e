"""Run the fast tests with the lowest and the newest supported version of transformers.

    python tools/compat.py              # what `make compat` does
    python tools/compat.py 5.23.0       # with a version of your choice

- The range is that of pyproject.toml; `TRANSFORMERS` in configuration_microvlm.py has to say the same. The installed
  version is left out: `make test` has run with it.
- A version lies in `build/compat/transformers-X.Y.Z` (`pip install --target`) and comes first on PYTHONPATH.
- The shipped checkpoint has to say with it what it says with the installed version; then `TESTS` run.

Exit code: 0, all passed or nothing differs; 1, something failed; 2, the ranges differ or pip cannot find a version.
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

from microvlm.files import ROOT

FOLDER = ROOT / "build" / "compat"
TESTS = [f"tests/test_{name}.py" for name in ("modeling", "processing", "generation", "memory_generation")]
TESTS += ["tests/test_cache.py", "tests/test_export.py"]


class CompatError(Exception):
    """The ranges do not agree, or pip does not find a version."""


def supported(root: Path = ROOT) -> SpecifierSet:
    """Read the range of transformers in pyproject.toml, as `>=A,<B`.

    Raises:
        CompatError: the remote code says another range.
    """
    dependencies = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    (specifier,) = (r.specifier for r in map(Requirement, dependencies) if r.name == "transformers")
    ranges = {}
    for node in ast.parse((root / "configuration_microvlm.py").read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "TRANSFORMERS":
            ranges = dict(zip((">=", "<"), ast.literal_eval(node.value)))
    if {s.operator: s.version for s in specifier} != ranges:
        raise CompatError(f"pyproject.toml says transformers{specifier}, configuration_microvlm.py {ranges}.")
    return specifier


def newest(specifier: SpecifierSet) -> str | None:
    """Find the newest version in a range with pip; None: pip cannot look."""
    done = pip("--dry-run", "--quiet", "--no-deps", "--ignore-installed", "--report", "-", f"transformers{specifier}")
    return json.loads(done.stdout)["install"][0]["metadata"]["version"] if done.returncode == 0 else None


def pip(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def overlay(number: str) -> Path:
    """Install one version of transformers into a folder, which stays for the next run.

    Raises:
        CompatError: pip's last line.
    """
    folder = FOLDER / f"transformers-{number}"
    if not folder.is_dir():
        FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDER) as temporary:
            done = pip("--quiet", "--no-deps", "--target", f"{temporary}/new", f"transformers=={number}")
            if done.returncode:
                raise CompatError(f"transformers {number}: {done.stderr.strip().splitlines()[-1]}")
            os.replace(f"{temporary}/new", folder)
    return folder


def use(path: Path | None) -> dict:
    """Use the shipped checkpoint with `path` first on PYTHONPATH; returns what it says.

    Raises:
        ReleaseError: it does not load.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "checkpoint")
        for name in {*FILES, *code_files(ROOT)}:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
        return load(folder, sys.executable, Path(scratch), {"PYTHONPATH": str(path)} if path else {})


def difference(answers: dict, expected: dict, number: str) -> str | None:
    """Say how the answers of `use` differ from the installed version's; None: they do not."""
    if Version(answers["transformers"]) != Version(number):
        return f"it ran with {answers['transformers']}."
    for name, value in expected.items():
        if name != "transformers" and answers.get(name) != value:
            return f"{name} is {answers.get(name)!r}, with the installed version {value!r}."
    return None


def run(number: str, expected: dict) -> bool:
    """Use the checkpoint, then run the tests, with a version; returns whether all went well."""
    folder = overlay(number)
    try:
        problem = difference(use(folder), expected, number)
    except ReleaseError as error:
        problem = str(error)
    if problem:
        print(f"transformers {number}: {problem}", flush=True)
        return False
    print(f"transformers {number}: the checkpoint says the same; the tests:", flush=True)
    options = "-m pytest -n 2 --dist loadfile -p no:cacheprovider".split()
    command = [sys.executable, *options, "-m", "not slow", *TESTS]
    environment = os.environ | {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment).returncode == 0


def version_number(text: str) -> str:
    return str(Version(text))


def versions_of(specifier: SpecifierSet, installed: str) -> list[str]:
    """Find both ends of the range, and print them."""
    (lowest,) = (s.version for s in specifier if s.operator == ">=")
    highest = newest(specifier)
    ends = f"lowest {lowest}, newest {highest or 'unknown, pip cannot look'}, installed {installed}"
    print(f"transformers{specifier}: {ends}.")
    return [lowest] + ([highest] if highest else [])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", type=version_number, help="default: the ends of the supported range")
    options = parser.parse_args(argv)
    installed = version("transformers")
    try:
        specifier = supported()
        numbers = options.versions or versions_of(specifier, installed)
        # 5.23 and 5.23.0 are one version
        numbers = sorted({Version(v): v for v in numbers if Version(v) != Version(installed)}.values(), key=Version)
        if not numbers:
            print("Nothing differs from the installed version, with which `make test` has run: nothing to do.")
            return 0
        expected = use(None)
        return 0 if all([run(number, expected) for number in numbers]) else 1
    except (CompatError, ReleaseError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
