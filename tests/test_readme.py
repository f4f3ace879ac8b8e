"""What README.md and docs say to type works: the tour runs, other commands have the options they name, links lead
somewhere."""

import json
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import typer
from conftest import ROOT, microvlm
from huggingface_hub import ModelCard
from toy_data import use_cache

from microvlm.cli import app
from microvlm.evaluate.card import card_results
from microvlm.evaluate.report import markdown
from tools.figures import SEEN, TABLE, card_scores, with_figures

PAGES = sorted([*ROOT.glob("*/README.md"), *ROOT.glob("docs/*.md"), ROOT / "README.md"])
# .ci/run runs the first three; the last is a page that waits for visitors (tests/test_app.py)
ELSEWHERE = ("make ", "source ", "pip install ", "microvlm app")
SCRIPT = r"\bpython (?:-m )?((?:benchmarks|tests)\.\w+|\S+\.py)\b"


def blocks(text: str) -> list[tuple[str, str]]:
    """Language and content of the fenced blocks."""
    return re.findall(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def section(text: str, title: str) -> str:
    start = text.index(f"\n## {title}\n")
    end = text.find("\n## ", start + 1)
    return text[start : end if end > 0 else None]


@pytest.fixture
def copy(tmp_path):
    """This repository by links, without what running leaves in it: what .gitignore names."""
    left = {line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if "*" not in line}
    for path in ROOT.iterdir():
        if path.name not in (".git", ".venv", *left):
            (tmp_path / path.name).symlink_to(path)
    return tmp_path


def run(command: list[str], folder) -> subprocess.CompletedProcess:
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"HF_HUB_OFFLINE": "1", "PATH": path, "HF_DATASETS_CACHE": str(folder / "cache")}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=900)


def test_the_tour_runs(copy, monkeypatch, capfd):
    """The tour in its order, but for the lines of `ELSEWHERE`; each block of Python is a process of its own."""
    use_cache(monkeypatch, copy / "cache")
    monkeypatch.chdir(copy)
    found = blocks(section((ROOT / "README.md").read_text(), "Ten-minute tour"))
    assert {language for language, _ in found} == {"bash", "python"}
    for language, content in found:
        if language == "python":
            done = run([sys.executable, "-c", content], copy)
            assert done.returncode == 0 and done.stdout.strip(), f"{content}\n{done.stderr[-3000:]}"
            continue
        for line in content.splitlines():
            line = line.split("#")[0].strip()
            if line and not line.startswith(ELSEWHERE):
                program, *arguments = shlex.split(line)
                assert program == "microvlm" and microvlm(*arguments) == 0, line
                assert "".join(capfd.readouterr()).strip(), line


def script_of(name: str) -> Path:
    """Find the file that `python NAME.py` or `python -m NAME` runs."""
    path = ROOT / (name if name.endswith(".py") else name.replace(".", "/"))
    return path / "run.py" if path.is_dir() else path.with_suffix(".py")


@cache
def options_of(script: Path) -> str:
    """Join the sources of a script and of what it imports from this repository: options are written out in them."""
    names = re.findall(r"^\s*(?:from|import) ([\w.]+)", script.read_text(), re.MULTILINE)
    imported = [folder / f"{name.replace('.', '/')}.py" for name in names for folder in (ROOT, script.parent)]
    return "".join(file.read_text() for file in [script, *imported] if file.is_file())


def click_command(words: list[str]):
    """Find the command that words after `microvlm` name, and the words left: `memory add FILE` is `add` of `memory`."""
    command = typer.main.get_command(app)
    while words and hasattr(command, "commands"):
        command, words = command.commands.get(words[0]), words[1:]
    return command, words


