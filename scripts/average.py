"""Weights between two states of one run: a checkpoint that learned something new, drawn back to the one it came from (WiSE-FT, arXiv 2109.01903).

The first matching --share says how much of a tensor is BEFORE's; what no pattern matches stays as in AFTER.

    python scripts/average.py runs/nano_memory4 runs/nano_stage4 runs/nano_average \\
        --share "language_model.layers=0.25" --share "language_model|adapter|alignment=1"
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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("after", metavar="AFTER")
    parser.add_argument("before", metavar="BEFORE")
    parser.add_argument("out", metavar="OUT", help="a folder that does not exist")
    parser.add_argument("--share", type=share, action="append", required=True, metavar="PATTERN=SHARE")
    options = parser.parse_args(arguments)
    if Path(options.out).exists():
        sys.exit(f"error: {options.out} exists: choose another folder.")
    model, before = load_plain(options.after), load_plain(options.before)
    new, old = model.state_dict(keep_vars=True), before.state_dict()
    if differ := {
        name
        for name in new.keys() | old.keys()
        if name not in new or name not in old or new[name].shape != old[name].shape
    }:
        sys.exit(f"error: {options.after} and {options.before} are not states of one model: {min(differ)} differs.")
    counts, done = dict.fromkeys((pattern.pattern for pattern, _ in options.share), 0), set()
    with torch.no_grad():
        for name, tensor in new.items():
            if id(tensor) in done:  # tied
                continue
            done.add(id(tensor))
            for pattern, value in options.share:
                if pattern.search(name):
                    counts[pattern.pattern] += 1
                    if tensor.is_floating_point():
                        tensor.lerp_(old[name], value)
                    break
    if unused := [pattern for pattern, count in counts.items() if not count]:
        sys.exit(f"error: no tensor matches {', '.join(unused)}.")
    model.save_pretrained(options.out)
    AutoProcessor.from_pretrained(options.after, trust_remote_code=True).save_pretrained(options.out)
    print(", ".join(f"{count} tensors match {pattern}" for pattern, count in counts.items()))


if __name__ == "__main__":
    main()
