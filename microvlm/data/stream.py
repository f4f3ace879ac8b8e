"""Read image-caption pairs shard by shard, resumable by a cursor."""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset, load_dataset
from transformers.trainer_pt_utils import get_length_grouped_indices

from ..model import require
from .layouts import FORMATS, MOST_SHARDS, list_paths, named_columns, one_split, open_data

READ_BATCH = 32  # rows read at a time
FILES = (*FORMATS, ".zip", ".gz")  # no data set's id ends like this


def is_hub_dataset(path: str | list[str]) -> bool:
    """Tell whether a path is a Hub id, `owner/name`, and nothing on this machine."""
    name, *others = list_paths(path) or [""]
    is_id = not others and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)
    return bool(is_id) and not (Path(name).suffix in FILES or Path(name).exists())


def load_stream(path: str | list[str], revision: str | None = None, split: str = "train") -> IterableDataset:
    """Open rows with the columns `image` (undecoded) and `caption`, read when they are asked for."""
    # a data set on the Hub, or what `load_rows` reads
    paths = list_paths(path)
    if is_hub_dataset(paths):
        splits = load_dataset(paths[0], streaming=True, revision=revision)
        return named_columns(splits[one_split(splits, split, paths[0])], paths[0])
    rows = open_data(paths, split, streaming=True)
    if isinstance(rows, Dataset):
        rows = rows.to_iterable_dataset(num_shards=max(1, min(len(rows), MOST_SHARDS)))
    return rows


def caption_length(row: dict) -> int:
    """Count the characters of a row's caption; batches of similar length need less padding."""
    return len(row["caption"]) if isinstance(row["caption"], (str, bytes)) else 0


def take_rows(stream: IterableDataset, limit: int) -> Dataset:
    """Keep the first `limit` rows of a stream in the cache of `datasets`."""
    return Dataset.from_generator(stream.take(limit).__iter__, features=stream.features)


@dataclass(eq=False, repr=False)
class CaptionStream(torch.utils.data.IterableDataset):
    """Read the rows of shards over and over, resumable after any row.

    The order depends on the seed alone. The readers, loader workers of all ranks, share the shards: every epoch draws
    their order, and reader r of R takes each R-th. A reader shuffles blocks of `shuffle_buffer` rows within an epoch.
    A row carries its `epoch` and its `cursor` (worker, epoch, shard, row, taken): where its block began, and how many
    rows of the block were taken.
    """

    rows: IterableDataset  # of `load_stream`
    seed: int = 0
    shuffle_buffer: int = 1000
    limit: int | None = None  # rows of an epoch, shared evenly by the shards; a shard with fewer gives all it has
    group_size: int = 1  # rows of a block come in groups of this size with captions of similar length
    rank: int = 0
    world_size: int = 1

    def __post_init__(self):
        self.first_worker, self.starts = 0, {}

    @property
    def num_shards(self) -> int:
        return self.rows.num_shards

    def check_readers(self, num_workers: int) -> None:
        """Refuse more readers than shards."""
        workers = max(1, num_workers)
        readers = f"{self.num_shards} shards for {self.world_size} ranks x {workers} readers"
        advice = "every reader needs a shard of its own. Use fewer dataloader_num_workers or more shards."
        require(self.num_shards >= self.world_size * workers, f"{readers}: {advice}")

    def go_on(self, batches: int, cursors: list[list[int]], num_workers: int) -> None:
        """Continue after `batches` batches, whose workers stood at `cursors`."""
        self.first_worker = batches % max(1, num_workers)  # a loader asks its workers in turn
        self.starts = {worker: tuple(place) for worker, *place in cursors}

    def __iter__(self) -> Iterator[dict]:
        workers, worker = 1, 0
        if (info := torch.utils.data.get_worker_info()) is not None:
            workers, worker = info.num_workers, (info.id + self.first_worker) % info.num_workers
        reader, readers = self.rank * workers + worker, self.world_size * workers
        for row, epoch, place in self._read(reader, readers, *self.starts.get(worker, (0, 0, 0, 0))):
            yield row | {"epoch": epoch, "cursor": [worker, *place]}

    def _shard(self, index: int, skip: int) -> Iterator[dict]:
        """Read the rows of a shard after the first `skip`."""
        shard = self.rows.shard(num_shards=self.num_shards, index=index)
        most = None if self.limit is None else len(range(index, self.limit, self.num_shards))
        count = 0
        try:
            for batch in shard.iter(batch_size=READ_BATCH):  # `iter` leaves the sharing among workers to us
                for values in zip(*batch.values(), strict=True):
                    if count == most:
                        return
                    if count >= skip:
                        yield dict(zip(batch, values, strict=True))
                    count += 1
        except Exception as error:
            message = f"shard {index} of {self.num_shards} cannot be read after row {count}: {error}"
            raise RuntimeError(message) from error

    def _read(self, reader, readers, epoch, place, row, taken) -> Iterator[tuple[dict, int, tuple[int, int, int, int]]]:
        """Read a reader's rows, each with its epoch and the place to resume from."""
        while True:
            order = random.Random(f"{self.seed} {epoch}").sample(range(self.num_shards), self.num_shards)
            order = order[reader::readers]
            start, block, ends = (epoch, place, row), [], []
            for index in range(place, len(order)):
                skip = row if index == place else 0
                for count, example in enumerate(self._shard(order[index], skip), skip + 1):
                    block.append(example)
                    ends.append((index, count))
                    if len(block) == self.shuffle_buffer:
                        yield from self._shuffled(block, reader, start, taken, (epoch, *ends[-1]))
                        start, block, ends, taken = (epoch, *ends[-1]), [], [], 0
            # the last block of an epoch may be short
            epoch, place, row = epoch + 1, 0, 0
            if block:
                yield from self._shuffled(block, reader, start, taken, (epoch, 0, 0))
            taken = 0

    def _shuffled(self, block, reader, start, taken, end):
        """Shuffle a block by seed and place; give its rows after the first `taken`."""
        draw = random.Random(f"{self.seed} {reader} {start}")
        order = list(range(len(block)))
        if self.group_size > 1:
            generator = torch.Generator().manual_seed(draw.getrandbits(63))
            order = get_length_grouped_indices(list(map(caption_length, block)), self.group_size, generator=generator)
        else:
            draw.shuffle(order)
        for count, index in enumerate(order[taken:], taken + 1):
            yield block[index], start[0], (*start, count) if count < len(order) else (*end, 0)
