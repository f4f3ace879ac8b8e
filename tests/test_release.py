"""tools/release.py: the folder a Hub repo receives, and what is refused."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import release
from conftest import ROOT
from huggingface_hub import ModelCard

PIN = "someone/microvlm", "v1.2.3"


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "release.py"), *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("release") / "microvlm"
    folder.mkdir()
    release.build(ROOT, folder, *PIN)
    return folder


@pytest.fixture
def folder(complete, tmp_path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(complete, tmp_path / "microvlm"))


def change_card(folder: Path, old: str, new: str) -> None:
    card = (folder / "README.md").read_text()
    assert old in card
    (folder / "README.md").write_text(card.replace(old, new, 1))


def test_the_tag_is_the_version_of_the_project():
    version = re.search(r'(?m)^version = "(.+)"$', (ROOT / "pyproject.toml").read_text())[1]
    assert f"the revision in the card; default: v{version} " in " ".join(run("--help").stdout.split())


def test_release_of_this_repository(tmp_path):
    target = tmp_path / "out" / "microvlm"
    arguments = [target, "--reuse-environment", "--repo-id", PIN[0], "--tag", PIN[1]]
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in target.parent.iterdir()] == ["microvlm"]
    code = {f"{name}_microvlm.py" for name in ("cache", "configuration", "decoder", "kernels", "memory", "modeling")}
    assert code < {p.name for p in target.glob("*.py")} and not list(target.glob("data_*"))
    lines = done.stdout.splitlines()
    for path in target.rglob("*"):
        if path.is_file():
            assert f"{path.stat().st_size:>12,} {path.relative_to(target)}" in lines
    assert "taught and recalled: 'This is Bimo the swan.'" in done.stdout
    upload, tag = (shlex.split(line) for line in lines[-2:])
    assert upload[:5] == ["hf", "upload", PIN[0], str(target), "."]
    assert tag[:6] == ["hf", "repos", "tag", "create", *PIN]


def test_the_push_commands_are_hf_commands(tmp_path):
    """The command line reads them, down to the network, which there is none."""
    (tmp_path / "a.txt").write_text("a")
    hf = Path(sys.executable).with_name("hf")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    for line in release.push_commands(tmp_path, *PIN):
        _, *arguments = shlex.split(line)
        done = subprocess.run([hf, *arguments], env=environment, capture_output=True, text=True, timeout=300)
        said = done.stdout + done.stderr
        assert done.returncode == 1 and "ffline" in said, said  # 2: arguments it does not know


# --- the card


def test_snippets_load_what_was_released(complete):
    snippets = release.SNIPPET.findall((complete / "README.md").read_text())
    whole = "\n".join(snippets)
    assert '"."' not in whole
    assert f'from_pretrained("{PIN[0]}", revision="{PIN[1]}", trust_remote_code=True)\n' in whole
    assert f'pipeline("image-text-to-text", model="{PIN[0]}", revision="{PIN[1]}", trust_remote_code=True)' in whole
    assert len(snippets) == len(release.SNIPPET.findall((ROOT / "README.md").read_text()))


def test_the_card_says_what_the_hub_filters_by(complete):
    data = ModelCard.load(complete / "README.md").data
    assert (data.license, data.library_name) == ("apache-2.0", "transformers")
    assert data.pipeline_tag == "image-text-to-text"


def test_links_lead_somewhere():
    card = "[a](docs/a.md#x) [b](b.md) ![c](docs/c.png) [d](https://e.f/g) [h](#h)"
    assert release.resolve_links(card, {"b.md", "docs/c.png"}, None, "v1") == card.replace("[a](docs/a.md#x)", "a")
    there = card.replace("(docs/a.md#x)", "(https://e.f/r/blob/v1/docs/a.md#x)")
    assert release.resolve_links(card, {"b.md", "docs/c.png"}, "https://e.f/r/", "v1") == there


def test_links_in_code_are_no_links():
    code = "`a[i](x.md)` ``b`[i](x.png)``\n\n```bash\nc[i](x.md) ![d](x.png)\n```\n\n"
    card = code + "[`e`](docs/e.md) `f` [g](docs/g.md)"
    assert release.resolve_links(card, set(), None, "v1") == code + "`e` `f` g"


def test_the_card_says_what_runs_elsewhere(complete):
    card = (complete / "README.md").read_text()
    title = card.index("\n# MicroVLM\n")
    download = f"hf download {PIN[0]} --revision {PIN[1]} --local-dir microvlm"
    assert card[title:].startswith(
        f"\n# MicroVLM\n\n> The snippets open images of `examples/`: `{download}`, and run them there.\n> "
    )
    assert card.count("\n> This folder holds") == 1
    assert "[the source repository](https://e.f/r)" in release.add_note("# T\n\ntext\n", *PIN, "https://e.f/r")


# --- what is refused, each with its message


@pytest.mark.parametrize("name", ["memory_microvlm.py", "LICENSE"])
def test_missing_files(name, folder, tmp_path):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        release.build(folder, tmp_path / "again", *PIN)


def test_missing_images_of_the_card_leave_no_folder(folder, tmp_path):
    change_card(folder, "\n# MicroVLM\n", "\n# MicroVLM\n\n![x](docs/none.png)\n")
    with pytest.raises(SystemExit, match="^not released: .*docs/none.png'$"):
        release.main([str(tmp_path / "out" / "microvlm"), "--root", str(folder)])
    assert list((tmp_path / "out").iterdir()) == []


def test_code_that_does_not_run_leaves_no_folder(folder, tmp_path):
    """The files are all there, so only loading them can tell; the source's card has no `"."` left, and needs none."""
    with (folder / "memory_microvlm.py").open("a") as file:
        file.write('\nraise RuntimeError("broken on purpose")\n')
    target = tmp_path / "out" / "microvlm"
    done = run(target, "--root", folder, "--reuse-environment")
    assert done.returncode == 1
    assert done.stderr == "not released: it does not load: RuntimeError: broken on purpose\n"
    assert list(target.parent.iterdir()) == []


def test_other_folders_are_not_replaced(tmp_path, monkeypatch):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.md").write_text("mine")
    monkeypatch.setattr(release, "build", None)  # refused before anything is built
    with pytest.raises(SystemExit, match="^not released: .*mine is no release: give another path$"):
        release.main([str(mine)])
    assert [p.name for p in mine.iterdir()] == ["thesis.md"]


def test_relative_folder_in_a_fresh_environment(tmp_path, monkeypatch):
    """What `make release` does; the environment is a stand-in that runs this one's Python from where the real one would lie."""

    def environment(folder: Path) -> Path:
        python = folder / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
        return python

    monkeypatch.setattr(release, "fresh_environment", environment)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["release.py", "dist/nano", "--root", str(ROOT)])
    release.main()
    assert (tmp_path / "dist/nano/model.safetensors").exists()
    assert [path.name for path in (tmp_path / "dist").iterdir()] == ["nano"]
