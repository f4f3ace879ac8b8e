"""The command line as a whole: its door, help without torch, exit codes, the wheel."""

import subprocess
import sys

import pytest
from conftest import ROOT, microvlm

from microvlm import cli

HELP = """
import runpy, sys
sys.argv = ["microvlm", "--help"]
try:
    runpy.run_module("microvlm", run_name="__main__")
except SystemExit as end:
    assert not end.code
print(sorted({"torch", "transformers", "datasets", "numpy"} & set(sys.modules)))
"""


def test_help_imports_no_torch():
    """Through `python -m microvlm`, which the console script equals."""
    done = subprocess.run([sys.executable, "-c", HELP], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stderr
    assert {"caption", "memory", "train", "evaluate", "push"} <= set(done.stdout.split())


def test_a_wheel_has_the_model_and_the_templates(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "README.md", ROOT / "LICENSE", ROOT / "microvlm"):
        (source / path.name).symlink_to(path)
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path / "built")]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    built = {str(path.relative_to(tmp_path / "built")) for path in (tmp_path / "built").rglob("*.*")}
    expected = {f"microvlm/{path.name}" for path in ROOT.glob("*_microvlm.py")}
    expected |= {str(path.relative_to(ROOT)) for path in (ROOT / "microvlm").rglob("*.*") if path.suffix != ".pyc"}
    assert built == expected | {"microvlm/train_hf.py"}


@pytest.mark.parametrize("command", [["memory"], ["export"], ["visualize"], ["caption"], ["train"], ["evaluate"]])
def test_every_command_has_help(command, capsys):
    assert microvlm(*command, "--help") == 0
    assert "Usage: microvlm " + " ".join(command) in capsys.readouterr().out


def test_no_command_and_a_wrong_one_are_wrong_use(capsys):
    assert microvlm() == 2 and "Usage: microvlm" in "".join(capsys.readouterr())
    assert microvlm("paint") == 2 and "No such command 'paint'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error,code,line",
    [
        (OSError("no\nsuch  file"), 1, "microvlm: no such file\n"),
        (ValueError("bad"), 1, "microvlm: bad\n"),
        (KeyboardInterrupt(), 130, "microvlm: interrupted\n"),
        (KeyboardInterrupt("interrupted after 2 images"), 130, "microvlm: interrupted after 2 images\n"),
        (
            ModuleNotFoundError("No module named 'onnx.x'", name="onnx.x"),
            1,
            "microvlm: this needs the package onnx: pip install 'microvlm[export]'\n",
        ),
        (ImportError("please install this"), 1, "microvlm: please install this\n"),
        (BrokenPipeError(32, "Broken pipe"), 1, ""),
    ],
)
def test_errors_are_a_line_and_a_code(monkeypatch, capsys, error, code, line):
    def fail(**options):
        raise error

    monkeypatch.setattr("microvlm.hub.main", fail)
    stdout, stderr = sys.stdout, sys.stderr
    assert microvlm("push", "run", "someone/toy") == code
    sys.stdout, sys.stderr = stdout, stderr  # typer hides both after a broken pipe
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ModuleNotFoundError("No module named 'x'", name="x")])
def test_a_bug_keeps_its_traceback(monkeypatch, error):
    def fail(**options):
        raise error

    monkeypatch.setattr("microvlm.hub.main", fail)
    with pytest.raises(type(error)):
        cli.app(["push", "run", "someone/toy"])


def test_training_gets_its_recipe_and_overrides(monkeypatch):
    calls = []
    monkeypatch.setattr("microvlm.train_hf.main", calls.append)
    assert microvlm("train", "recipe.yaml", "--set", "a=1", "--resume", "--set", "b.c=x") == 0
    assert calls == [["recipe.yaml", "--set", "a=1", "--set", "b.c=x", "--resume"]]
