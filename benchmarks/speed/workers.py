"""Run subjects in processes of their own and measure them by turns."""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
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
    """Measure bytes per second of the fastest pass over a float32 buffer; 4,096 divides its size."""
    integers, matrix = buffer.view(torch.int64), buffer.view(-1, 4096)
    vector = matrix[0].clone()
    ways = (integers.sum, integers.max, lambda: matrix @ vector)
    return buffer.nbytes / min(seconds(way)[0] for way in ways for _ in range(READS))


def serve(connection, subject: Subject) -> None:
    """Call the methods that arrive on the connection, until None arrives."""
    torch.set_num_threads(THREADS)
    transformers.utils.logging.disable_progress_bar()
    for method, args in iter(connection.recv, None):
        try:
            connection.send((True, getattr(subject, method)(*args)))
        except Exception:
            connection.send((False, traceback.format_exc()))


class Worker:
    """A subject in a process of its own."""

    def __init__(self, subject: Subject):
        context = multiprocessing.get_context("spawn")
        self.name = subject.name
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, subject), daemon=True)
        with mock.patch.dict(os.environ, ENVIRONMENT):
            self.process.start()
        theirs.close()

    def ask(self, method: str, *args):
        """Call a method of the subject; returns its result.

        Raises:
            RuntimeError: it failed, or the process is gone.
        """
        try:
            self.connection.send((method, args))
            success, answer = self.connection.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError(f"{self.name}: its process ended (out of memory?).") from error
        if not success:
            raise RuntimeError(f"{self.name}: {method} failed.\n{answer}")
        return answer

    def stop(self) -> None:
        if self.process.is_alive():
            try:
                self.connection.send(None)
                self.process.join(10)
            except OSError:
                pass
            self.process.terminate()
        self.process.join()


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
    """Cut names into groups that each need no more than is available; one alone may need more."""
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
        read: measures the bandwidth, once a round.

    Returns:
        Results by name, and the bandwidths, bytes per second.
    """
    workers, rates = [], []
    try:
        for subject in subjects:
            workers.append(Worker(subject))
        results = {}
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
