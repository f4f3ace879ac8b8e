"""Measure speed, memory and bytes at full size, next to llama.cpp, other captioners and the memory bus.

    python -m benchmarks.speed --json runs/speed.json --plot docs
    python -m benchmarks.speed --checkpoint "V packed=runs/v-packed" --checkpoint nano=. --rounds 9
    python -m benchmarks.speed --write-v runs/v    # a checkpoint to pack; writes it and stops
    python -m benchmarks.speed --small --rounds 2

Weights are random: speed and bytes do not depend on them. Two threads, batch 1, greedy, no early stop. Notable:

- Every subject has a process of its own and, after one that does not count, a turn in each round. Numbers are medians
  over rounds, ratios medians of the rounds' ratios. Run it on an idle machine.
- The clock of a turn starts at a decoded image of 640 x 640, before the image processor. Token ids are ready.
- Prompts: MicroVLM one image and 16 text tokens; SmolVLM 64 positions and 2 separators a tile and 16 text tokens; BLIP,
  GIT and ViT-GPT2 no text; llama.cpp (V's language model only, through its C functions) V's number of text tokens.
- llama.cpp's quantizer makes a tied head Q6_K, or Q8_0 where 256 does not divide the width, and TQ2_0 and TQ1_0 Q4_0
  where 256 does not divide a row. "+head" forces the type on the head too.
- Peak memory is the resident size from loading to the last round less what it was before loading (Linux).
- The limit: bytes of weights that a step reads over the read bandwidth, the highest of sum and maximum as int64 and a
  float32 matrix-vector product over 512 MiB. Keys and values do not count.
"""

import argparse
import importlib.util
import tempfile
from functools import partial
from pathlib import Path
from statistics import median

import torch
import transformers

from benchmarks.machine import available_memory, describe_machine
from benchmarks.models import v_config, write_random
from microvlm.files import ROOT, write_json

from .files import THREADS, Scratch
from .subjects import CAPTION, CATALOGUE, LLAMA_CPP, MOST_TOKENS, MicroVLM, Subject
from .tables import limit_table, plot, ratio_table, speed_table
from .workers import BUFFER, PROCESS_BYTES, SMALL_BUFFER, Result, in_groups, measure_group, read_bandwidth


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rounds", type=int, default=7, help="turns of every subject that count, default %(default)s")
    add("--tokens", type=int, default=64, help=f"of a turn, {CAPTION} to {MOST_TOKENS}, default %(default)s")
    add("--checkpoint", action="append", default=[], metavar="NAME=FOLDER", help="of MicroVLM; repeat")
    add("--only", nargs="+", metavar="NAME", help=f"of {', '.join(CATALOGUE)} and the checkpoints")
    add("--small", action="store_true", help="tiny shapes: shows that this runs, not how fast")
    add("--json", type=Path, help="file for all numbers")
    add("--plot", type=Path, help="folder for speed_tokens.png and speed_disk.png")
    add("--scratch", type=Path, default=ROOT / "runs", help="where weights lie meanwhile, default runs")
    add("--write-v", type=Path, metavar="FOLDER", help="write V with random weights in bf16, and stop")
    options = parser.parse_args(argv)
    if options.rounds < 1 or not CAPTION <= options.tokens <= MOST_TOKENS:
        parser.error(f"--rounds must be 1 or more, --tokens {CAPTION} to {MOST_TOKENS}.")
    # names of the checkpoints
    checkpoints = {}
    for text in options.checkpoint:
        name, _, folder = text.partition("=")
        if not name or not folder:
            parser.error(f"--checkpoint {text!r} is not NAME=FOLDER.")
        if name in CATALOGUE or name in checkpoints:
            parser.error(f"--checkpoint {name!r}: the name is taken.")
        if not (Path(folder) / "config.json").is_file():
            parser.error(f"--checkpoint {name!r}: {folder} has no config.json.")
        checkpoints[name] = Path(folder)
    options.checkpoint = checkpoints
    # names of all that can be measured
    names = [*CATALOGUE, *checkpoints]
    for name in options.only or ():
        if name not in names:
            parser.error(f"--only {name!r}: known are {', '.join(names)}.")
    return options