def commands(text: str) -> list[str]:
    """List the lines that call a script or a command of this repository, wherever they stand."""
    text = text.replace("\\\n", " ")
    fenced = [line for language, content in blocks(text) if language in ("bash", "sh") for line in content.splitlines()]
    inline = re.findall(r"`((?:python|microvlm) [^`\n]+)`", text)
    calls = [line.split(" #")[0].strip() for line in [*fenced, *inline]]
    return [call for call in calls if re.search(rf"{SCRIPT}|^microvlm [a-z]", call)]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_exist(page):
    for command in commands(page.read_text()):
        for script, rest in re.findall(rf"{SCRIPT}([^|;&]*)", command):
            assert script_of(script).is_file(), command
            flags = re.findall(r"(?<![\w-])(--[a-z][\w-]*)", rest)
            missing = [f for f in flags if f != "--help" and f'"{f}"' not in options_of(script_of(script))]
            assert not missing, f"{command}: {script} has no {missing}"
        if command.startswith("microvlm "):
            found, words = click_command(shlex.split(command)[1:])
            assert found is not None, f"{command}: no such command"
            known = {option for parameter in found.params for option in [*parameter.opts, *parameter.secondary_opts]}
            missing = [word for word in words if word.startswith("--") and word not in known | {"--help"}]
            assert not missing, f"{command}: it has no {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_are_complete(page, monkeypatch):
    """The fenced commands have all arguments that they need, of the kind that they need."""
    monkeypatch.chdir(ROOT)
    text = "".join(content for language, content in blocks(page.read_text()) if language in ("bash", "sh"))
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith("microvlm "):
            found, words = click_command(shlex.split(line, comments=True)[1:])
            found.make_context(line, words)  # a UsageError says what is wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "log.md"], ids=lambda p: str(p.relative_to(ROOT)))
def test_files_exist(page):
    """Every recipe, tool, benchmark and module that a page names; docs/log.md and the old names may be gone."""
    text = page.read_text().partition("\n## Old names\n")[0]
    folders = r"\b(?:recipes|tools|benchmarks|configs|microvlm)/[\w./-]+\.(?:py|yaml|json|sh)\b"
    paths = [*re.findall(folders, text), *re.findall(r"(?<![/\w])\w+_microvlm\.py\b", text)]
    assert not [path for path in paths if not (ROOT / path).is_file()]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_tests_exist(page):
    """Every test file and test that a page names, and for `pytest FILE -k "a or b"` a test for a and for b."""
    text = page.read_text()
    for file, name in re.findall(r"\b(tests/\w+\.py)(?:::(\w+))?", text):
        assert (ROOT / file).is_file() and (not name or f"def {name}(" in (ROOT / file).read_text()), f"{file}::{name}"
    for file, words in re.findall(r'pytest (tests/\w+\.py) -k "([^"]+)"', text):
        tests = " ".join(re.findall(r"def (test_\w+)", (ROOT / file).read_text()))
        assert all(word in tests for word in words.split(" or ")), f"{file} -k {words}"


def test_what_these_tests_find():
    """They read what is there."""
    assert blocks("a\n```bash\nls\n```\n") == [("bash", "ls\n")]
    assert commands("x `python -m tests.a --b c` `microvlm app` y\n```sh\npython d.py \\\n  --e\n```") == [
        "python d.py    --e",
        "python -m tests.a --b c",
        "microvlm app",
    ]
    assert sum(len(commands(page.read_text())) for page in PAGES) > 40


def test_tables_take_printed_figures():
    """A table takes the rows of the first printed one that has its columns, in its own order; others stay."""
    page = "# a\n\n| c | x |\n| ---: | --- |\n| 1 | old |\n\n| other |\n| --- |\n| 2 |\nend\n"
    printed = "| x | b | c |\n| --- | ---: | ---: |\n| new | 3 | 4 |\n| a \\| b | 5 | 6 |\n"
    expected = page.replace("| 1 | old |\n", "| 4 | new |\n| 6 | a \\| b |\n")
    assert with_figures(page, [printed]) == expected and with_figures(expected, []) == expected


@pytest.fixture(scope="module")
def scores() -> dict:
    return json.loads((ROOT / "docs/scores.json").read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_pages_have_the_scores(page, scores):
    """Tables of what `microvlm evaluate` measures have the figures of docs/scores.json."""
    assert with_figures(page.read_text(), TABLE.findall(markdown(scores))) == page.read_text()


def test_some_pages_have_scores(scores):
    """The test above reads tables: without their figures these pages would be others."""
    pages = [(ROOT / name).read_text() for name in ("README.md", "docs/evaluation.md", "docs/memory.md")]
    tables = [f"{table.partition(chr(10))[0]}\n" for table in TABLE.findall(markdown(scores))]
    assert all(with_figures(page, tables) != page for page in pages)


def test_the_card_has_the_scores(scores):
    """The card's metadata is what docs/scores.json says of captions and of the largest memory; at most twelve."""
    results = {r.metric_type: r.metric_value for r in ModelCard.load(ROOT / "README.md").data.eval_results}
    assert results == {r.metric_type: r.metric_value for r in card_results(card_scores(scores))}
    assert 0 < len(results) <= 12 and results["exact"] == round(scores[SEEN]["model"]["exact"], 6)
