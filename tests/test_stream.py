"""Streams: every row once an epoch, an order from the seed alone, shared among readers, taken up after any row."""

from itertools import islice

import pytest
import torch
from torch.utils.data import DataLoader
from toy_data import CAPTIONS, pairs, png, toy_model, toy_processor, use_cache, write_parquet, write_tar

from microvlm.data.augment import image_augmentation
from microvlm.data.collators import CaptionCollator
from microvlm.data.episodes import ImageEpisodeCollator
from microvlm.data.rows import load_rows
from microvlm.data.stream import CaptionStream, load_stream, take_rows
from microvlm.train.data import TrackedCollator

SIZES = (5, 1, 4, 3, 6)  # rows of the shards


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    use_cache(monkeypatch, tmp_path / "cache")


def rows_named(names: list[str]) -> list[dict]:
    return [{"image": {"bytes": png(i % 8), "path": None}, "caption": f"row {n}", "id": n} for i, n in enumerate(names)]


@pytest.fixture
def tars(tmp_path) -> str:
    for shard, size in enumerate(SIZES):
        write_tar(tmp_path / f"shard-{shard}.tar", rows_named([f"{shard}-{i}" for i in range(size)]))
    return str(tmp_path / "shard-*.tar")


ALL = sorted(f"{shard}-{i}" for shard, size in enumerate(SIZES) for i in range(size))


def keys(rows) -> list[str]:
    return [row["__key__"] for row in rows]


# --- order


def test_every_row_once_an_epoch_in_an_order_of_the_seed(tars):
    n = len(ALL)
    first = list(islice(CaptionStream(load_stream(tars), seed=0, shuffle_buffer=4), 3 * n))
    epochs = [keys(first[k * n : (k + 1) * n]) for k in range(3)]
    assert all(sorted(epoch) == ALL for epoch in epochs)
    assert [row["epoch"] for row in first] == [0] * n + [1] * n + [2] * n
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != ALL
    assert keys(islice(CaptionStream(load_stream(tars), seed=0, shuffle_buffer=4), 3 * n)) == sum(epochs, [])
    assert keys(islice(CaptionStream(load_stream(tars), seed=1, shuffle_buffer=4), n)) != epochs[0]
    one_by_one = list(islice(CaptionStream(load_stream(tars), seed=0, shuffle_buffer=1), 2 * n))
    assert keys(one_by_one[:n]) != keys(one_by_one[n:])  # the shards' order is drawn anew
    # shards come whole: what is shuffled is their order and the blocks
    shards = [key[0] for key in epochs[0]]
    assert len(set(shards[:5])) <= 3
    row = first[0]
    assert row["image"]["bytes"] and row["caption"] == f"row {row['__key__']}"


@pytest.mark.parametrize("buffer,group", [(1, 1), (3, 1), (100, 1), (8, 2), (100, 3)])
def test_goes_on_behind_any_row(tars, buffer, group):
    n = len(ALL)
    through = list(islice(CaptionStream(load_stream(tars), 3, buffer, group_size=group), 2 * n + 5))
    for cut in range(1, 2 * n + 1):
        stream = CaptionStream(load_stream(tars), 3, buffer, group_size=group)
        stream.go_on(cut, [through[cut - 1]["cursor"]], 0)
        rest = list(islice(stream, 4))
        assert keys(rest) == keys(through[cut : cut + 4]), cut
        assert [row["cursor"] for row in rest] == [row["cursor"] for row in through[cut : cut + 4]]


def test_groups_of_similar_length(tmp_path):
    for shard in range(2):
        lengths = [1 + (32 * shard + i) * 7 % 64 for i in range(32)]
        rows = [{"image": {"bytes": png(0), "path": None}, "caption": "x" * n, "id": f"{shard}-{n}"} for n in lengths]
        write_tar(tmp_path / f"{shard}.tar", rows)

    def epochs(group):
        stream = iter(CaptionStream(load_stream(str(tmp_path / "*.tar")), 0, shuffle_buffer=64, group_size=group))
        return [[len(row["caption"]) for row in islice(stream, 64)] for _ in range(2)]

    def padded(lengths):
        return sum(2 * max(lengths[i : i + 2]) for i in range(0, 64, 2)) - sum(lengths)

    mixed, grouped = epochs(1), epochs(2)
    for epoch in (*mixed, *grouped):
        assert sorted(epoch) == list(range(1, 65))
    assert grouped[0] != grouped[1] and grouped == epochs(2)
    assert max(map(padded, grouped)) < min(map(padded, mixed)) / 2


