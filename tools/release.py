"""Build the folder that a Hub repo receives, check it, and load it in an environment of its own. Nothing is sent.

    python tools/release.py dist/microvlm --repository https://github.com/someone/microvlm
    python tools/release.py --check dist/microvlm

- The folder holds what `from_pretrained` and the card need: weights, config, processor, tokenizer, the code that `auto_map` names with
  what it imports, the card with its pictures, licence and attribution, and the pictures of the card's snippets.
- In the card, snippets load from the Hub id at the released tag, and links to files that are not in the folder lead to --repository, or
  become plain text without it.
- A check of the files that needs no model (`problems`), then captions, a taught fact, the pipeline and a saved copy in another process,
  offline, in a new virtual environment with the dependencies of pyproject.toml.
- The folder appears under its name only when all of that went well. The commands that push it are printed.

Exit code: 0; 1, a check failed, with a line on stderr for each.
"""

import argparse
import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import yaml
from huggingface_hub import ModelCard
from transformers.dynamic_module_utils import get_relative_import_files

from microvlm.hub import check_repo

ROOT = Path(__file__).resolve().parents[1]

FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "processor_config.json",
    "chat_template.jinja",
    "README.md",
    "LICENSE",
    "ATTRIBUTION.md",
    "examples/LICENSES.md",
)
SUFFIXES = {".safetensors", ".json", ".jinja", ".py", ".md", ".png", ".jpg", ".txt"} | {""}  # LICENSE has none
PICTURES = ("examples/chipmunk.png", "examples/swan.png")  # of `load`: to caption, and to teach
PICKLES = (
    *(b"\x80" + bytes([protocol]) for protocol in range(2, 6)),
    b"PK\x03\x04",
)  # pickle itself, torch.save's archive
METADATA = {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
LICENCES = {"apache-2.0": "Apache License"}  # identifier of the Hub -> what LICENSE says
LOADERS = {"from_pretrained", "pipeline", "hf_hub_download", "snapshot_download"}
BRANCHES = {"main", "master", "HEAD"}
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
CODE = r"^```.*?^```|(?<!`)(?P<ticks>`+)(?!`)(?:(?!\n\n).)+?(?<!`)(?P=ticks)(?!`)"
LINK_OR_CODE = re.compile(f"{LINK.pattern}|{CODE}", re.MULTILINE | re.DOTALL)
ABSOLUTE = re.compile(r"[a-z]+:|/")
PICTURE = re.compile(r"[\w./-]+\.(?:png|jpg)")

LOAD = """
import json, sys, tempfile
from pathlib import Path

def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise RuntimeError(f"the network was used while loading: {event} {arguments[-1]}")
sys.addaudithook(refuse)

import torch, transformers
from transformers import AutoModel, AutoProcessor, pipeline

ROOT = Path(__file__).resolve().parents[1]

folder, taught_picture = Path(sys.argv[1]), sys.argv[2]
known = Path(folder, sys.argv[3])
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
PROMPT, FACT = "<|user|><image><|assistant|>", "This is Bimo the swan."

def say(model, processor, picture, **kwargs):
    inputs = processor(images=str(folder / picture), text=PROMPT, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=32, do_sample=False, **kwargs)
    return processor.batch_decode(out, skip_special_tokens=True)[0]

def expect(what, found, expected):
    if found != expected:
        sys.exit(f"{what}: {found!r}, expected {expected!r}")

caption = say(model, processor, known)
if not caption.strip():
    sys.exit(f"the caption of {known.name} is empty")
pipe = pipeline("image-text-to-text", model=str(folder), trust_remote_code=True)
chat = [{"role": "user", "content": [{"type": "image", "path": str(known)}]}]
expect("the pipeline's caption", pipe(text=chat, max_new_tokens=32, do_sample=False, return_full_text=False)[0]["generated_text"], caption)

fact = processor(images=str(folder / taught_picture), text="<image>" + FACT, return_tensors="pt")
memory = model.write_memory(**fact)
expect("the taught fact", say(model, processor, taught_picture, memory=memory), FACT)
expect("after forgetting it", say(model, processor, taught_picture, memory=model.forget(memory, 0)), say(model, processor, taught_picture))

with tempfile.TemporaryDirectory() as copy:
    model.save_pretrained(copy)
    processor.save_pretrained(copy)
    again = AutoModel.from_pretrained(copy, trust_remote_code=True)
    kept, tensors = again.state_dict(), model.state_dict()
    expect("tensors of the saved copy", sorted(kept), sorted(tensors))
    if changed := [name for name in tensors if not torch.equal(kept[name], tensors[name])]:
        sys.exit(f"the saved copy has other values: {changed[0]}")
    expect("caption of the saved copy", say(again, AutoProcessor.from_pretrained(copy, trust_remote_code=True), known), caption)
print(json.dumps({"caption": caption, "taught": FACT, "transformers": transformers.__version__}))
"""


class ReleaseError(ValueError):
    """A check failed. `str` has a problem a line."""


def code_files(root: Path) -> list[str]:
    """Names of the Python files that `auto_map` in the configs of a folder needs, directly or not.

    Raises:
        ReleaseError: one that is named or imported is missing.
    """
    needed = set()
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        try:
            entries = json.loads((root / name).read_text()).get("auto_map", {})
        except ValueError as error:
            raise ReleaseError(f"{name} is not JSON ({error})") from None
        for references in entries.values():
            for reference in references if isinstance(references, list) else [references]:
                if reference:
                    needed.add(root / f"{reference.split('.')[0]}.py")
    try:
        for path in sorted(needed):
            needed |= {Path(file) for file in get_relative_import_files(path)}
    except FileNotFoundError as error:
        raise ReleaseError(f"{Path(error.filename).name} is missing") from None
    return sorted(path.name for path in needed)


def snippets(card: str) -> list[str]:
    """The Python snippets of a card."""
    return SNIPPET.findall(card)


def links(card: str) -> list[tuple[bool, str]]:
    """Targets in the folder to which a card links, each with whether it is shown as a picture; what looks like a link in code is none."""
    found = [match for match in LINK_OR_CODE.finditer(card) if match[3] and not ABSOLUTE.match(match[3])]
    return [(bool(match[1]), match[3]) for match in found]


def pinned(card: str, repo_id: str, revision: str) -> str:
    """A card whose Python snippets load from a Hub id at a revision, where they loaded from `"."`."""

    def pin(match: re.Match) -> str:
        code = match[0]
        code = re.sub(
            r'from_pretrained\("\.", trust_remote_code=True\)(?:  # or "[^\n]*)?',
            f'from_pretrained("{repo_id}", revision="{revision}", trust_remote_code=True)',
            code,
        )
        return re.sub(r'(pipeline\([^\n]*)model="\."', rf'\1model="{repo_id}", revision="{revision}"', code)

    return SNIPPET.sub(pin, card)


def linked(card: str, files: set[str], repository: str | None, revision: str) -> str:
    """A card without broken links: what is not among `files` leads to the repository at the revision, or is plain text."""

    def link(match: re.Match) -> str:
        mark, text, target, part = match[1], match[2], match[3], match[4] or ""
        if target is None or ABSOLUTE.match(target) or target in files:
            return match[0]
        return f"{mark}[{text}]({repository.rstrip('/')}/blob/{revision}/{target}{part})" if repository else text

    return LINK_OR_CODE.sub(link, card)


def noted(card: str, repo_id: str, revision: str, repository: str | None) -> str:
    """A card that says under its title where its snippets find their pictures, and which of its commands need more than the released folder."""
    source = f"[the source repository]({repository})" if repository else "the source repository"
    download = f"hf download {repo_id} --revision {revision} --local-dir microvlm"
    note = f"> The snippets open pictures of `examples/`: `{download}`, and run them there.\n> This folder holds the model and its code. `make` and commands with scripts, such as `microvlm caption`, are run in {source}."
    return re.sub(r"^# .+$", lambda title: f"{title[0]}\n\n{note}", card, count=1, flags=re.MULTILINE)


def pictures_of(card: str) -> set[str]:
    """Paths of the pictures that a card shows, or that its Python snippets open."""
    shown = {target for is_picture, target in links(card) if is_picture}
    for code in snippets(card):
        shown |= {text for text in _strings(code) if PICTURE.fullmatch(text)}
    return shown


def _strings(code: str) -> list[str]:
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return []  # `problems` says so
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def build(root: Path, folder: Path, repo_id: str, revision: str, repository: str | None = None) -> None:
    """Copy into an empty folder what a Hub repo needs of a source folder, and adapt its card.

    Raises:
        ReleaseError: names every file that is missing.
    """
    missing = [name for name in FILES if not (root / name).is_file()]
    if missing:
        raise ReleaseError("\n".join(f"{name} is missing" for name in missing))
    card = pinned((root / "README.md").read_text(encoding="utf-8"), repo_id, revision)
    names = {*FILES, *PICTURES, *code_files(root), *pictures_of(card)}
    if missing := sorted(name for name in names if not (root / name).is_file()):
        raise ReleaseError("\n".join(f"{name} is missing" for name in missing))
    for name in sorted(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / name, folder / name)
    (folder / "README.md").write_text(
        noted(linked(card, names, repository, revision), repo_id, revision, repository), encoding="utf-8"
    )


def problems(folder: Path, max_weights: float = 12.0) -> list[str]:
    """What is wrong with the files of a release, in words; empty: nothing. No model is loaded.

    Args:
        max_weights: MB (10^6 bytes) that the weights may take.
    """
    found = []
    try:
        check_repo(folder)
    except ValueError as error:
        found.append(str(error))
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        with path.open("rb") as file:
            pickled = file.read(4).startswith(PICKLES)
        if pickled:
            found.append(f"{name} is a pickle: it runs code when it is loaded")
        elif path.suffix not in SUFFIXES:
            found.append(f"{name} does not belong in a release")
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6
    if weights > max_weights:
        found.append(f"the weights have {weights:.2f} MB, the limit is {max_weights:g} MB (--max-weights)")
    return found + _class_problems(folder) + _card_problems(folder)


def _class_problems(folder: Path) -> list[str]:
    """Entries of `auto_map` that name a class which their file does not define."""
    found = []
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        try:
            entries = dict(json.loads((folder / name).read_text()).get("auto_map") or {})
        except (OSError, ValueError, AttributeError, TypeError):
            continue  # check_repo says so
        for auto_class, references in entries.items():
            for reference in references if isinstance(references, list) else [references]:
                module, _, class_name = (reference if isinstance(reference, str) else "").rpartition(".")
                path = folder / f"{module}.py"
                if module and path.is_file():
                    try:
                        body = ast.parse(path.read_text(encoding="utf-8")).body
                    except SyntaxError as error:
                        found.append(f"{path.name} is not Python: {error.msg}, line {error.lineno}")
                        continue
                    except ValueError:
                        continue  # not UTF-8, check_repo says so
                    if not any(isinstance(node, ast.ClassDef) and node.name == class_name for node in body):
                        found.append(f"{name}: {auto_class} is {reference}, but {path.name} defines no {class_name}")
    return found


def _card_problems(folder: Path) -> list[str]:
    try:
        card = ModelCard.load(folder / "README.md", ignore_metadata_errors=False)
        text = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, ValueError, yaml.YAMLError):
        return []  # check_repo says so
    data, found = card.data.to_dict(), []
    for key, expected in METADATA.items():
        if data.get(key) != expected:
            found.append(f"README.md: {key} is {data.get(key)!r}, expected {expected!r}")
    licence = data.get("license")
    if licence not in LICENCES:
        found.append(f"README.md: license is {licence!r}, expected one of {', '.join(LICENCES)}")
    elif (folder / "LICENSE").is_file() and LICENCES[licence].encode() not in (folder / "LICENSE").read_bytes():
        found.append(f"LICENSE is not the text of {licence}")
    tags = data.get("tags")
    if not (isinstance(tags, list) and tags and all(isinstance(tag, str) and tag.strip() for tag in tags)):
        found.append(f"README.md: tags is {tags!r}, expected a list of words")
    for model in data.get("model-index") or []:
        for result in model.get("results", []):
            for metric in result.get("metrics", []):
                if not isinstance(metric.get("value"), int | float):
                    found.append(f"README.md: model-index has no number for {metric.get('type')!r}")
    for number, code in enumerate(snippets(text), 1):
        found += _snippet_problems(number, code)
    targets = {target for _, target in links(text)} | pictures_of(text)
    found += [
        f"README.md: {target} is not in the folder" for target in sorted(targets) if not (folder / target).is_file()
    ]
    return found


