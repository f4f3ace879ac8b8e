"""Does anything fall over? Files and inputs are mutated, and a packed model captions for as long as one likes.

    python -m tests.fuzz                             10,000 pictures, 2,000 of each other kind, a soak of 10,000 captions
    python -m tests.fuzz --cases 1000 --soak 0       a tenth of it, without the soak
    python -m tests.fuzz --only memory,soak          only these kinds
    python -m tests.fuzz --only configs --replay 17  one case again, with its traceback

Kinds: `pictures`, mutated files through `open_image` and the processor to `pixel_values`; `processor`, odd combinations of pictures and
texts; `configs`, mutated config.json, built on the meta device; `packed`, mutated packed checkpoints, opened and run; `memory`, mutated
memory files, opened and used; `soak`, captions with memory writes and forgets mixed in. `--cases` is the number of pictures and of
processor inputs; the other kinds take a fifth of it.

A case may be accepted, and what comes out is checked, or refused: with a documented type of error, raised on purpose, by a `raise` in
Python code, with a message (that of a picture names its file). Everything else is `other`: an error of another type or one that some
operation fell over, a check that fails, a dead process. A case that takes longer than `--seconds` is a hang. Each kind runs in its own
process, and the peak memory of every case is read from the kernel (Linux).

Exit code: 0; 1, when there was any `other`, a hang, a case above `--memory` MB, or a soak that grew or changed its answers.
"""

import argparse
import faulthandler
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

from .kinds import KINDS, attempt, judge
from .material import packed_nano
from .soak import memory_now, quiet, reset_peak, run_soak

LIMIT = 6 << 30  # bytes that a process may take before it gets a MemoryError, which counts as other
STACK = "stack.txt"


