"""Mutate files and inputs and check that nothing crashes; caption for as long as one likes.

    python -m tests.fuzz                             10,000 images, 2,000 of each other kind, a soak of 10,000 captions
    python -m tests.fuzz --cases 1000 --soak 0       a tenth of it, without the soak
    python -m tests.fuzz --only memory,soak          only these kinds
    python -m tests.fuzz --only stress               ten minutes of eight threads, twice, the second between guard pages
    python -m tests.fuzz --only configs --replay 17  one case again, with its traceback

Kinds: `images`, mutated files through `open_image` and the processor; `processor`, odd combinations of images and
texts; `configs`, mutated config.json, built on the meta device; `packed`, mutated packed checkpoints, opened and run;
`memory`, mutated memory files, opened and used; `soak`, captions with memory writes and forgets; `stress`, see stress.py.

A case is accepted, and its result checked, or refused with a documented error, raised by a `raise` in Python code, with
a message. All else is `other`: another error, a check that fails, a dead process. A case over `--seconds` is a hang.
Each kind runs in its own process; the peak memory of a case is read from the kernel (Linux).

Exit code: 1 for any `other`, a hang, a case above `--memory` MB, a soak that grew or changed its answers, or an error
under stress; else 0.
"""

import argparse
import faulthandler
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

from microvlm.files import write_json
from microvlm.tables import markdown_table

from .kinds import KINDS, attempt, judge
from .material import packed_nano
from .soak import memory_now, quiet, reset_peak, run_soak
from .stress import stress

LIMIT = 6 << 30  # bytes that a process may take before it gets a MemoryError, which counts as other
STACK = "stack.txt"


