"""Build the folder that a Hub repo receives, and load it in an environment of its own. Nothing is sent.

    python tools/release.py dist/microvlm --repository https://github.com/someone/microvlm

- The folder holds weights, config, processor, tokenizer, the code that `auto_map` names with what it imports, the
  card with the images it names, licence and attribution.
- In the card, snippets load from the Hub id at the released tag. Links to files outside the folder lead to
  --repository, or become plain text.
- tools/load_release.py uses it in another process, offline, in a new virtual environment.
- The folder appears under its name only when all of that went well. The commands that push it are printed.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path
from shutil import copyfile

from transformers.dynamic_module_utils import get_relative_import_files

from microvlm.files import ROOT, atomic_folder

FILES = (
    *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    *("processor_config.json", "chat_template.jinja", "README.md", "LICENSE", "ATTRIBUTION.md", "examples/LICENSES.md"),
)
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
# a link, or code, in which nothing is a link
LINK_OR_CODE = re.compile(
    r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)"
    r"|^```.*?^```|(?<!`)(?P<ticks>`+)(?!`)(?:(?!\n\n).)+?(?<!`)(?P=ticks)(?!`)",
    re.MULTILINE | re.DOTALL,
)
ABSOLUTE = re.compile(r"[a-z]+:|/")
IMAGE = re.compile(r"\b(?:docs|examples)/[\w-]+\.png\b")


class ReleaseError(ValueError):
    """The folder cannot be built, or does not load."""


def code_files(root: Path) -> list[str]:
    """List the Python files that `auto_map` needs, directly or not."""
    needed = set()
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        for reference in json.loads((root / name).read_text()).get("auto_map", {}).values():
            needed.add(root / f"{reference.split('.')[0]}.py")
    for path in sorted(needed):
        needed |= {Path(file) for file in get_relative_import_files(path)}
    return sorted(path.name for path in needed)


def pin_snippets(card: str, repo_id: str, revision: str) -> str:
    """Let the card's snippets load from a Hub id at a revision instead of `"."`."""

    def pin(match: re.Match) -> str:
        target = f'from_pretrained("{repo_id}", revision="{revision}", trust_remote_code=True)'
        code = re.sub(r'from_pretrained\("\.", trust_remote_code=True\)(?:  # or "[^\n]*)?', target, match[0])
        return re.sub(r'(pipeline\([^\n]*)model="\."', rf'\1model="{repo_id}", revision="{revision}"', code)

    return SNIPPET.sub(pin, card)


def resolve_links(card: str, files: set[str], repository: str | None, revision: str) -> str:
    """Point links outside the folder to the repository, or make them plain text."""

    def resolve(match: re.Match) -> str:
        mark, text, target, part = match[1], match[2], match[3], match[4] or ""
        if target is None or ABSOLUTE.match(target) or target in files:
            return match[0]
        return f"{mark}[{text}]({repository.rstrip('/')}/blob/{revision}/{target}{part})" if repository else text

    return LINK_OR_CODE.sub(resolve, card)


def add_note(card: str, repo_id: str, revision: str, repository: str | None) -> str:
    """Say under the title where the snippets find images, and what needs the repository."""
    source = f"[the source repository]({repository})" if repository else "the source repository"
    download = f"hf download {repo_id} --revision {revision} --local-dir microvlm"
    note = (
        f"> The snippets open images of `examples/`: `{download}`, and run them there.\n"
        f"> This folder holds the model and its code. `make` and `microvlm` run in {source}."
    )
    return re.sub(r"^# .+$", lambda title: f"{title[0]}\n\n{note}", card, count=1, flags=re.MULTILINE)


