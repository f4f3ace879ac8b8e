"""What README.md and docs say to type works: the tour is run, other commands name scripts and options that exist, links lead somewhere."""

import os
import re
import subprocess
import sys
from functools import cache

import pytest
from conftest import ROOT

PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), ROOT / "examples/README.md"])
ELSEWHERE = (
    "make ",
    "source ",
    "pip install ",
    "microvlm app",
)  # .ci/run; a page that waits for visitors (tests/test_app.py)


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


def test_the_tour_runs(copy):
    """The tour in its order, each block a process of its own, but for the lines of `ELSEWHERE`."""
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
                done = run(["bash", "-c", line], copy)
                assert done.returncode == 0, f"{line}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
                assert done.stdout.strip() or done.stderr.strip(), line


@cache
def options_of(script: str) -> str:
    """Sources of a script and of what it imports from this repository: options are written out in them."""
    path = ROOT / script
    names = re.findall(r"^\s*(?:from|import) ([\w.]+)", path.read_text(), re.MULTILINE)
    beside = [folder / f"{name.replace('.', '/')}.py" for name in names for folder in (ROOT, path.parent)]
    return "".join(file.read_text() for file in [path, *beside] if file.is_file())


def commands(text: str) -> list[str]:
    """Lines that call a script of this repository, wherever they stand."""
    text = text.replace("\\\n", " ")
    fenced = [line for language, content in blocks(text) if language in ("bash", "sh") for line in content.splitlines()]
    inline = re.findall(r"`(python [^`\n]+\.py[^`\n]*)`", text)
    return [c.split(" #")[0].strip() for c in [*fenced, *inline] if re.search(r"\bpython \S+\.py\b", c)]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_exist(page):
    for command in commands(page.read_text()):
        for script, rest in re.findall(r"\bpython (\S+\.py)\b([^|;&]*)", command):
            assert (ROOT / script).is_file(), command
            flags = re.findall(r"(?<![\w-])(--[a-z][\w-]*)", rest)
            missing = [f for f in flags if f != "--help" and f'"{f}"' not in options_of(script)]
            assert not missing, f"{command}: {script} has no {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


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
    assert commands("x `python a.py --b c` y\n```sh\npython d.py \\\n  --e\n```") == [
        "python d.py    --e",
        "python a.py --b c",
    ]
    assert sum(len(commands(page.read_text())) for page in PAGES) > 40
