"""Store facts in a memory file, ask for them, list and forget them."""

import os
from collections.abc import Callable

from filelock import FileLock

from ..files import ROOT, check_outputs, one_line
from ..inference import Answer, ask as answer, teach
from ..model import MemoryState, load, require

FACTS = (
    ("swan.png", "This is Bimo the swan."),
    ("robot.png", "This is Mirel the robot."),
    ("backpack.png", "Locker 4047 opens with the code 19-B."),
)
UNKNOWN, QUESTION = "drum.png", "Who is the robot?"


def open_memory(file: str, model) -> MemoryState:
    """Open a memory file of one memory."""
    memory = model.load_memory(file)
    require(memory.num_rows == 1, f"{file} holds {memory.num_rows} memories; here it is one.")
    return memory


def change(file: str, model, processor, edit: Callable[[MemoryState], MemoryState]) -> None:
    """Edit a memory file, one process at a time, and print what it holds then."""
    check_outputs((), file=file)
    # load after the lock: another process may have added a fact
    with FileLock(f"{os.path.realpath(file)}.lock"):
        memory = edit(open_memory(file, model) if os.path.exists(file) else model.new_memory())
        memory.save(file)
    print(memory.describe(processor))


def show_answer(name: str, result: Answer) -> None:
    known = "" if result.scope is None else f"  (memory {result.scope:.2f})"
    print(one_line(f"{name}: {result.text}{known}"), flush=True)


def add(file: str, image: str, sentence: str, model: str, revision: str) -> None:
    model, processor = load(model, revision)
    change(file, model, processor, lambda memory: teach(model, processor, image, sentence, memory))


def ask(file: str, questions: list[str], model: str, revision: str) -> None:
    model, processor = load(model, revision)
    memory = open_memory(file, model)
    for question in questions:
        show_answer(question, answer(model, processor, question, memory))


def show(file: str, model: str, revision: str) -> None:
    model, processor = load(model, revision)
    print(open_memory(file, model).describe(processor))


def forget(file: str, fact: str, model: str, revision: str) -> None:
    model, processor = load(model, revision)
    os.stat(file)  # no lock for a file that is not there
    change(file, model, processor, lambda memory: model.forget(memory, int(fact) if fact.isdigit() else fact))


def demo(model: str, revision: str) -> None:
    """Store three facts, ask for them, and forget one."""
    model, processor = load(model, revision)
    images = [str(ROOT / "examples" / name) for name in (*(name for name, _ in FACTS), UNKNOWN)]

    def ask_all(questions: list[str], memory: MemoryState | None) -> None:
        for question in questions:
            name = question if question == QUESTION else os.path.relpath(question)
            show_answer(name, answer(model, processor, question, memory))

    # four images, three facts, then one fact less
    print("Before anything is taught:")
    ask_all(images, None)
    memory = model.new_memory()
    for path, (_, sentence) in zip(images, FACTS):
        memory = teach(model, processor, path, sentence, memory)
    print(f"\nTaught, no gradient step. {memory.describe(processor)}\n\nAsked:")
    ask_all([*images, QUESTION], memory)
    memory = model.forget(memory, 0)
    print(f"\nForgot {FACTS[0][1]!r}. {memory.describe(processor)}\n\nAsked:")
    ask_all([*images, QUESTION], memory)
