"""Measure speed, memory and bytes at full size, next to llama.cpp and other captioners.

    python -m benchmarks.speed --write-v runs/v    # a checkpoint to pack; writes it and stops
    python -m benchmarks.speed --checkpoint "V packed=runs/v-packed" --checkpoint nano=. --rounds 9 --plot docs
    python -m benchmarks.speed --small --rounds 2

Weights are random: speed and bytes do not depend on them. They lie in TMPDIR meanwhile. Two threads, batch 1, greedy,
no early stop. Notable:

- Every subject has a process of its own and, after one that does not count, a turn in each round. Numbers are medians
  over rounds. Run it on an idle machine.
- The clock of a turn starts at a decoded image of 640 x 640, before the image processor. Token ids are ready.
- Prompts: MicroVLM one image and 16 text tokens; SmolVLM 64 positions and 2 separators a tile and 16 text tokens; BLIP,
  GIT and ViT-GPT2 no text; llama.cpp (V's language model only, through its C functions) V's number of text tokens.
- llama.cpp's quantizer makes a tied head Q6_K, or Q8_0 where 256 does not divide the width, and TQ2_0 and TQ1_0 Q4_0
  where 256 does not divide a row. "+head" forces the type on the head too.
- Peak memory is the resident size from loading to the last round less what it was before loading (Linux).
"""

import argparse
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
import transformers

from benchmarks.machine import available_memory, describe_machine
from benchmarks.models import SHAPES, v_config, write_random
from benchmarks.subjects import (
    CAPTION,
    CATALOGUE,
    LLAMA_CPP,
    MOST_TOKENS,
    THREADS,
    MicroVLM,
    Scratch,
    Subject,
    Worker,
    has_llama_cpp,
)
from microvlm.tables import markdown_table

PROCESS_BYTES = 2**30  # of a worker without its weights, generously


@dataclass
class Result:
    """Result of a subject: what `Subject.open` returned, one entry per turn, peak memory in bytes."""

    opened: dict
    turns: list[dict[str, float]] = field(default_factory=list)
    peak: int | None = None

    def median(self, key: str) -> float:
        return median(turn[key] for turn in self.turns)

    @property
    def rates(self) -> list[float]:
        return [turn["rate"] for turn in self.turns]


# --- measuring


def in_groups(needs: dict[str, int], available: int | None) -> list[list[str]]:
    """Cut names into groups that fit into memory; one alone may need more."""
    groups, used = [[]], 0
    for name, need in needs.items():
        if groups[-1] and available is not None and used + need > available:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += need
    return groups


def measure_group(subjects: list[Subject], rounds: int, new_tokens: int) -> dict[str, Result]:
    """Open all subjects, then give each a turn in every round; returns results by name."""
    workers, results = [Worker(subject) for subject in subjects], {}
    try:
        for worker in workers:
            results[worker.name] = Result(worker.ask("open", new_tokens))
            print(f"{worker.name}: open", file=sys.stderr, flush=True)
        for i in range(rounds):
            for worker in workers:
                turn = worker.ask("turn", new_tokens)
                results[worker.name].turns.append(turn)
                text = f"round {i + 1} of {rounds}, {worker.name}: {turn['rate']:.3g} tokens/s"
                print(text, file=sys.stderr, flush=True)
        for worker in workers:
            results[worker.name].peak = worker.ask("close")
    finally:
        for worker in workers:
            worker.stop()
    return results


def measure(names: list[str], options: argparse.Namespace) -> tuple[dict[str, Result], list[list[str]]]:
    """Measure subjects, in groups that fit into memory; returns results and groups."""
    results = {}
    with tempfile.TemporaryDirectory(prefix="speed-") as folder:
        scratch, known = Scratch(Path(folder), options.small), options.checkpoint
        subjects = {n: MicroVLM(n, known[n]) if n in known else CATALOGUE[n](n, scratch) for n in names}
        needs = {name: 2 * subject.disk_bytes() + PROCESS_BYTES for name, subject in subjects.items()}
        groups = in_groups(needs, available_memory())
        for group in groups:
            results |= measure_group([subjects[name] for name in group], options.rounds, options.tokens)
    return results, groups


# --- tables and plots


def megabytes(value: int | None) -> str:
    return "not measured" if value is None else f"{value / 1e6:,.1f}"