def build(root: Path, folder: Path, repo_id: str, revision: str, repository: str | None = None) -> None:
    """Copy what a Hub repo needs into a folder, and adapt its card."""
    card = pin_snippets((root / "README.md").read_text(encoding="utf-8"), repo_id, revision)
    names = {*FILES, *code_files(root), *IMAGE.findall(card)}
    for name in sorted(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        copyfile(root / name, folder / name)
    card = add_note(resolve_links(card, names, repository, revision), repo_id, revision, repository)
    (folder / "README.md").write_text(card, encoding="utf-8")


def project() -> dict:
    """Read the project's table of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def fresh_environment(folder: Path) -> Path:
    """Make a virtual environment with the runtime dependencies; returns its Python."""
    venv.create(folder, symlinks=True, with_pip=True)
    python = folder / "bin" / "python"
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *project()["dependencies"]]
    subprocess.run(command, check=True)
    return python


def load(folder: Path, python: Path | str, scratch: Path, variables: dict[str, str] | None = None) -> dict:
    """Load a release in another process, offline, from elsewhere; returns what tools/load_release.py prints.

    Raises:
        ReleaseError: the last line that the process wrote to stderr, or that it wrote into the folder.
    """
    # away from the checkout and from caches
    work = scratch / "work"
    work.mkdir(parents=True)
    ours = ("PYTHONPATH", "HF_MODULES_CACHE", "HF_HUB_CACHE", "HF_TOKEN")
    environment = {name: value for name, value in os.environ.items() if name not in ours} | (variables or {})
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(scratch / "home"), "TOKENIZERS_PARALLELISM": "false"}
    # run, and check that nothing was written
    command = [python, str(ROOT / "tools" / "load_release.py"), str(folder.resolve())]
    before = sorted(folder.rglob("*"))
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    if done.returncode:
        last_line = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise ReleaseError(f"it does not load: {last_line}")
    if sorted(folder.rglob("*")) != before:
        raise ReleaseError("loading it has written into the folder")
    return json.loads(done.stdout.splitlines()[-1])


def push_commands(folder: Path, repo_id: str, revision: str) -> list[str]:
    """Write the commands that put a release on the Hub, delete other files there, and tag it."""
    message = f"Release {revision}"
    upload = ["hf", "upload", repo_id, str(folder), ".", "--revision", "main", "--delete", "*"]
    tag = ["hf", "repos", "tag", "create", repo_id, revision, "--revision", "main", "--message", message]
    return [shlex.join([*upload, "--commit-message", message]), shlex.join(tag)]


def release(target: Path, options: argparse.Namespace) -> None:
    """Build, load, put in place, print."""
    if target.exists() and any(target.iterdir()) and not (target / "ATTRIBUTION.md").is_file():
        raise ReleaseError(f"{target} is no release: give another path")
    parent = target.parent.absolute()
    with atomic_folder(target) as folder, tempfile.TemporaryDirectory(prefix=".release-", dir=parent) as scratch:
        build(Path(options.root), folder, options.repo_id, options.tag, options.repository)
        python = sys.executable if options.reuse_environment else fresh_environment(Path(scratch) / "venv")
        result = load(folder, python, Path(scratch))
    files = sorted(path for path in target.rglob("*") if path.is_file())
    for path in files:
        print(f"{path.stat().st_size:>12,} {path.relative_to(target)}")
    print(f"{sum(path.stat().st_size for path in files):>12,} in all")
    print(f"loaded offline: {result['caption']!r}; taught and recalled: {result['taught']!r}\n\nPush it:\n")
    print("\n".join(push_commands(target, options.repo_id, options.tag)))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="dist/microvlm", help="default: dist/microvlm")
    parser.add_argument("--root", default=str(ROOT), help="what is released; default: this repository")
    parser.add_argument("--repo-id", default="euhidaman/MicroVLM-M", help="on the Hub; default: %(default)s")
    tag = f"v{project()['version']}"
    parser.add_argument("--tag", default=tag, help="of the release, the revision in the card; default: %(default)s")
    parser.add_argument("--repository", help="URL of the source repository, for links to files that are not released")
    parser.add_argument("--reuse-environment", action="store_true", help="load in this environment, not in a new one")
    options = parser.parse_args(argv)
    try:
        release(Path(options.folder), options)
    except (OSError, ReleaseError, subprocess.CalledProcessError) as error:
        sys.exit(f"not released: {error}")


if __name__ == "__main__":
    main()