def work(connection, name: str, folder: str, options: dict) -> None:
    """Run the cases that arrive on the connection, in a process of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    quiet()
    # limit the memory, silence libtiff, prepare stacks of cases that hang
    now = int(memory_now("VmSize")) << 20
    resource.setrlimit(resource.RLIMIT_AS, (now + LIMIT, now + LIMIT))
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    faulthandler.disable()
    stack = open(Path(folder) / STACK, "w")
    faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True)
    # start, then case after case
    try:
        kind = KINDS[name](Path(folder), **options)
    except Exception:
        connection.send(traceback.format_exc())
        return
    connection.send("ready")
    while (seed := connection.recv()) is not None:
        reset_peak()
        before = memory_now()
        outcome = attempt(kind, seed)
        connection.send((*outcome, memory_now("VmHWM") - before, memory_now()))


class Worker:
    """A process that runs cases of one kind.

    Args:
        name: of the kind.
        folder: for its files.
        options: of the kind.
    """

    def __init__(self, name: str, folder: str, options: dict):
        self.folder = folder
        spawn = multiprocessing.get_context("spawn")
        self.connection, theirs = spawn.Pipe()
        self.process = spawn.Process(target=work, args=(theirs, name, folder, options), daemon=True)
        self.process.start()
        theirs.close()
        if not self.connection.poll(300):
            raise TimeoutError(f"the process for {name} does not start.")
        if (answer := self.connection.recv()) != "ready":
            raise RuntimeError(f"{name} crashed before its first case:\n{answer}")

    def run(self, seed: str, seconds: float) -> tuple[str, str, float, float | None]:
        """Run a case; returns outcome, what happened, peak memory growth and resident memory in MB.

        A case that takes longer is a `hang`; the process then has ended, and the resident memory is None.
        """
        self.connection.send(seed)
        try:
            if self.connection.poll(seconds):
                return self.connection.recv()
        except EOFError:
            self.process.join()
            return "other", f"the process died with {self.process.exitcode}", 0.0, None
        # a hang: print where it is
        os.kill(self.process.pid, signal.SIGUSR1)
        time.sleep(1)
        print((Path(self.folder) / STACK).read_text(), file=sys.stderr)
        self.process.kill()
        self.process.join()
        return "hang", f"takes longer than {seconds} s", 0.0, None

    def stop(self) -> None:
        self.connection.send(None)
        self.process.join(30)


def run_kind(name: str, cases: int, seed: int, seconds: float, **options) -> dict:
    """Run all cases of a kind: counts, errors, peak memory growth of a case and growth over all, in MB."""
    counts, refused, other = Counter(), Counter(), Counter()
    result = {"kind": name, "cases": cases, "peak_mb": 0.0, "growth_mb": 0.0, "slowest_s": 0.0}
    start, worker, first = time.perf_counter(), None, None
    with tempfile.TemporaryDirectory() as folder:
        for number in range(cases):
            worker = worker or Worker(name, folder, options)
            begin = time.perf_counter()
            outcome, text, peak, resident = worker.run(f"{name}-{seed}-{number}", seconds)
            # count
            counts[outcome] += 1
            if outcome == "refused":
                refused[text] += 1
            elif outcome != "accepted":
                other[text] += outcome == "other"
                print(f"{name}: case {number}: {text}", file=sys.stderr)
            # time and memory
            if outcome != "hang":
                result["slowest_s"] = max(result["slowest_s"], time.perf_counter() - begin)
            if peak > result["peak_mb"]:
                result["peak_mb"], result["peak_case"] = peak, number
            if resident is None:
                worker = first = None
            elif number >= cases // 5:  # the first cases fill caches
                first = resident if first is None else first
                result["growth_mb"] = max(result["growth_mb"], resident - first)
        if worker is not None:
            worker.stop()
    result |= {"accepted": counts["accepted"], "hangs": counts["hang"], "refused": dict(refused), "other": dict(+other)}
    return result | {"seconds": time.perf_counter() - start}


def table(results: list[dict]) -> str:
    """Write the kinds, and the soak, as Markdown tables."""
    header = ["kind", "cases", "accepted", "refused", "other", "hangs", "peak of a case, MB", "growth over all, MB"]
    header += ["slowest, s", "seconds"]
    rows, soaks = [], [r for r in results if r["kind"] == "soak"]
    for r in results:
        if r["kind"] not in KINDS:
            continue
        types = ", ".join(f"{count:,} {name}" for name, count in sorted(r["refused"].items(), key=lambda x: -x[1]))
        row = [r["kind"], r["cases"], r["accepted"], types or "0", sum(r["other"].values()), r["hangs"]]
        rows.append(
            row + [f"{r['peak_mb']:.0f}", f"{r['growth_mb']:.0f}", f"{r['slowest_s']:.1f}", f"{r['seconds']:.0f}"]
        )
    tables = [markdown_table(header, rows)] if rows else []
    for r in soaks:
        values = {
            **{name: r[name] for name in ("captions", "writes", "forgets", "questions")},
            "start, MB": f"{r['start_mb']:.1f}",
            "end, MB": f"{r['end_mb']:.1f}",
            "slope, MB per 1,000": f"{r['slope_mb_per_1000']:.2f}",
            "same captions": "yes" if r["same_captions"] else "no",
            "one fact left": f"{r['one_left']:.1e}",
            "none left": f"{r['none_left']:.1e}",
            "seconds": f"{r['seconds']:.0f}",
        }
        tables.append(markdown_table(list(values), [list(values.values())]))
    for r in (r for r in results if r["kind"] == "stress"):
        values = {"threads": r["threads"], "guard pages": "yes" if r["guarded"] else "no", "seconds": r["seconds"]}
        values |= dict(sorted(r["counts"].items())) | {"errors": len(r["errors"])}
        tables.append("\n".join([markdown_table(list(values), [list(values.values())]), *r["errors"]]))
    return "\n\n".join(tables)


def failed(r: dict, memory: float, slope: float) -> bool:
    """Judge a result: limits in MB, and in MB per 1,000 captions."""
    if r["kind"] == "stress":
        return bool(r["errors"])
    if r["kind"] == "soak":
        exact = r["none_left"] < 1e-6 and r["one_left"] < 1e-6
        return not (r["same_captions"] and exact and not r["slope_mb_per_1000"] > slope)
    return bool(r["other"]) or r["hangs"] > 0 or r["peak_mb"] > memory


def replay(name: str, number: int, seed: int, options: dict) -> None:
    """Run one case in this process and print its traceback."""
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        kind = KINDS[name](Path(folder), **options)
        try:
            kind.case(random.Random(f"{name}-{seed}-{number}"))
            print("accepted")
        except Exception as error:
            traceback.print_exc()
            print(f"refused with {type(error).__name__}" if (why := judge(error, kind)) is None else f"other: {why}")


def soak_in_process(captions: int, seed: int) -> dict:
    """Run the soak in a process of its own.

    Large blocks lie apart from the heap: it fragments round the words that a tokenizer keeps, and hides what leaks.
    """
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=run_soak, args=(theirs, captions, seed))
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "131072"
    process.start()
    del os.environ["MALLOC_MMAP_THRESHOLD_"]
    theirs.close()
    result = ours.recv()
    process.join()
    if isinstance(result, str):
        raise RuntimeError(f"the soak crashed:\n{result}")
    return result


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, kinds = parser.add_argument, [*KINDS, "soak", "stress"]
    add("--cases", type=int, default=10_000, help="images, and processor inputs; of other kinds a fifth; %(default)s")
    add("--soak", type=int, default=10_000, help="captions of the soak, 0: none (default: %(default)s)")
    add("--stress", type=float, default=600, help="seconds under stress, twice, 0: none (default: %(default)s)")
    add("--only", default=",".join(kinds), help="kinds, with commas (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--seconds", type=float, default=30.0, help="a case that takes longer is a hang (default: %(default)s)")
    add("--memory", type=float, default=1536.0, help="MB that a case may take (default: %(default)s)")
    add("--slope", type=float, default=1.0, help="MB per 1,000 captions that the soak may grow (default: %(default)s)")
    add("--replay", type=int, metavar="CASE", help="run this case of the one kind in --only here, with its traceback")
    add("--json", type=Path, help="also write everything to this file")
    options = parser.parse_args(argv)
    options.only = options.only.split(",")
    if unknown := set(options.only) - set(kinds):
        parser.error(f"unknown kind {', '.join(sorted(unknown))}: choose from {', '.join(kinds)}")
    if options.replay is not None and (len(options.only) != 1 or options.only[0] not in KINDS):
        parser.error("--replay takes one kind in --only")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    quiet()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        settings = {"packed": {"nano": packed_nano(Path(folder))}} if "packed" in options.only else {}
        if options.replay is not None:
            (name,) = options.only
            replay(name, options.replay, options.seed, settings.get(name, {}))
            return 0
        # kind after kind
        for name in [n for n in options.only if n in KINDS]:
            cases = max(1, round(options.cases * KINDS[name].share))
            results.append(run_kind(name, cases, options.seed, options.seconds, **settings.get(name, {})))
            print(f"{name}: {results[-1]['seconds']:.0f} s", file=sys.stderr, flush=True)
    if "soak" in options.only and options.soak:
        results.append(soak_in_process(options.soak, options.seed))
    if "stress" in options.only and options.stress:
        results += [stress(options.stress, seed=options.seed, guarded=guarded) for guarded in (False, True)]
    print(table(results))
    if options.json:
        write_json(options.json, results)
    return int(any(failed(r, options.memory, options.slope) for r in results))