def choose(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """List what to measure, checkpoints first, and what lacks llama.cpp or gguf."""
    names = [name for name in (*options.checkpoint, *CATALOGUE) if not options.only or name in options.only]
    if all(importlib.util.find_spec(module) for module in ("llama_cpp", "gguf")):
        return names, []
    return [name for name in names if name not in LLAMA_CPP], [name for name in names if name in LLAMA_CPP]


def make_subject(name: str, options: argparse.Namespace, scratch: Scratch) -> Subject:
    if name in options.checkpoint:
        return MicroVLM(name, options.checkpoint[name])
    return CATALOGUE[name](name, scratch)


def measure(names: list[str], options: argparse.Namespace) -> tuple[dict[str, Result], list[float], list[list[str]]]:
    """Measure subjects, in groups that fit into memory.

    Returns:
        Results by name, the read bandwidths in bytes per second, and the groups.
    """
    buffer = torch.ones((SMALL_BUFFER if options.small else BUFFER) // 4)
    options.scratch.mkdir(parents=True, exist_ok=True)
    results, rates = {}, []
    with tempfile.TemporaryDirectory(prefix="speed-", dir=options.scratch) as folder:
        scratch = Scratch(Path(folder), options.small)
        subjects = {name: make_subject(name, options, scratch) for name in names}
        needs = {name: 2 * subject.disk_bytes() + PROCESS_BYTES for name, subject in subjects.items()}
        groups = in_groups(needs, available_memory())
        for group in groups:
            members = [subjects[name] for name in group]
            values, read = measure_group(members, options.rounds, options.tokens, partial(read_bandwidth, buffer))
            results |= values
            rates += read
    return results, rates, groups


def print_report(results: dict[str, Result], rates: list[float], groups: list[list[str]], bases: list[str]) -> None:
    """Print all tables; `bases` are the subjects that the others are compared with."""
    bandwidth = max(rates)
    print(f"{speed_table(results)}\n")
    if len(groups) > 1:
        print(f"Memory did not suffice for all at once; interleaved inside: {'; '.join(map(', '.join, groups))}.\n")
    text = f"Read bandwidth, {THREADS} threads: {bandwidth / 1e9:.1f} GB/s, the highest of {len(rates)} rounds"
    print(f"{text} (median {median(rates) / 1e9:.1f}).\n\n{limit_table(results, bandwidth)}\n")
    for name in bases if len(results) > 1 else ():
        print(f"{ratio_table(name, results)}\n")


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(THREADS)
    if options.write_v:
        write_random(v_config(options.small), options.write_v)
        print(f"{options.write_v}: V with random weights in bf16")
        return
    machine = describe_machine()
    print(f"{machine}\n", flush=True)
    names, left_out = choose(options)
    if left_out:
        print(f"Left out, llama-cpp-python or gguf is not installed: {', '.join(left_out)}.\n", flush=True)
    if not names:
        return
    # measure and print
    results, rates, groups = measure(names, options)
    shape = "tiny models" if options.small else "full size"
    print(f"## {shape}, {THREADS} threads, {options.rounds} rounds of {options.tokens} tokens, random weights\n")
    bases = [name for name in options.checkpoint if name in results] or names[:1]
    print_report(results, rates, groups, bases)
    # files
    if options.plot:
        plot(results, max(rates), options.plot)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        values = {
            "machine": machine,
            "groups": groups,
            "bandwidth_bytes_per_second": {"highest": max(rates), "rounds": rates},
            "results": {name: {**r.opened, "peak": r.peak, "turns": r.turns} for name, r in results.items()},
            "left_out": left_out,
        }
        write_json(options.json, values)
