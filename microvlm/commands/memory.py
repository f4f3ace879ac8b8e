"""Store facts in a memory file, ask for them, list and forget them."""

import argparse
import os
import sys
from contextlib import nullcontext
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError

from ..files import check_outputs
from ..inference import add, ask
from ..model import load

DEMO = (("swan.png", "This is Bimo the swan."), ("robot.png", "This is Mirel the robot."))
QUESTION = "Who is the robot?"
ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {  # how many words, and what they are
    "add": ((2,), "a picture and a sentence"),
    "ask": (range(1, 1_000_000), "pictures and questions"),
    "list": ((0,), "nothing"),
    "forget": ((1,), "a number or a sentence"),
}


def show(what: list[str], answers: list[tuple[str, float | None]]) -> None:
    for words, (text, scope) in zip(what, answers, strict=True):
        known = "" if scope is None else f"  (memory {scope:.2f})"
        print(f"{words}: {text}{known}", flush=True)


def demo(model, processor) -> None:
    pictures = [str(ROOT / "examples" / name) for name, _ in DEMO] + [str(ROOT / "examples/drum.png")]
    names = [os.path.relpath(path) for path in pictures]
    print("Before anything is taught:")
    show(names, ask(model, processor, None, pictures))
    memory = model.new_memory()
    for path, (_, sentence) in zip(pictures, DEMO):
        memory = add(model, processor, memory, path, sentence)
    print(f"\nTaught, no gradient step. {memory.describe(processor)}\n\nAsked:")
    show([*names, QUESTION], ask(model, processor, memory, [*pictures, QUESTION]))
    memory = model.forget(memory, 0)
    print(f"\nForgot {DEMO[0][1]!r}. {memory.describe(processor)}\n\nAsked:")
    show([*names, QUESTION], ask(model, processor, memory, [*pictures, QUESTION]))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="memory file, or the word demo")
    parser.add_argument("command", nargs="?", choices=list(COMMANDS))
    parser.add_argument("words", nargs="*", help="; ".join(f"{name}: {what}" for name, (_, what) in COMMANDS.items()))
    parser.add_argument("--model", default=str(ROOT), help="checkpoint folder or Hub id")
    parser.add_argument("--revision", default="main")
    options = parser.parse_intermixed_args(arguments)
    if (options.file == "demo") == bool(options.command):
        parser.error("give a memory file and add, ask, list or forget; or the word demo alone")
    words = options.words
    if options.command and len(words) not in COMMANDS[options.command][0]:
        parser.error(f"{options.command} takes {COMMANDS[options.command][1]}, got {len(words)} words")

    try:
        model, processor = load(options.model, options.revision)
        if options.file == "demo":
            demo(model, processor)
            return 0
        changes = options.command in ("add", "forget")
        if changes:
            check_outputs((), file=options.file)
        if options.command == "forget" and not os.path.exists(options.file):
            raise FileNotFoundError(f"memory file {options.file} does not exist.")
        with FileLock(f"{os.path.realpath(options.file)}.lock") if changes else nullcontext():
            memory = model.new_memory()
            if options.command != "add" or os.path.exists(options.file):
                memory = model.load_memory(options.file)
            if memory.num_rows != 1:
                raise ValueError(f"{options.file} holds {memory.num_rows} memories; here it is one.")
            if options.command == "add":
                memory = add(model, processor, memory, *words)
            elif options.command == "forget":
                memory = model.forget(memory, int(words[0]) if words[0].isdigit() else words[0])
            if changes:
                memory.save(options.file)
        if options.command == "ask":
            show(words, ask(model, processor, memory, words))
        else:
            print(memory.describe(processor))
    except (OSError, ValueError, SafetensorError) as error:
        print(f"microvlm memory: {error}", file=sys.stderr)
        return 1
    return 0
