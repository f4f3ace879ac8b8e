"""Order and follow the rows that a run reads."""

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..data.rows import row_name


class SeededLengthGroupedSampler(LengthGroupedSampler):
    """Rows of similar length together, in an order of seed and epoch alone; the library's own draws from the process's random numbers,
    which a resumed run and other ranks do not share.

    Args:
        batch_size: rows of a group.
        lengths: of all rows.
        seed: of all epochs.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()


class TrackedCollator:
    """A collator that also hands on which rows a batch has (`row_names`) and where a stream stood behind it (`cursor`)."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, rows: list[dict]) -> dict:
        batch = self.collator(rows) | {"row_names": [row_name(row) for row in rows]}
        return batch | ({"cursor": rows[-1]["cursor"]} if "cursor" in rows[-1] else {})
