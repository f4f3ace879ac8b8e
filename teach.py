"""Teach a model facts about pictures, and ask for them: no training, one file that holds what was taught.

    python teach.py facts.safetensors add examples/swan.png "This is Bimo the swan."
    python teach.py facts.safetensors ask examples/swan.png examples/drum.png "Who is the swan?"
    python teach.py facts.safetensors list
    python teach.py facts.safetensors forget 0
    python teach.py demo                                        # all of it on the example pictures, nothing is kept

`ask` writes a caption for every picture, and an answer to what ends in a question mark; where the memory knows it, ScopeNet lets the
memory speak. The file is written under another name and renamed, and a file of another model, or a damaged one, is refused. What
changes it waits its turn, by FILE.lock: two that teach at once both get their fact in.

Exit code: 0; 1, something could not be read, written or found; 2, wrong arguments.
"""

import argparse
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError

from caption import check_outputs, load
from processing_microvlm import open_image

ROOT = Path(__file__).resolve().parent
COMMANDS = {  # how many words, and what they are
    "add": ((2,), "a picture and a sentence"),
    "ask": (range(1, 1_000_000), "pictures and questions"),
    "list": ((0,), "nothing"),
    "forget": ((1,), "a number or a sentence"),
}
DEMO = (("swan.png", "This is Bimo the swan."), ("robot.png", "This is Mirel the robot."))
QUESTION = "Who is the robot?"


def add(model, processor, memory, picture: str, sentence: str):
    """`memory` with the sentence under the picture's address."""
    text = processor.image_token + sentence
    inputs = processor(images=[open_image(picture)], text=[text], return_tensors="pt")
    return model.write_memory(memory, **inputs.to(model.device, model.dtype), labels=[sentence])


@torch.inference_mode()
def ask(model, processor, memory, what: list[str]) -> list[tuple[str, float | None]]:
    """Caption of every picture or answer to every question, with its scope probability."""
    answers = []
    for words in what:
        prompt, image, scope = model.default_prompt(1), None, None
        if words.endswith("?"):
            content = [{"type": "text", "text": words}]
            asked = [{"role": "user", "content": content}]
            how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
            prompt = processor.apply_chat_template(asked, **how)["input_ids"].to(model.device)
        else:
            pixel_values = processor.image_processor([open_image(words)], return_tensors="pt")["pixel_values"]
            # encoded once, for scope and caption
            image = model.get_image_features(pixel_values.to(model.device, model.dtype), return_dict=True)
        if memory is not None:
            features = None if image is None else image.last_hidden_state
            query = model.model.get_memory_query(prompt, None, features)
            scope = float(model.model.read_memory(memory, query).scope_logits.sigmoid())
        encoded = {} if image is None else {"mm_encoder_outputs": {"image": image}}
        ids = model.generate(input_ids=prompt, **encoded, memory=memory, max_new_tokens=32, do_sample=False)
        answers.append((processor.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True).strip(), scope))
    return answers


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
        print(f"teach.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
