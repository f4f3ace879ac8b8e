"""Run the fast tests with the lowest and the newest supported version of transformers.

    python tools/compat.py              # what `make compat` does
    python tools/compat.py 5.23.0       # with a version of your choice

- The range is that of pyproject.toml. The installed version is left out: `make test` has run with it.
- A version lies in `build/compat/transformers-X.Y.Z` (`pip install --target`) and comes first on PYTHONPATH.
- The shipped checkpoint has to say with it what it says with the installed version; then `TESTS` run.

Exit code: 0, all passed or nothing differs; 1, something failed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from release import ReleaseError, build, load, project

from microvlm.files import ROOT, atomic_folder

FOLDER = ROOT / "build" / "compat"
TESTS = [f"tests/test_{name}.py" for name in ("modeling", "processing", "generation", "memory_generation")]
TESTS += ["tests/test_cache.py", "tests/test_export.py"]


def supported() -> SpecifierSet:
    """Read the range of transformers in pyproject.toml, as `>=A,<B`."""
    (specifier,) = (r.specifier for r in map(Requirement, project()["dependencies"]) if r.name == "transformers")
    return specifier


def pip(*arguments: str, **options) -> subprocess.CompletedProcess:
    common = "--disable-pip-version-check --quiet --no-deps".split()
    return subprocess.run([sys.executable, "-m", "pip", "install", *common, *arguments], text=True, **options)


def newest(specifier: SpecifierSet) -> str | None:
    """Find the newest version in a range with pip; None: pip cannot look."""
    done = pip("--dry-run", "--ignore-installed", "--report", "-", f"transformers{specifier}", capture_output=True)
    return json.loads(done.stdout)["install"][0]["metadata"]["version"] if done.returncode == 0 else None


def overlay(number: str) -> Path:
    """Install one version of transformers into a folder, which stays for the next run."""
    folder = FOLDER / f"transformers-{number}"
    if not folder.is_dir():
        with atomic_folder(folder) as temporary:
            pip("--target", str(temporary), f"transformers=={number}", check=True)
    return folder


def use(path: Path | None) -> dict:
    """Use the shipped checkpoint with `path` first on PYTHONPATH; returns what it says."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "checkpoint")
        build(ROOT, folder, "local/checkpoint", "main")
        answers = load(folder, sys.executable, Path(scratch), {"PYTHONPATH": str(path)} if path else {})
    return answers | {"transformers": Version(answers["transformers"])}  # 5.23 and 5.23.0 are one version


def run(number: str, expected: dict) -> bool:
    """Use the checkpoint, then run the tests, with a version; returns whether all went well."""
    folder = overlay(number)
    try:
        answers, expected = use(folder), expected | {"transformers": Version(number)}
    except ReleaseError as error:
        answers = str(error)
    if answers != expected:
        print(f"transformers {number}: {answers}, expected {expected}", flush=True)
        return False
    print(f"transformers {number}: the checkpoint says the same; the tests:", flush=True)
    options = "-m pytest -n 2 --dist loadfile -p no:cacheprovider".split()
    command = [sys.executable, *options, "-m", "not slow", *TESTS]
    environment = os.environ | {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment).returncode == 0


def find_ends(installed: str) -> list[str]:
    """Find both ends of the range, and print them."""
    specifier = supported()
    (lowest,) = (s.version for s in specifier if s.operator == ">=")
    highest = newest(specifier)
    newest_text = highest or "unknown, pip cannot look"
    print(f"transformers{specifier}: lowest {lowest}, newest {newest_text}, installed {installed}.")
    return [lowest, highest or lowest]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", type=Version, help="default: the ends of the supported range")
    versions, installed = parser.parse_args(argv).versions, version("transformers")
    # 5.23 and 5.23.0 are one version
    wanted = {Version(str(v)) for v in versions or find_ends(installed)} - {Version(installed)}
    if not wanted:
        print("Nothing differs from the installed version, with which `make test` has run: nothing to do.")
        return 0
    expected = use(None)
    return 0 if all([run(str(number), expected) for number in sorted(wanted)]) else 1


if __name__ == "__main__":
    sys.exit(main())