def speed_table(results: dict[str, Result]) -> str:
    """Write medians; tokens per second with their range."""
    header = ["", "prompt", "first token, ms", "tokens/s", f"{CAPTION} tokens from the image, ms", "load, s"]
    rows = []
    for name, r in results.items():
        o = r.opened
        row = [name, f"{'image' if o['sees'] else 'no image'}, {o['positions']:,} positions"]
        row += [f"{r.median('first') * 1e3:.1f}", f"{r.median('rate'):.1f} ({min(r.rates):.1f} to {max(r.rates):.1f})"]
        row += [f"{r.median('caption') * 1e3:,.0f}", f"{o['load']:.2f}", megabytes(o["disk"]), megabytes(r.peak)]
        rows.append(row)
    return markdown_table([*header, "on disk, MB", "peak, MB"], rows, left=2)


def pick_colour(name: str) -> str:
    return "tab:orange" if name in LLAMA_CPP else "tab:gray" if name.startswith(tuple(SHAPES)) else "tab:blue"


def plot(results: dict[str, Result], folder: Path) -> None:
    """Plot tokens per second over bytes on disk, `speed_disk.png`."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    names = list(results)
    colours = [pick_colour(name) for name in names]
    rates = [r.median("rate") for r in results.values()]
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    sizes = [r.opened["disk"] / 1e6 for r in results.values()]
    axes.scatter(sizes, rates, c=colours)
    for name, size, rate in zip(names, sizes, rates):
        axes.annotate(name, (size, rate), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.set(xscale="log", yscale="log", xlabel="weights on disk, MB", ylabel="tokens per second, median")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(folder / "speed_disk.png", dpi=120)


# --- the command


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rounds", type=int, default=7, help="turns of every subject that count, default %(default)s")
    add("--tokens", type=int, default=64, help=f"of a turn, {CAPTION} to {MOST_TOKENS}, default %(default)s")
    add("--checkpoint", action="append", default=[], metavar="NAME=FOLDER", help="of MicroVLM; repeat")
    add("--only", nargs="+", metavar="NAME", help=f"of {', '.join(CATALOGUE)} and the checkpoints")
    add("--small", action="store_true", help="tiny shapes: shows that this runs, not how fast")
    add("--plot", type=Path, help="folder for speed_disk.png")
    add("--write-v", type=Path, metavar="FOLDER", help="write V with random weights in bf16, and stop")
    options = parser.parse_args(argv)
    if options.rounds < 1 or not CAPTION <= options.tokens <= MOST_TOKENS:
        parser.error(f"--rounds must be 1 or more, --tokens {CAPTION} to {MOST_TOKENS}.")
    # names of the checkpoints
    checkpoints = {}
    for text in options.checkpoint:
        name, _, folder = text.partition("=")
        if not (Path(folder or "-") / "config.json").is_file():
            parser.error(f"--checkpoint {text!r} is not NAME=FOLDER with a folder that has a config.json.")
        if name in CATALOGUE or name in checkpoints:
            parser.error(f"--checkpoint {name!r}: the name is taken.")
        checkpoints[name] = Path(folder)
    options.checkpoint = checkpoints
    # names of all that can be measured
    names = [*checkpoints, *CATALOGUE]
    if unknown := [name for name in options.only or () if name not in names]:
        parser.error(f"--only {unknown[0]!r}: known are {', '.join(names)}.")
    return options


def choose(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """List what to measure, checkpoints first, and what lacks llama.cpp or gguf."""
    names = [name for name in (*options.checkpoint, *CATALOGUE) if not options.only or name in options.only]
    left_out = [] if has_llama_cpp() else [name for name in names if name in LLAMA_CPP]
    return [name for name in names if name not in left_out], left_out


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(THREADS)
    if options.write_v:
        write_random(v_config(options.small), options.write_v)
        print(f"{options.write_v}: V with random weights in bf16")
        return
    print(f"{describe_machine()}\n", flush=True)
    names, left_out = choose(options)
    if left_out:
        print(f"Left out, llama-cpp-python or gguf is not installed: {', '.join(left_out)}.\n", flush=True)
    if not names:
        return
    # measure and print
    results, groups = measure(names, options)
    shape = "tiny models" if options.small else "full size"
    print(f"## {shape}, {THREADS} threads, {options.rounds} rounds of {options.tokens} tokens, random weights\n")
    print(speed_table(results))
    if len(groups) > 1:
        print(f"\nMemory did not suffice for all at once; interleaved inside: {'; '.join(map(', '.join, groups))}.")
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
