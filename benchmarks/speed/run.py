"""Speed, memory and bytes of MicroVLM at full size beside llama.cpp and other captioners, and beside what the memory bus allows.

    python -m benchmarks.speed --json runs/speed.json --plot docs
    python -m benchmarks.speed --checkpoint "V packed=runs/v-packed" --checkpoint "M packed=runs/m-packed" --rounds 9
    python -m benchmarks.speed --write-v runs/v-random --write-standin runs/1024-random  # checkpoints to pack, then stops
    python -m benchmarks.speed --small --rounds 2

All weights are random: speed and bytes do not depend on their values. Two threads, batch 1, greedy, the end-of-text token never stops.
Notable:

- Every subject lives in a process of its own, which sleeps while another is asked. In a round every subject has one turn, in the same
  order; a turn before the rounds does not count. Numbers are medians over rounds. Ratios are medians of the rounds' ratios.
- A turn is one plain `generate()` with a streamer that reads the clock. It gives the time to the first token, to the 32nd, and the rate
  between the first token and the last. The clock starts at a decoded picture of 640 x 640 pixels, before the image processor. Token ids
  of the prompt are ready: no tokenizer runs.
- MicroVLM's prompt is one picture (25 positions in V) and 16 text tokens. SmolVLM's is 64 positions and 2 separators a tile, then 16 text
  tokens. BLIP, GIT and ViT-GPT2 get no text, as their users caption.
- llama.cpp runs V's language model alone, no picture: its first token is the pass over as many text tokens as V has positions. It is
  driven by its C functions, its own greedy sampler included: no tokens pass through llama-cpp-python's classes. GGUFs have no vocabulary.
- Quantised GGUFs are made by llama.cpp's own quantizer, with its choices: a tied head becomes Q6_K, or Q8_0 where 256 does not divide the
  width; TQ2_0 and TQ1_0 become Q4_0 where 256 does not divide a row. "+head" forces the type on the head too. The formats column says
  what a file holds. "1024" is V with a hidden size of 1024 and 16 heads, which llama.cpp can pack whole.
- NF4 is bitsandbytes as in recipes/v/stage1.yaml (vision tower and language model, double quantisation), opened from a folder that holds it.
  On processors with AVX512-BF16 its first pass repacks the weights, which the turn that does not count has done.
- Load: once, from a folder just written, so from the page cache, after torch and transformers are imported.
- Bytes on disk: *.safetensors, or the GGUF; no tokenizer, no code.
- Memory: resident size of the process less what it had before loading (Linux). `in memory` is after the turn that does not count, with free
  memory given back. It holds pages of mapped weight files as well. `peak` is the highest from loading to the last round.
- The limit: bytes of the weights that a decoding step reads, as they lie in memory, over the read bandwidth. Weights count that belong to
  modules which run in a step, each tensor once; an embedding, of which a step reads one row, does not; a GGUF counts whole, for its
  tied head. Keys and values do not count. Bandwidth is the highest seen in any round over three ways to read 512 MiB with two threads:
  sum and maximum as int64, and a float32 matrix-vector product.
- Where memory does not suffice for all subjects, they are measured in groups one after the other; a line says so.
- Run it on an idle machine.
"""

import argparse
import importlib.util
import json
import tempfile
from functools import partial
from pathlib import Path
from statistics import median

import torch
import transformers

from benchmarks.overhead import machine, write_random
from benchmarks.parameters import ROOT

