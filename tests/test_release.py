"""tools/release.py: the folder a Hub repo receives, and what is refused."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import release
import torch
from conftest import ROOT

LIMIT = 32.0  # MB, for bf16 and packed weights alike
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
    arguments = [target, "--reuse-environment", "--max-weights", LIMIT, "--repo-id", PIN[0], "--tag", PIN[1]]
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
    assert release.problems(target, LIMIT) == []


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
    snippets = release.snippets((complete / "README.md").read_text())
    whole = "\n".join(snippets)
    assert '"."' not in whole
    assert f'from_pretrained("{PIN[0]}", revision="{PIN[1]}", trust_remote_code=True)\n' in whole
    assert f'pipeline("image-text-to-text", model="{PIN[0]}", revision="{PIN[1]}", trust_remote_code=True)' in whole
    assert len(snippets) == len(release.snippets((ROOT / "README.md").read_text()))


def test_links_lead_somewhere():
    card = "[a](docs/a.md#x) [b](b.md) ![c](docs/c.png) [d](https://e.f/g) [h](#h)"
    assert release.linked(card, {"b.md", "docs/c.png"}, None, "v1") == card.replace("[a](docs/a.md#x)", "a")
    there = card.replace("(docs/a.md#x)", "(https://e.f/r/blob/v1/docs/a.md#x)")
    assert release.linked(card, {"b.md", "docs/c.png"}, "https://e.f/r/", "v1") == there


def test_links_in_code_are_no_links(folder):
    code = "`a[i](x.md)` ``b`[i](x.png)``\n\n```bash\nc[i](x.md) ![d](x.png)\n```\n\n"
    card = code + "[`e`](docs/e.md) `f` [g](docs/g.md)"
    assert release.linked(card, set(), None, "v1") == code + "`e` `f` g"
    assert release.links(card) == [(False, "docs/e.md"), (False, "docs/g.md")] and not release.pictures_of(card)
    (folder / "README.md").write_text((folder / "README.md").read_text() + code)
    assert release.problems(folder, LIMIT) == []


def test_the_card_says_what_runs_elsewhere(complete):
    card = (complete / "README.md").read_text()
    title = card.index("\n# MicroVLM\n")
    download = f"hf download {PIN[0]} --revision {PIN[1]} --local-dir microvlm"
    assert card[title:].startswith(
        f"\n# MicroVLM\n\n> The snippets open pictures of `examples/`: `{download}`, and run them there.\n> "
    )
    assert card.count("\n> This folder holds") == 1
    assert "[the source repository](https://e.f/r)" in release.noted("# T\n\ntext\n", *PIN, "https://e.f/r")


def test_a_local_path_needs_no_revision(folder):
    change_card(folder, "```python\n", "```python\nAutoModel.from_pretrained('./mine', trust_remote_code=True)\n")
    assert release.problems(folder, LIMIT) == []


# --- what is refused, each with its message


@pytest.mark.parametrize("name", ["memory_microvlm.py", "triton_microvlm.py"])
def test_missing_code(name, folder, tmp_path):
    (folder / name).unlink()
    (problem,) = release.problems(folder, LIMIT)
    assert problem.startswith(f"{folder} is not a complete Hub repo: {name} is missing (imported by ")
    with pytest.raises(release.ReleaseError) as error:
        release.build(folder, tmp_path / "again", *PIN)
    assert str(error.value) == f"{name} is missing"


def test_missing_class(folder):
    path = folder / "processing_microvlm.py"
    path.write_text(path.read_text().replace("class MicroVLMProcessor(", "class Processor("))
    assert release.problems(folder, LIMIT) == [
        "processor_config.json: AutoProcessor is processing_microvlm.MicroVLMProcessor, "
        "but processing_microvlm.py defines no MicroVLMProcessor",
        "tokenizer_config.json: AutoProcessor is processing_microvlm.MicroVLMProcessor, "
        "but processing_microvlm.py defines no MicroVLMProcessor",
    ]


def test_pickles(folder):
    torch.save({"a": torch.zeros(2)}, folder / "extra.pt")
    torch.save({"a": torch.zeros(2)}, folder / "notes.txt")
    (folder / "examples" / "state.pkl").write_bytes(b"\x80\x04N.")
    (folder / "pytorch_model.bin").write_bytes(b"\0")
    assert release.problems(folder, LIMIT) == [
        "examples/state.pkl is a pickle: it runs code when it is loaded",
        "extra.pt is a pickle: it runs code when it is loaded",
        "notes.txt is a pickle: it runs code when it is loaded",
        "pytorch_model.bin does not belong in a release",
    ]


@pytest.mark.parametrize(
    "old,new,message",
    [
        ("license: apache-2.0", "license: mit", "README.md: license is 'mit', expected one of apache-2.0"),
        ("library_name: transformers\n", "", "README.md: library_name is None, expected 'transformers'"),
        (
            "pipeline_tag: image-text-to-text",
            "pipeline_tag: image-to-text",
            "README.md: pipeline_tag is 'image-to-text', expected 'image-text-to-text'",
        ),
        ("tags:\n", "tags: [7]\nkinds:\n", "README.md: tags is [7], expected a list of words"),
        ("![Recall", "![x](docs/none.png) ![Recall", "README.md: docs/none.png is not in the folder"),
        (', revision="v1.2.3"', "", "README.md: snippet 1, line 3: from_pretrained has no revision="),
        ('revision="v1.2.3"', "revision=None", "README.md: snippet 1, line 3: from_pretrained has no revision="),
        (
            'revision="v1.2.3"',
            'revision="main"',
            "README.md: snippet 1, line 3: from_pretrained has revision='main', which moves",
        ),
        (
            'model="someone/microvlm", revision="v1.2.3"',
            'model="someone/microvlm"',
            "README.md: snippet 2, line 3: pipeline has no revision=",
        ),
        (
            "```python\n",
            "```python\nmodel = AutoModel.from_pretrained(name)\n",
            "README.md: snippet 1, line 1: from_pretrained has no revision=",
        ),
        ("```python\n", "```python\nfrom\n", "README.md: snippet 1 is not Python: invalid syntax, line 1"),
    ],
)
def test_bad_cards(old, new, message, folder):
    change_card(folder, old, new)
    assert release.problems(folder, LIMIT) == [message]


def test_unreadable_metadata(folder):
    change_card(folder, "license: apache-2.0", "license: [")
    (problem,) = release.problems(folder, LIMIT)
    assert problem.startswith(f"{folder} is not a complete Hub repo: the metadata of README.md cannot be read (while")


@pytest.mark.parametrize("text", [b"Do what you like.\n", b"\xff\xfe"])
def test_licence_text(folder, text):
    (folder / "LICENSE").write_bytes(text)
    assert release.problems(folder, LIMIT) == ["LICENSE is not the text of apache-2.0"]


def test_what_check_repo_refuses_is_said_once(folder):
    (folder / "modeling_microvlm.py").write_bytes(b"\xff\xfe")
    config = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps(config | {"auto_map": [1]}))
    (problem,) = release.problems(folder, LIMIT)
    assert problem.endswith(
        ": modeling_microvlm.py is not UTF-8 text; auto_map of processor_config.json is not an object."
    )


def test_heavy_weights(folder):
    size = (folder / "model.safetensors").stat().st_size / 1e6
    done = run("--check", folder, "--max-weights", 1)
    message = f"not released: the weights have {size:.2f} MB, the limit is 1 MB (--max-weights)\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", message)
    assert run("--check", folder, "--max-weights", LIMIT).returncode == 0


def test_code_that_does_not_run_leaves_no_folder(folder, tmp_path):
    """The files are all there, so only loading them can tell; the source's card has no `"."` left, and needs none."""
    with (folder / "memory_microvlm.py").open("a") as file:
        file.write('\nraise RuntimeError("broken on purpose")\n')
    target = tmp_path / "out" / "microvlm"
    done = run(target, "--root", folder, "--reuse-environment", "--max-weights", LIMIT)
    assert done.returncode == 1
    assert done.stderr == "not released: it does not load: RuntimeError: broken on purpose\n"
    assert list(target.parent.iterdir()) == []


