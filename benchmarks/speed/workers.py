"""Run subjects in processes of their own and measure them by turns."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from statistics import median
from unittest import mock

import torch
import transformers

from benchmarks.machine import seconds

from .files import THREADS
from .subjects import Subject

BUFFER, SMALL_BUFFER, READS = 2**29, 2**23, 3
PROCESS_BYTES = 2**30  # of a worker without its weights, generously
ENVIRONMENT = {"OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def read_bandwidth(buffer: torch.Tensor) -> float:
    """Measure bytes per second of the fastest pass over a buffer of n x 4,096 float32."""
    integers, matrix = buffer.view(torch.int64), buffer.view(-1, 4096)
    vector = matrix[0].clone()
    ways = (integers.sum, integers.max, lambda: matrix @ vector)
    return buffer.nbytes / min(seconds(way)[0] for way in ways for _ in range(READS))


def start(subject: Subject) -> None:
    """Prepare a process for its subject."""
    global SUBJECT
    torch.set_num_threads(THREADS)
    transformers.utils.logging.disable_progress_bar()
    SUBJECT = subject


def call(method: str, args: tuple):
    return getattr(SUBJECT, method)(*args)


class Worker:
    """A subject in a process of its own."""

    def __init__(self, subject: Subject):
        self.name = subject.name
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), start, (subject,))

    def ask(self, method: str, *args):
        """Call a method of the subject; returns its result, or raises its error."""
        with mock.patch.dict(os.environ, ENVIRONMENT):  # of the process, which starts with the first call
            return self.pool.submit(call, method, args).result()

    def stop(self) -> None:
        self.pool.shutdown()


@dataclass
class Result:
    """Result of a subject: what `Subject.open` returned, one entry per turn, peak memory in bytes."""

    opened: dict
    turns: list[dict[str, float]] = field(default_factory=list)
    peak: int | None = None

    def median(self, key: str) -> float:
        return median(turn[key] for turn in self.turns)

    @property
    def read(self) -> int:
        return sum(self.opened["read"].values())


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


def measure_group(subjects: list[Subject], rounds: int, new_tokens: int, read: Callable[[], float]) -> tuple:
    """Open all subjects, then give each a turn in every round.

    Args:
        subjects: to measure.
        rounds: turns of each.
        new_tokens: of a turn.
        read: measures the bandwidth, once a round.

    Returns:
        Results by name, and the bandwidths, bytes per second.
    """
    workers, results, rates = [Worker(subject) for subject in subjects], {}, []
    try:
        # load all
        for worker in workers:
            results[worker.name] = Result(worker.ask("open", new_tokens))
            print(f"{worker.name}: open", file=sys.stderr, flush=True)
        # in every round a reading of the bandwidth and a turn of each
        for i in range(rounds):
            rates.append(read())
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
    return results, rates
