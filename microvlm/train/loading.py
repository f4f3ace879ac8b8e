"""Order and name the rows that a run reads, and time the wait for them."""

import time

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..data.rows import row_name


class SeededLengthGroupedSampler(LengthGroupedSampler):
    """Sample rows of similar length together, in an order of seed and epoch alone."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()


class TrackedCollator:
    """Add the rows' `row_names` and the stream's `cursor` to a collator's batches."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, rows: list[dict]) -> dict:
        batch = self.collator(rows) | {"row_names": [row_name(row) for row in rows]}
        return batch | ({"cursor": rows[-1]["cursor"]} if "cursor" in rows[-1] else {})


class WaitClock:
    """Measure how long training waits for data. Start-up and evaluation are not waiting time."""

    def __init__(self):
        self.waited, self.logged_at, self.total_wait, self.total_time = 0.0, None, 0.0, 0.0

    def wait(self, seconds: float) -> None:
        """Count time spent on a step's batches; those of the first step are start-up."""
        if self.logged_at is None:
            self.logged_at = time.perf_counter()
        else:
            self.waited += seconds

    def skip(self, seconds: float) -> None:
        """Leave time out that is not training."""
        if self.logged_at is not None:
            self.logged_at += seconds

    def take(self) -> dict[str, float]:
        """Return the share of waiting since the last call, as `data_wait`."""
        now = time.perf_counter()
        elapsed = now - self.logged_at
        share = {"data_wait": self.waited / elapsed}
        self.total_wait, self.total_time = self.total_wait + self.waited, self.total_time + elapsed
        self.waited, self.logged_at = 0.0, now
        return share