def test_other_folders_are_not_replaced(complete, tmp_path, monkeypatch):
    def put(target):
        built = Path(shutil.copytree(complete, tmp_path / "built"))
        try:
            release.put_in_place(built, target)
        finally:
            shutil.rmtree(built, ignore_errors=True)

    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.md").write_text("mine")
    with pytest.raises(release.ReleaseError, match="mine is no release: give another path$"):
        put(mine)
    assert [p.name for p in mine.iterdir()] == ["thesis.md"]
    target = tmp_path / "there"
    put(target)
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(release.ReleaseError, match="link is a link: give the path of the folder itself$"):
        put(tmp_path / "link")
    (tmp_path / "link").unlink()
    (target / "docs" / "old.png").write_bytes(b"old")
    put(target)  # a release takes the place of a release
    assert not (target / "docs" / "old.png").exists()
    (target / "notes.odt").write_text("mine")
    with pytest.raises(release.ReleaseError, match="there holds notes.odt, which no release wrote: give another path$"):
        put(target)
    assert json.loads((target / "config.json").read_text())["model_type"] == "microvlm"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "there"]
    monkeypatch.setattr(release, "build", None)  # refused before anything is built
    with pytest.raises(SystemExit, match="^not released: .*mine is no release: give another path$"):
        release.main([str(mine)])


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
    monkeypatch.setattr(sys, "argv", ["release.py", "dist/nano", "--root", str(ROOT), "--max-weights", str(LIMIT)])
    release.main()
    assert (tmp_path / "dist/nano/model.safetensors").exists()
    assert [path.name for path in (tmp_path / "dist").iterdir()] == ["nano"]