def test_readers_share_the_rows(tars):
    streams = [CaptionStream(load_stream(tars), seed=0, shuffle_buffer=2, rank=r, world_size=2) for r in range(2)]
    found = []
    for stream in streams:
        epoch = []
        for row in stream:
            if row["epoch"]:
                break
            epoch.append(row["__key__"])
        found.append(epoch)
    assert found[0] and found[1] and not set(found[0]) & set(found[1])
    assert sorted(found[0] + found[1]) == ALL


def collate(rows):
    return keys(rows), rows[-1]["cursor"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_behind_any_batch(tars, workers):
    def loader(stream):
        return DataLoader(stream, batch_size=2, collate_fn=collate, num_workers=workers)

    stream = CaptionStream(load_stream(tars), seed=0, shuffle_buffer=3)
    through = list(islice(loader(stream), 14))
    first = [key for batch, _ in through[:8] for key in batch]
    assert len(set(first)) == 16  # within the first epoch no row twice, whoever reads it
    for cut in (1, 2, 5, 8, 11):
        cursors = {}
        for _, cursor in through[:cut]:
            cursors[cursor[0]] = cursor
        resumed = CaptionStream(load_stream(tars), seed=0, shuffle_buffer=3)
        resumed.go_on(cut, list(cursors.values()), workers)
        assert list(islice(loader(resumed), 3)) == through[cut : cut + 3], cut


def test_limit_is_shared_by_the_shards(tars):
    stream = CaptionStream(load_stream(tars), seed=0, shuffle_buffer=3, limit=12)  # at most 3, 3, 2, 2, 2 of the shards
    epoch = []
    for row in stream:
        if row["epoch"]:
            break
        epoch.append(row["__key__"])
    assert sorted(epoch) == ["0-0", "0-1", "0-2", "1-0", "2-0", "2-1", "3-0", "3-1", "4-0", "4-1"]


# --- sources


def test_parquet_streams_too(tmp_path):
    rows = pairs()
    for k in range(2):
        write_parquet(tmp_path / f"part-{k}.parquet", rows[4 * k : 4 * k + 4])
    stream = CaptionStream(load_stream(str(tmp_path / "part-*.parquet")), shuffle_buffer=3)
    found = list(islice(stream, 8))
    assert sorted(row["caption"] for row in found) == sorted(CAPTIONS)
    assert {row["caption"]: row["image"]["bytes"] for row in found} == {CAPTIONS[i]: png(i) for i in range(8)}


def test_take_rows(tars):
    rows = take_rows(load_stream(tars), 7)
    assert keys(rows) == ["0-0", "0-1", "0-2", "0-3", "0-4", "1-0", "2-0"]
    assert rows[0]["image"]["bytes"] == png(0) and rows[0]["caption"] == "row 0-0"


def test_bad_sources_are_named(tmp_path, tars, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"^data {tmp_path}/no-.*tar does not exist.$"):
        load_stream(str(tmp_path / "no-*.tar"))
    write_tar(tmp_path / "words.tar", rows_named(["a"]), caption="words")
    with pytest.raises(ValueError, match="words.tar has no caption column: expected one of caption, text, "):
        load_stream(str(tmp_path / "words.tar"))
    stream = CaptionStream(load_stream(tars), world_size=3)
    stream.check_readers(1)
    with pytest.raises(ValueError) as error:
        stream.check_readers(2)
    assert str(error.value) == (
        "5 shards for 3 ranks x 2 readers: every reader needs a shard of its own. Use fewer dataloader_num_workers or more shards."
    )


def test_a_shard_cut_short_is_named(tmp_path):
    good = write_tar(tmp_path / "shard-0.tar", rows_named([f"g{i}" for i in range(6)]))
    bad = tmp_path / "shard-1.tar"
    bad.write_bytes(good.read_bytes()[:3000])
    stream = CaptionStream(load_stream(str(tmp_path / "shard-*.tar")), shuffle_buffer=50)
    with pytest.raises(RuntimeError, match=r"^shard 1 of 2 cannot be read after row \d+: ") as error:
        list(islice(stream, 12))
    assert error.value.__cause__ is not None


# --- batches


def test_augmentation_of_a_stream_follows_the_epoch_of_its_rows(tars):
    collator = CaptionCollator(toy_processor(), [2, 3], image_augmentation(degrees=20))
    row = next(iter(CaptionStream(load_stream(tars), shuffle_buffer=1)))
    views = [collator([row | {"epoch": epoch}])["pixel_values"] for epoch in (0, 0, 1)]
    assert torch.equal(views[0], views[1]) and not torch.equal(views[1], views[2])


def test_tracked_batches_say_their_rows_and_cursor(tars):
    rows = list(islice(CaptionStream(load_stream(tars), shuffle_buffer=2), 3))
    batch = TrackedCollator(CaptionCollator(toy_processor(), [2, 3]))(rows)
    assert batch["row_names"] == keys(rows) and batch["cursor"] == rows[-1]["cursor"]
    assert batch["input_ids"].shape[0] == 3
    assert "cursor" not in TrackedCollator(CaptionCollator(toy_processor(), [2, 3]))(pairs(2))


def test_picture_episodes(tmp_path):
    rows = list(load_rows(str(write_parquet(tmp_path / "toy.parquet", pairs()))))
    model, processor = toy_model(), toy_processor()
    prompt = model.default_prompt(1)[0].tolist()
    collator = ImageEpisodeCollator(processor, prompt, image_augmentation(degrees=20), size=4, max_tokens=6, seed=1)
    batch = collator(rows)
    plain = CaptionCollator(processor, prompt, image_augmentation(degrees=20), seed=1)(rows)
    for name, value in plain.items():
        assert torch.equal(batch[name], value), name  # the rows ask as they would without a memory
    assert batch["support_pixel_values"].shape == batch["pixel_values"].shape
    assert not torch.equal(batch["support_pixel_values"], batch["pixel_values"])
    known = batch["known"]
    assert known.shape == (8,) and 0 < known.sum() < 8
    assert torch.equal(batch["support_active"], known.view(2, 4))
    eos = processor.tokenizer.eos_token_id
    for i, caption in enumerate(CAPTIONS):
        ids = [*processor.tokenizer(caption, add_special_tokens=False)["input_ids"], eos][:6]
        assert batch["support_tokens"][i // 4, i % 4].tolist() == ids + [-1] * (6 - len(ids))
        expected = ids + [-1] * (6 - len(ids)) if known[i] else [-1] * 6
        assert batch["target_tokens"][i].tolist() == expected
    collator.set_epoch(1)
    assert not torch.equal(collator(rows)["known"], known)
    collator.set_epoch(0)
    assert torch.equal(collator(rows)["known"], known)  # drawn from seed, epoch and rows alone
    broken = [row | {"image": {"bytes": b"no", "path": None}} if i in (0, 5) else row for i, row in enumerate(rows)]
    collator.max_unreadable_share = 1.0
    left = collator(broken)
    whole = [i for i in range(8) if i not in (0, 5)]
    asks = (left["labels"] != -100).any(1)
    assert left["support_tokens"].shape[:2] == (2, 4) and asks.tolist() == [True] * 6 + [False] * 2
    assert torch.equal(left["support_tokens"].flatten(0, 1), batch["support_tokens"].flatten(0, 1)[whole + whole[:2]])
    assert torch.equal(left["known"][6:], left["known"][:2])  # a row is in a memory or not
    assert torch.equal(left["support_active"].flatten(), left["known"])
    assert (left["attention_mask"] * (left["labels"] == -100)).sum(1).tolist() == [len(prompt)] * 8
    for few, readable in ((rows[:3], 3), (broken[4:6], 1)):
        asks = (collator(few)["labels"] != -100).any(1)
        assert asks.tolist() == [True] * readable + [False] * (4 - readable)
    with pytest.raises(RuntimeError, match="^none of the 1 rows of a batch can be read"):
        collator(broken[:1])


def test_picture_episodes_teach_any_text():
    """What is stored is what has to be said; a row that nobody stored says its caption."""
    model, processor = toy_model(), toy_processor()
    prompt, eos = model.default_prompt(1)[0].tolist(), processor.tokenizer.eos_token_id
    collator = ImageEpisodeCollator(processor, prompt, size=4, max_tokens=12, texts=["a blue circle", "red"])
    captions = collator.answers(CAPTIONS)
    said = []
    for epoch in range(20):
        collator.set_epoch(epoch)
        batch = collator(pairs())
        for i, known in enumerate(batch["known"].tolist()):
            answer = batch["labels"][i][batch["labels"][i] != -100].tolist()
            stored = batch["support_tokens"][i // 4, i % 4]
            assert answer[-1] == eos and stored[stored >= 0].tolist() == answer[:12]
            assert (batch["target_tokens"][i].max() >= 0) == known
            if known:
                said.append(answer == captions[i])
            else:
                assert answer == captions[i]
    assert len(said) > 40 and 0.1 < sum(said) / len(said) < 0.5  # a quarter
