"""Weights between two states of one run: a checkpoint that learned something new, drawn back to the one it came from (WiSE-FT, arXiv 2109.01903).

The first matching --share says how much of a tensor is BEFORE's; what no pattern matches stays as in AFTER. Without --share the states, two or
more, count alike: of a run whose learning rate does not fall, that is stochastic weight averaging (arXiv 1803.05407).

    python scripts/average.py runs/nano_memory4 runs/nano_stage4 runs/nano_average \\
        --share "language_model.layers=0.25" --share "language_model|adapter|alignment=1"
    python scripts/average.py runs/nano_memory10/checkpoint-* runs/nano_average10
"""

import argparse
import re
import sys
from pathlib import Path

import torch
from transformers import AutoProcessor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from quantize_hf import load_plain  # noqa: E402


def share(text: str) -> tuple[re.Pattern, float]:
    pattern, _, value = text.rpartition("=")
    if not pattern or not 0 <= float(value) <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not PATTERN=SHARE with a share from 0 to 1")
    return re.compile(pattern), float(value)


@torch.no_grad()
def average(new: dict, old: dict, shares: list[tuple[re.Pattern, float]], names: tuple[str, str]) -> dict[str, int]:
    """Move the tensors of state `new` towards those of `old`, each by the share of the first pattern that matches its name.

    Returns how many tensors each pattern matches; ends with an error where one matches none, or where tensors differ in name or shape.
    """
    if differ := {
        name
        for name in new.keys() | old.keys()
        if name not in new or name not in old or new[name].shape != old[name].shape
    }:
        sys.exit(f"error: {names[0]} and {names[1]} are not states of one model: {min(differ)} differs.")
    counts, done = dict.fromkeys((pattern.pattern for pattern, _ in shares), 0), set()
    for name, tensor in new.items():
        if id(tensor) in done:  # tied
            continue
        done.add(id(tensor))
        for pattern, value in shares:
            if pattern.search(name):
                counts[pattern.pattern] += 1
                if tensor.is_floating_point():
                    tensor.lerp_(old[name], value)
                break
    if unused := [pattern for pattern, count in counts.items() if not count]:
        sys.exit(f"error: no tensor matches {', '.join(unused)}.")
    return counts


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("states", nargs="+", metavar="STATE", help="folders; with --share AFTER and BEFORE")
    parser.add_argument("out", metavar="OUT", help="a folder that does not exist")
    parser.add_argument("--share", type=share, action="append", metavar="PATTERN=SHARE")
    options = parser.parse_args(arguments)
    if len(options.states) < 2 or (options.share and len(options.states) != 2):
        parser.error(f"{'--share takes two states' if options.share else 'a mean takes two states or more'}.")
    if Path(options.out).exists():
        sys.exit(f"error: {options.out} exists: choose another folder.")
    first, *others = options.states
    model = load_plain(first)
    new = model.state_dict(keep_vars=True)
    for number, folder in enumerate(others, 2):
        shares = options.share or [(re.compile(""), 1 / number)]
        counts = average(new, load_plain(folder).state_dict(), shares, (first, folder))
    model.save_pretrained(options.out)
    AutoProcessor.from_pretrained(first, trust_remote_code=True).save_pretrained(options.out)
    matched = ", ".join(f"{count} tensors match {pattern}" for pattern, count in counts.items())
    print(matched if options.share else f"mean of {len(options.states)} states")


if __name__ == "__main__":
    main()
