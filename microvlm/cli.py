"""The command line: one name per command, imported when it runs."""

import sys
from importlib import import_module

COMMANDS = {
    "caption": "commands.caption",
    "memory": "commands.memory",
    "app": "commands.app",
    "compose": "compose.compose",
    "train": "train_hf",
    "pack": "pack",
    "export": "export.run",
    "evaluate": "evaluate.run",
    "visualize": "visualize.run",
    "calibrate": "train.calibrate",
    "calibrate-temperature": "train.calibrate_temperature",
    "distill-vision": "train.distill_vision",
    "pretrain-text": "train.pretrain_text",
    "push": "hub",
}


def app() -> None:
    """Run the command that the first argument names."""
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        sys.exit(f"usage: microvlm {{{','.join(COMMANDS)}}} ...")
    sys.exit(import_module(f".{COMMANDS[sys.argv[1]]}", __package__).main(sys.argv[2:]))