def work(connection, name: str, folder: str, extra: dict) -> None:
    """A process that runs the cases it is sent, one after the other."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    quiet()
    now = int(memory_now("VmSize")) << 20
    resource.setrlimit(resource.RLIMIT_AS, (now + LIMIT, now + LIMIT))
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)  # libtiff and others write there
    faulthandler.disable()
    stack = open(Path(folder) / STACK, "w")
    faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True)  # for cases that hang
    try:
        kind = KINDS[name](Path(folder), **extra)
    except Exception:
        connection.send(traceback.format_exc())
        return
    connection.send("ready")
    while (seed := connection.recv()) is not None:
        reset_peak()
        before = memory_now()
        outcome = attempt(kind, seed)
        connection.send((*outcome, memory_now("VmHWM") - before, memory_now()))


def run_kind(name: str, cases: int, seed: int, seconds: float, **extra) -> dict:
    """All cases of a kind: counts, errors, peak memory growth of a case and growth of the process over all, in MB."""
    refused, other = Counter(), Counter()
    result = {
        "kind": name,
        "cases": cases,
        "accepted": 0,
        "hangs": 0,
        "peak_mb": 0.0,
        "growth_mb": 0.0,
        "slowest_s": 0.0,
    }
    started, worker, first = time.perf_counter(), None, None
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        for number in range(cases):
            if worker is None:
                ours, theirs = spawn.Pipe()
                worker = spawn.Process(target=work, args=(theirs, name, folder, extra), daemon=True)
                worker.start()
                theirs.close()
                if not ours.poll(300):
                    raise TimeoutError(f"the process for {name} does not start.")
                if (answer := ours.recv()) != "ready":
                    raise RuntimeError(f"{name} fell over before its first case:\n{answer}")
            begun = time.perf_counter()
            ours.send(f"{name}-{seed}-{number}")
            try:
                if not ours.poll(seconds):
                    result["hangs"] += 1
                    print(f"{name}: case {number} takes longer than {seconds} s", file=sys.stderr)
                    os.kill(worker.pid, signal.SIGUSR1)
                    time.sleep(1)  # it writes where it is
                    print((Path(folder) / STACK).read_text(), file=sys.stderr)
                    worker.kill()
                    worker.join()
                    worker = first = None
                    continue
                outcome, what, peak, resident = ours.recv()
            except EOFError:
                worker.join()
                outcome, what, peak, resident = "other", f"the process died with {worker.exitcode}", 0.0, None
                worker = first = None
            result["slowest_s"] = max(result["slowest_s"], time.perf_counter() - begun)
            if outcome == "accepted":
                result["accepted"] += 1
            elif outcome == "refused":
                refused[what] += 1
            else:
                other[what] += 1
                print(f"{name}: case {number}: {what}", file=sys.stderr)
            if peak > result["peak_mb"]:
                result["peak_mb"], result["peak_case"] = peak, number
            if worker is not None and number >= cases // 5:  # the first cases fill caches
                first = resident if first is None else first
                result["growth_mb"] = max(result["growth_mb"], resident - first)
        if worker is not None:
            ours.send(None)
            worker.join(30)
    return result | {"refused": dict(refused), "other": dict(other), "seconds": time.perf_counter() - started}


def table(results: list[dict]) -> str:
    """Markdown."""
    lines = []
    if rows := [r for r in results if r["kind"] != "soak"]:
        lines += [
            "| kind | cases | accepted | refused | other | hangs | peak of a case, MB | growth over all, MB | slowest, s | seconds |",
            "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for r in rows:
            types = ", ".join(f"{count:,} {name}" for name, count in sorted(r["refused"].items(), key=lambda x: -x[1]))
            lines.append(
                f"| {r['kind']} | {r['cases']:,} | {r['accepted']:,} | {types or 0} | {sum(r['other'].values())} | {r['hangs']} "
                f"| {r['peak_mb']:.0f} | {r['growth_mb']:.0f} | {r['slowest_s']:.1f} | {r['seconds']:.0f} |"
            )
    for r in (r for r in results if r["kind"] == "soak"):
        lines += [
            "",
            "| captions | writes | forgets | questions | start, MB | end, MB | slope, MB per 1,000 | same captions | one fact left | none left | seconds |",
            "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: |",
            f"| {r['captions']:,} | {r['writes']:,} | {r['forgets']:,} | {r['questions']:,} | {r['start_mb']:.1f} | {r['end_mb']:.1f} "
            f"| {r['slope_mb_per_1000']:.2f} | {'yes' if r['same_captions'] else 'no'} | {r['one_left']:.1e} | {r['none_left']:.1e} "
            f"| {r['seconds']:.0f} |",
        ]
    return "\n".join(lines).strip()


def failed(r: dict, memory: float, slope: float) -> bool:
    if r["kind"] == "soak":
        return not (
            r["same_captions"] and r["none_left"] < 1e-6 and r["one_left"] < 1e-6 and not r["slope_mb_per_1000"] > slope
        )
    return bool(r["other"]) or r["hangs"] > 0 or r["peak_mb"] > memory


def replay(name: str, number: int, seed: int, extra: dict) -> None:
    """One case in this process, with its traceback."""
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        kind = KINDS[name](Path(folder), **extra)
        try:
            kind.case(random.Random(f"{name}-{seed}-{number}"))
            print("accepted")
        except Exception as error:
            traceback.print_exc()
            print(f"refused with {type(error).__name__}" if (why := judge(error, kind)) is None else f"other: {why}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--cases",
        type=int,
        default=10_000,
        help="pictures, and processor inputs; of other kinds a fifth (default: %(default)s)",
    )
    add("--soak", type=int, default=10_000, help="captions of the soak, 0: none (default: %(default)s)")
    add("--only", default=",".join([*KINDS, "soak"]), help="kinds, with commas (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--seconds", type=float, default=30.0, help="a case that takes longer is a hang (default: %(default)s)")
    add("--memory", type=float, default=1536.0, help="MB that a case may take (default: %(default)s)")
    add("--slope", type=float, default=1.0, help="MB per 1,000 captions that the soak may grow (default: %(default)s)")
    add("--replay", type=int, metavar="CASE", help="run this case of the one kind in --only here, with its traceback")
    add("--json", help="also write everything to this file")
    options = parser.parse_args(arguments)
    names = options.only.split(",")
    if unknown := set(names) - {*KINDS, "soak"}:
        parser.error(f"unknown kind {', '.join(sorted(unknown))}: choose from {', '.join([*KINDS, 'soak'])}")
    quiet()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        extra = {"packed": {"nano": packed_nano(Path(folder))}} if "packed" in names else {}
        if options.replay is not None:
            if len(names) != 1 or names[0] not in KINDS:
                parser.error("--replay takes one kind in --only")
            replay(names[0], options.replay, options.seed, extra.get(names[0], {}))
            return 0
        for name in [n for n in names if n in KINDS]:
            cases = max(1, round(options.cases * KINDS[name].share))
            results.append(run_kind(name, cases, options.seed, options.seconds, **extra.get(name, {})))
            print(f"{name}: {results[-1]['seconds']:.0f} s", file=sys.stderr, flush=True)
    if "soak" in names and options.soak:
        spawn = multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=run_soak, args=(theirs, options.soak, options.seed))
        process.start()
        theirs.close()
        result = ours.recv()
        process.join()
        if isinstance(result, str):
            raise RuntimeError(f"the soak fell over:\n{result}")
        results.append(result)
    print(table(results))
    if options.json:
        temporary = Path(options.json).with_suffix(".tmp")
        temporary.write_text(json.dumps(results, indent=1))
        temporary.replace(options.json)
    return int(any(failed(r, options.memory, options.slope) for r in results))


if __name__ == "__main__":
    sys.exit(main())