def _snippet_problems(number: int, code: str) -> list[str]:
    """Calls of a snippet that load from the Hub without a revision; a local path must begin with `./`, `../` or `/`."""
    try:
        tree = ast.parse(code)
    except SyntaxError as error:
        return [f"README.md: snippet {number} is not Python: {error.msg}, line {error.lineno}"]
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", None))
        if name not in LOADERS:
            continue
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        source = keywords.get("model" if name == "pipeline" else "pretrained_model_name_or_path")
        if source is None and name != "pipeline" and node.args:
            source = node.args[0]
        source = getattr(source, "value", None)
        if isinstance(source, str) and source.startswith(("./", "../", "/")):
            continue
        revision = keywords.get("revision")
        where = f"README.md: snippet {number}, line {node.lineno}: {name}"
        if revision is None or (isinstance(revision, ast.Constant) and revision.value is None):
            found.append(f"{where} has no revision=")
        elif getattr(revision, "value", None) in BRANCHES:
            found.append(f"{where} has revision={revision.value!r}, which moves")
    return found


def project() -> dict:
    """What pyproject.toml says of the project: `version`, `dependencies`, ..."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def fresh_environment(folder: Path) -> Path:
    """A virtual environment with the runtime dependencies; returns its Python.

    Raises:
        ReleaseError: pip's last line.
    """
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    done = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *project()["dependencies"]],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ReleaseError(f"the dependencies cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    return python


def load(folder: Path, python: Path | str, scratch: Path, variables: dict[str, str] | None = None) -> dict:
    """Load a release in another process, offline, from another working directory; what it said.

    Args:
        variables: of the process's environment, besides.

    Raises:
        ReleaseError: the last line that the process wrote to stderr.
    """
    known, taught = PICTURES
    home, work = scratch / "home", scratch / "work"
    work.mkdir(parents=True)
    ours = ("PYTHONPATH", "HF_MODULES_CACHE", "HF_HUB_CACHE", "HF_TOKEN")
    environment = {k: v for k, v in os.environ.items() if k not in ours}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "TOKENIZERS_PARALLELISM": "false"}
    environment |= variables or {}
    before = sorted(folder.rglob("*"))
    done = subprocess.run(
        [python, "-c", LOAD, str(folder.resolve()), taught, known],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ReleaseError(f"it does not load: {lines[-1]}")
    if sorted(folder.rglob("*")) != before:
        raise ReleaseError("loading it has written into the folder")
    return json.loads(done.stdout.splitlines()[-1])


def push_commands(folder: Path, repo_id: str, revision: str) -> list[str]:
    """Commands that put a release on the Hub and tag it. Files that it no longer has are deleted there."""
    message = f"Release {revision}"
    return [
        shlex.join(
            [
                "hf",
                "upload",
                repo_id,
                str(folder),
                ".",
                "--revision",
                "main",
                "--delete",
                "*",
                "--commit-message",
                message,
            ]
        ),
        shlex.join(["hf", "repos", "tag", "create", repo_id, revision, "--revision", "main", "--message", message]),
    ]


def check_target(target: Path) -> None:
    """Raises ReleaseError where something is that is no release."""
    if target.is_symlink():
        raise ReleaseError(f"{target} is a link: give the path of the folder itself")
    if target.exists():
        if not target.is_dir() or (any(target.iterdir()) and not (target / "ATTRIBUTION.md").is_file()):
            raise ReleaseError(f"{target} is no release: give another path")
        strange = [p for p in target.rglob("*") if p.is_file() and p.suffix not in SUFFIXES or p.name == ".git"]
        if strange:
            raise ReleaseError(
                f"{target} holds {strange[0].relative_to(target)}, which no release wrote: give another path"
            )


def put_in_place(built: Path, target: Path) -> None:
    """Rename a folder to its place; what is there is replaced when it is a release.

    Raises:
        ReleaseError: the target holds something else.
    """
    check_target(target)
    old = None
    if target.exists():
        old = Path(tempfile.mkdtemp(prefix=".old.", dir=target.parent))
        os.replace(target, old)
    try:
        os.replace(built, target)
    except OSError:
        if old is not None:
            os.replace(old, target)
        raise
    if old is not None:
        shutil.rmtree(old)


def release(options: argparse.Namespace) -> None:
    """Build, check, load, put in place, print. Raises ReleaseError."""
    target = Path(options.folder)
    check_target(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent.absolute()))  # `load` works elsewhere
    try:
        built = scratch / "release"
        built.mkdir()
        build(Path(options.root), built, options.repo_id, options.tag, options.repository)
        check(built, options.max_weights)
        python = sys.executable if options.reuse_environment else fresh_environment(scratch / "venv")
        said = load(built, python, scratch)
        put_in_place(built, target)
    finally:
        shutil.rmtree(scratch)
    sizes(target)
    print(f"loaded offline: {said['caption']!r}; taught and recalled: {said['taught']!r}")
    print("\nPush it:\n")
    print("\n".join(push_commands(target, options.repo_id, options.tag)))


def check(folder: Path, max_weights: float) -> None:
    if found := problems(folder, max_weights):
        raise ReleaseError("\n".join(found))


def sizes(folder: Path) -> None:
    """Print the size of every file and of all, in bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        print(f"{path.stat().st_size:>12,} {path.relative_to(folder)}")
    print(f"{sum(path.stat().st_size for path in files):>12,} in all")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="dist/microvlm", help="default: dist/microvlm")
    parser.add_argument("--check", action="store_true", help="only check the files of a folder")
    parser.add_argument("--root", default=str(ROOT), help="what is released; default: this repository")
    parser.add_argument("--repo-id", default="euhidaman/MicroVLM-M", help="on the Hub; default: %(default)s")
    version = f"v{project()['version']}"
    parser.add_argument("--tag", default=version, help="of the release, the revision in the card; default: %(default)s")
    parser.add_argument("--repository", help="URL of the source repository, for links to files that are not released")
    parser.add_argument("--max-weights", type=float, default=12.0, help="MB of weights at most; default: %(default)s")
    parser.add_argument("--reuse-environment", action="store_true", help="load in this environment, not in a new one")
    options = parser.parse_args(argv)
    try:
        if options.check:
            if not Path(options.folder).is_dir():
                raise ReleaseError(f"{options.folder} is not a folder")
            check(Path(options.folder), options.max_weights)
            sizes(Path(options.folder))
        else:
            release(options)
    except ReleaseError as error:
        sys.exit("\n".join(f"not released: {line}" for line in str(error).splitlines()))


if __name__ == "__main__":
    main()
