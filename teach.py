"""Teach a model facts about pictures, and ask for them: no training, one file that holds what was taught.

    python teach.py facts.safetensors add examples/swan.png "This is Bimo the swan."
    python teach.py facts.safetensors ask examples/swan.png examples/drum.png
    python teach.py facts.safetensors list
    python teach.py facts.safetensors forget 0
    python teach.py demo                                        # all of it on the example pictures, nothing is kept

`ask` writes a caption for every picture; where the memory knows it, ScopeNet lets the memory speak. The file is written under another
name and renamed, and a file of another model, or a damaged one, is refused.

Exit code: 0; 1, something could not be read, written or found; 2, wrong arguments.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError

from caption import load
from processing_microvlm import open_picture

ROOT = Path(__file__).resolve().parent
DEMO = (("swan.png", "This is Bimo the swan."), ("robot.png", "This is Kesora the robot."))


def add(model, processor, memory, picture: str, sentence: str):
    """`memory` with the sentence under the picture's address."""
    text = processor.image_token + sentence
    inputs = processor(images=[open_picture(picture)], text=[text], return_tensors="pt")
    return model.write_memory(memory, **inputs.to(model.device, model.dtype), labels=[sentence])


@torch.inference_mode()
def ask(model, processor, memory, pictures: list[str]) -> list[tuple[str, float | None]]:
    """Caption and scope probability of every picture."""
    answers = []
    for path in pictures:
        pixel_values = processor.image_processor([open_picture(path)], return_tensors="pt")["pixel_values"]
        pixel_values = pixel_values.to(model.device, model.dtype)
        prompt = model.default_prompt(1)
        scope = None
        if memory is not None:
            scope = float(model(input_ids=prompt, pixel_values=pixel_values, memory=memory).scope_probability)
        ids = model.generate(
            input_ids=prompt, pixel_values=pixel_values, memory=memory, max_new_tokens=32, do_sample=False
        )
        answers.append((processor.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True).strip(), scope))
    return answers


def show(pictures: list[str], answers: list[tuple[str, float | None]]) -> None:
    for path, (text, scope) in zip(pictures, answers, strict=True):
        known = "" if scope is None else f"  (memory {scope:.2f})"
        print(f"{path}: {text}{known}", flush=True)


def demo(model, processor) -> None:
    pictures = [str(ROOT / "examples" / name) for name, _ in DEMO] + [str(ROOT / "examples/drum.png")]
    names = [os.path.relpath(path) for path in pictures]
    print("Before anything is taught:")
    show(names, ask(model, processor, None, pictures))
    memory = model.new_memory()
    for path, (_, sentence) in zip(pictures, DEMO):
        memory = add(model, processor, memory, path, sentence)
    print(f"\nTaught, no gradient step. {memory.describe(processor)}\n\nAsked:")
    show(names, ask(model, processor, memory, pictures))
    memory = model.forget(memory, 0)
    print(f"\nForgot {DEMO[0][1]!r}. {memory.describe(processor)}\n\nAsked:")
    show(names, ask(model, processor, memory, pictures))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="memory file, or the word demo")
    commands = parser.add_subparsers(dest="command")
    writing = commands.add_parser("add", help="store a sentence about a picture")
    writing.add_argument("picture")
    writing.add_argument("sentence")
    commands.add_parser("ask", help="caption pictures").add_argument("pictures", nargs="+")
    commands.add_parser("list", help="what is stored")
    commands.add_parser("forget", help="take a fact out again").add_argument("item", help="its number or sentence")
    parser.add_argument("--model", default=str(ROOT), help="checkpoint folder or Hub id")
    parser.add_argument("--revision", default="main")
    options = parser.parse_args(arguments)
    if (options.file == "demo") == bool(options.command):
        parser.error("give a memory file and add, ask, list or forget; or the word demo alone")

    try:
        model, processor = load(options.model, options.revision)
        if options.file == "demo":
            demo(model, processor)
            return 0
        memory = model.new_memory()
        if options.command != "add" or os.path.exists(options.file):
            memory = model.load_memory(options.file)
        if options.command == "add":
            memory = add(model, processor, memory, options.picture, options.sentence)
        elif options.command == "forget":
            item = int(options.item) if options.item.isdigit() else options.item
            memory = model.forget(memory, item)
        elif options.command == "ask":
            show(options.pictures, ask(model, processor, memory, options.pictures))
            return 0
        if options.command != "list":
            memory.save(options.file)
        print(memory.describe(processor))
    except (OSError, ValueError, SafetensorError) as error:
        print(f"teach.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