from .files import Scratch
from .measure import BUFFER, PROCESS_BYTES, SMALL_BUFFER, available_memory, in_groups, measure_group, read_bandwidth
from .shapes import THREADS, v_config
from .subjects import CAPTION, CATALOGUE, LLAMA_CPP, MOST_TOKENS, MicroVLM
from .tables import limit_table, plot, ratio_table, speed_table


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="turns of every subject that count, default %(default)s")
    parser.add_argument(
        "--tokens", type=int, default=64, help=f"a turn makes, {CAPTION} to {MOST_TOKENS}, default %(default)s"
    )
    parser.add_argument("--checkpoint", action="append", default=[], metavar="NAME=FOLDER", help="of MicroVLM; repeat")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"of {', '.join(CATALOGUE)} and the checkpoints")
    parser.add_argument(
        "--small", action="store_true", help="tiny shapes: shows that this runs, its numbers say nothing"
    )
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.add_argument("--plot", type=Path, help="folder for speed_tokens.png and speed_disk.png")
    parser.add_argument("--scratch", type=Path, default=ROOT / "runs", help="where weights lie meanwhile, default runs")
    parser.add_argument("--write-v", type=Path, metavar="FOLDER", help="write V with random weights in bf16, and stop")
    parser.add_argument("--write-standin", type=Path, metavar="FOLDER", help="the same for the 1024-wide stand-in")
    options = parser.parse_args(argv)
    if options.rounds < 1 or not CAPTION <= options.tokens <= MOST_TOKENS:
        parser.error(f"--rounds must be 1 or more, --tokens {CAPTION} to {MOST_TOKENS}.")
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
    known = [*CATALOGUE, *checkpoints]
    for name in options.only or ():
        if name not in known:
            parser.error(f"--only {name!r}: known are {', '.join(known)}.")
    return options


def chosen(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Names to measure, checkpoints first, and those left out because llama.cpp or gguf is not installed."""
    names = [name for name in (*options.checkpoint, *CATALOGUE) if not options.only or name in options.only]
    if all(importlib.util.find_spec(module) for module in ("llama_cpp", "gguf")):
        return names, []
    return [name for name in names if name not in LLAMA_CPP], [name for name in names if name in LLAMA_CPP]


def main(argv: list[str] | None = None) -> dict | None:
    options = parse(argv)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(THREADS)
    for folder, standin in ((options.write_v, False), (options.write_standin, True)):
        if folder:
            write_random(v_config(options.small, standin), folder)
            print(f"{folder}: {'the stand-in' if standin else 'V'} with random weights in bf16")
    if options.write_v or options.write_standin:
        return None
    where = machine()
    print(f"{where}\n", flush=True)
    names, left_out = chosen(options)
    if left_out:
        print(f"Left out, llama-cpp-python or gguf is not installed: {', '.join(left_out)}.\n", flush=True)
    if not names:
        return None
    buffer = torch.ones((SMALL_BUFFER if options.small else BUFFER) // 4)
    options.scratch.mkdir(parents=True, exist_ok=True)
    results, rates = {}, []
    with tempfile.TemporaryDirectory(prefix="speed-", dir=options.scratch) as folder:
        scratch = Scratch(Path(folder), options.small)
        subjects = {}
        for name in names:
            if name in options.checkpoint:
                subjects[name] = MicroVLM(name, options.checkpoint[name])
            else:
                subjects[name] = CATALOGUE[name](name, scratch)
        needs = {name: 2 * subject.disk_bytes() + PROCESS_BYTES for name, subject in subjects.items()}
        groups = in_groups(needs, available_memory())
        for group in groups:
            members = [subjects[name] for name in group]
            found, read = measure_group(members, options.rounds, options.tokens, partial(read_bandwidth, buffer))
            results |= found
            rates += read
    bandwidth = max(rates)
    shape = "tiny models" if options.small else "full size"
    print(f"## {shape}, {THREADS} threads, {options.rounds} rounds of {options.tokens} tokens, random weights\n")
    print(f"{speed_table(results)}\n")
    if len(groups) > 1:
        print(f"Memory did not suffice for all at once; interleaved inside: {'; '.join(map(', '.join, groups))}.\n")
    text = f"Read bandwidth, {THREADS} threads: {bandwidth / 1e9:.1f} GB/s, the highest of {len(rates)} rounds"
    print(f"{text} (median {median(rates) / 1e9:.1f}).\n\n{limit_table(results, bandwidth)}\n")
    bases = [name for name in options.checkpoint if name in results] or names[:1]
    for name in bases if len(names) > 1 else ():
        print(f"{ratio_table(name, results)}\n")
    if options.plot:
        plot(results, bandwidth, options.plot)
    values = {
        "machine": where,
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
        | {"checkpoint": {name: str(path) for name, path in options.checkpoint.items()}},
        "groups": groups,
        "bandwidth_bytes_per_second": {"highest": bandwidth, "rounds": rates},
        "results": {name: {**r.opened, "peak": r.peak, "turns": r.turns} for name, r in results.items()},
        "left_out": left_out,
    }
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(values, indent=1))
    return values
