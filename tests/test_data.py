"""Three formats, one set of rows; what cannot be read; and the batches a collator makes of it."""

import copy
import io
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import IMAGE_ID
from datasets import Dataset, Image
from PIL import Image as PILImage
from torch.utils.data import DataLoader
from toy_data import (
    CAPTIONS,
    pairs,
    png,
    toy_model,
    toy_processor,
    use_cache,
    write_files,
    write_folder,
    write_parquet,
    write_tar,
)

from microvlm.data.augment import change_style, image_augmentation
from microvlm.data.collators import MIN_ROWS_BEFORE_STOP, CaptionCollator, FeatureCollator
from microvlm.data.feature_cache import cache_vision_features, write_vision_features
from microvlm.data.rows import UnreadableRowError, decode_row, is_copyleft, load_rows, row_name
from microvlm.data.stream import load_stream

FORMATS = ("parquet", "imagefolder", "webdataset", "files")
COPYLEFT = [
    "CC-BY-SA-4.0",
    "CC-BY-SA-3.0",
    "GPL-2.0-only (package)",
    "GPL-3.0-or-later (package)",
    "GPLv2+",
    "GPLv3",
    "LGPL-3.0-only",
    "AGPL-3.0-only",
    "GFDL-1.3",
    "gpl-3.0",
    "CC_BY_SA_4.0",
    "CC-BY-NC_SA_4.0",
    "cc-by-sa4.0",
    "CC-BYSA",
    "Share_Alike",
    "agpl-3.0",
    "lgpl",
    "GNU Affero General Public License v3",
    "GNU Free Documentation Licence",
    "cc-by-sa-4.0",
    "CC BY SA 4.0",
    "cc-by-nc-sa-2.0",
    "CC-SA-1.0",
    "https://creativecommons.org/licenses/by-sa/4.0/",
    "Creative Commons Attribution-ShareAlike 4.0",
    "Attribution-Share Alike 3.0",
]
FREE = [
    "CC-BY-4.0",
    "CC-BY-3.0",
    "CC-BY-2.0",
    "MIT",
    "Apache-2.0",
    "Public Domain",
    "CC0-1.0",
    "BSD-3-Clause (package)",
]
PROMPT = [2, IMAGE_ID, IMAGE_ID, IMAGE_ID, IMAGE_ID, IMAGE_ID, 3]


@pytest.fixture(scope="module")
def processor():
    return toy_processor()


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    use_cache(monkeypatch, tmp_path / "cache")


@pytest.fixture
def toy_tower():
    return toy_model().model.vision_tower.eval()


def truncated(i: int = 0) -> dict:
    return {"bytes": png(i)[:60], "path": None}


def memory_rows(rows: list[dict]) -> Dataset:
    """Rows as `load_rows` gives them, without a file."""
    return Dataset.from_list(rows).cast_column("image", Image(decode=False))


def contents(rows, processor) -> dict[str, torch.Tensor]:
    return {caption: picture for picture, caption in (decode_row(row, processor.image_processor) for row in rows)}


# --- formats


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_gives_the_same_pictures_and_captions(format, tmp_path, processor):
    write = {"parquet": write_parquet, "imagefolder": write_folder, "webdataset": write_tar, "files": write_files}[
        format
    ]
    suffix = {"parquet": ".parquet", "webdataset": ".tar"}.get(format, "")
    path = write(tmp_path / f"toy{suffix}", pairs())
    rows = load_rows(str(path))
    assert len(rows) == 8 and {"image", "caption"} <= set(rows.column_names)
    found = contents(rows, processor)
    assert list(found) == CAPTIONS
    for i, caption in enumerate(CAPTIONS):
        expected = torch.tensor(list(PILImage.open(io.BytesIO(png(i))).tobytes()), dtype=torch.uint8)
        assert torch.equal(found[caption], expected.view(32, 32, 3).permute(2, 0, 1))


def test_what_img2dataset_leaves_in_a_folder(tmp_path, processor):
    """Its tars beside statistics and a parquet of metadata; its files with a JSON each."""
    rows = pairs()
    folder = tmp_path / "webdataset"
    folder.mkdir()
    for shard in range(2):
        write_tar(folder / f"0000{shard}.tar", rows[4 * shard : 4 * shard + 4])
        (folder / f"0000{shard}_stats.json").write_text("{}")
        write_parquet(folder / f"0000{shard}.parquet", rows[:1])
    assert list(contents(load_rows(str(folder)), processor)) == CAPTIONS
    files = write_files(tmp_path / "files", rows)
    for picture in files.rglob("*.png"):
        picture.with_suffix(".json").write_text("{}")
    (files / "00000" / "toy-3.txt").unlink()  # a picture without a caption is no pair
    assert list(contents(load_rows(str(files)), processor)) == [c for c in CAPTIONS if c != CAPTIONS[3]]
    empty = tmp_path / "empty"
    empty.mkdir()
    message = f"^{empty} has no captions: expected parquet, tars, a table of paths and texts, or images with .txt "
    with pytest.raises(ValueError, match=message):
        load_rows(str(empty))


def test_globs_and_lists_of_tars(tmp_path, processor):
    rows = pairs()
    first, second = write_tar(tmp_path / "shard-0.tar", rows[:3]), write_tar(tmp_path / "shard-1.tar", rows[3:])
    for path in (str(tmp_path / "shard-*.tar"), [str(first), str(second)], [first, second]):
        assert sorted(contents(load_rows(path), processor)) == sorted(CAPTIONS)
    assert load_rows(str(first))["caption"][:] == CAPTIONS[:3]


@pytest.mark.parametrize("image,caption", [("jpg", "txt"), ("png", "text"), ("webp", "caption"), ("image", "text")])
def test_column_synonyms(image, caption, tmp_path, processor):
    rows = [{image: row["image"], caption: row["caption"]} for row in pairs(3)]
    found = load_rows(str(write_parquet(tmp_path / "toy.parquet", rows, image)))
    assert found.column_names == ["image", "caption"]
    assert list(contents(found, processor)) == CAPTIONS[:3]


def test_folder_with_text_column_and_webdataset_with_jpg_name(tmp_path, processor):
    assert list(contents(load_rows(str(write_folder(tmp_path / "f", pairs(2), "text"))), processor)) == CAPTIONS[:2]
    assert list(contents(load_rows(str(write_tar(tmp_path / "t.tar", pairs(2), "jpg"))), processor)) == CAPTIONS[:2]


def test_parquet_of_bare_bytes(tmp_path, processor):
    rows = [{"image": png(i), "caption": CAPTIONS[i]} for i in range(2)]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "bytes.parquet"))
    assert list(contents(load_rows(str(tmp_path / "bytes.parquet")), processor)) == CAPTIONS[:2]


def test_limit_keeps_the_first_rows(tmp_path):
    path = str(write_parquet(tmp_path / "toy.parquet", pairs()))
    assert load_rows(path, limit=3)["caption"][:] == CAPTIONS[:3]
    assert len(load_rows(path, limit=100)) == 8


# --- licences


@pytest.mark.parametrize("licence", COPYLEFT)
def test_copyleft(licence):
    assert is_copyleft(licence)


@pytest.mark.parametrize("licence", FREE)
def test_not_copyleft(licence):
    assert not is_copyleft(licence)


def test_exclude_copyleft_drops_copyleft_and_unstated_rows(tmp_path):
    licences = ["MIT", "CC-BY-SA-4.0", "CC-BY-4.0", "GPLv2+", None, "Public Domain", "GPL-3.0-or-later (package)", ""]
    path = str(write_parquet(tmp_path / "toy.parquet", pairs(licence=licences)))
    assert load_rows(path, exclude_copyleft=True)["id"][:] == ["toy-0", "toy-2", "toy-5"]
    assert load_rows(path, exclude_copyleft=True, limit=2)["id"][:] == ["toy-0", "toy-2"]
    assert len(load_rows(path)) == 8


def test_exclude_copyleft_needs_licences(tmp_path):
    path = str(write_parquet(tmp_path / "toy.parquet", pairs(2)))
    message = f"exclude_copyleft needs a licence column; {path} has only image, caption, id."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load_rows(path, exclude_copyleft=True)


# --- what is wrong with a source


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^data .*none\.parquet does not exist\.$"):
        load_rows(str(tmp_path / "none.parquet"))
    with pytest.raises(FileNotFoundError, match="none"):
        load_rows(str(tmp_path / "none-*.tar"))
    there = write_parquet(tmp_path / "there.parquet", pairs(1))
    with pytest.raises(FileNotFoundError, match=r"second\.parquet does not exist\.$"):
        load_rows([str(there), str(tmp_path / "second.parquet")])


def test_an_empty_list_of_paths(tmp_path):
    for load in (load_rows, load_stream):
        with pytest.raises(ValueError, match="^the data is an empty list of paths.$"):
            load([])


def test_endings_in_capitals(tmp_path, processor):
    for picture in write_files(tmp_path / "files", pairs()).rglob("*.png"):
        picture.rename(picture.with_suffix(".PNG"))
    assert list(contents(load_rows(str(tmp_path / "files")), processor)) == CAPTIONS


def test_no_caption_or_picture_column_lists_what_there_is(tmp_path):
    rows = [{"image": row["image"], "title": row["caption"], "id": row["id"]} for row in pairs(2)]
    path = str(write_parquet(tmp_path / "a.parquet", rows))
    message = f"{path} has no caption column: expected one of caption, text, txt, captions, sentences, conversations, found image, title, id."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load_rows(path)
    Dataset.from_list([{"caption": "a"}]).to_parquet(str(tmp_path / "b.parquet"))
    message = "b.parquet has no image column: expected one of image, jpg, jpeg, png, webp, file_name, image_path, "
    with pytest.raises(ValueError, match=re.escape(message)):
        load_rows(str(tmp_path / "b.parquet"))


def test_several_image_folders_are_refused(tmp_path):
    folders = [str(write_folder(tmp_path / name, pairs(1))) for name in "ab"]
    with pytest.raises(ValueError, match=f"^an image folder is one path, got 2: {re.escape(', '.join(folders))}.$"):
        load_rows(folders)


# --- what is wrong with a row


@pytest.mark.parametrize("caption", [None, "", "  \n"])
def test_row_without_caption(caption, tmp_path, processor):
    rows = pairs(2)
    rows[1]["caption"] = caption
    loaded = load_rows(str(write_parquet(tmp_path / "toy.parquet", rows)))
    with pytest.raises(UnreadableRowError, match=r"^row toy-1 has no caption\.$"):
        decode_row(loaded[1], processor.image_processor)
    assert decode_row(loaded[0], processor.image_processor)[1] == CAPTIONS[0]


def test_row_without_picture(tmp_path, processor):
    rows = pairs(2)
    rows[1]["image"] = None
    loaded = load_rows(str(write_parquet(tmp_path / "toy.parquet", rows)))
    with pytest.raises(UnreadableRowError, match=r"^row toy-1 has no picture\.$"):
        decode_row(loaded[1], processor.image_processor)


@pytest.mark.parametrize("format", FORMATS)
def test_truncated_picture_names_the_row(format, tmp_path, processor):
    rows = pairs(3)
    rows[1]["image"] = truncated(1)
    if format == "parquet":
        path = write_parquet(tmp_path / "toy.parquet", rows)
    elif format == "imagefolder":
        path = write_folder(tmp_path / "toy", rows)
    elif format == "files":
        path = write_files(tmp_path / "toy", rows)
    else:
        path = write_tar(tmp_path / "toy.tar", rows)
    loaded = load_rows(str(path))
    with pytest.raises(UnreadableRowError, match=r"^row \S*toy-1\S*: picture cannot be read: .+"):
        decode_row(loaded[1], processor.image_processor)
    assert [decode_row(loaded[i], processor.image_processor)[1] for i in (0, 2)] == [CAPTIONS[0], CAPTIONS[2]]


def test_pictures_that_pillow_or_the_limit_refuse(processor, monkeypatch):
    row = pairs(1)[0]
    with pytest.raises(UnreadableRowError, match="row toy-0: picture cannot be read: .* is not an image"):
        decode_row({**row, "image": {"bytes": b"text", "path": None}}, processor.image_processor)
    with pytest.raises(UnreadableRowError, match="row toy-0: picture cannot be read"):
        decode_row({**row, "image": {"bytes": None, "path": "nowhere.png"}}, processor.image_processor)
    monkeypatch.setattr(processor.image_processor, "pixel_limit", 1000)
    with pytest.raises(UnreadableRowError, match="row toy-0: .*32 x 32 pixels"):
        decode_row(row, processor.image_processor)
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", 100)  # Pillow's own error is no ValueError
    with pytest.raises(UnreadableRowError, match="row toy-0: .*decompression bomb"):
        decode_row(row, processor.image_processor)


@pytest.mark.parametrize(
    "row,name",
    [
        ({"id": "a", "__key__": "b"}, "a"),
        ({"id": 0}, "0"),
        ({"__key__": "b", "image": {"path": "c.png"}}, "b"),
        ({"id": None, "image": {"path": "c.png"}}, "c.png"),
        ({"image": {"path": None}}, "without a name"),
    ],
)
def test_row_name(row, name):
    assert row_name(row) == name


def test_caption_of_bytes_is_stripped_text(processor):
    row = {**pairs(1)[0], "caption": b" caf\xc3\xa9 \xff\n"}
    assert decode_row(row, processor.image_processor)[1] == "café \N{REPLACEMENT CHARACTER}"


# --- collator


def test_collator_batch(processor):
    prompt = toy_model().default_prompt(1)[0].tolist()
    assert prompt == PROMPT
    batch = CaptionCollator(processor, prompt)(pairs())
    tokenizer = processor.tokenizer
    assert set(batch) == {"input_ids", "attention_mask", "labels", "pixel_values"}
    assert batch["pixel_values"].shape == (8, 3, 32, 32)
    lengths = []
    for i, caption in enumerate(CAPTIONS):
        ids, mask, labels = (batch[name][i].tolist() for name in ("input_ids", "attention_mask", "labels"))
        answer = tokenizer(caption, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        row = prompt + answer
        padding = len(ids) - len(row)
        assert ids == [tokenizer.pad_token_id] * padding + row
        assert mask == [0] * padding + [1] * len(row)
        assert labels == [-100] * (len(ids) - len(answer)) + answer
        assert tokenizer.decode(answer[:-1]) == caption
        lengths.append(padding)
    assert min(lengths) == 0 < max(lengths)  # there was something to pad


def test_collator_pictures_are_those_of_the_processor(processor):
    pictures = [PILImage.open(io.BytesIO(png(i))) for i in range(3)]
    expected = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    assert torch.equal(CaptionCollator(processor, PROMPT)(pairs(3))["pixel_values"], expected)


def test_captions_cannot_smuggle_in_special_tokens(processor):
    rows = pairs(2)
    rows[0]["caption"] = "a red <image> square<|endoftext|>"
    batch = CaptionCollator(processor, PROMPT)(rows)
    assert (batch["input_ids"] == IMAGE_ID).sum(1).tolist() == [5, 5]
    assert (batch["labels"] == processor.tokenizer.eos_token_id).sum(1).tolist() == [1, 1]
    toy_model()(**batch)  # placeholders and pictures match
    assert IMAGE_ID in processor.tokenizer("a <image>")["input_ids"]  # other calls are not affected


def test_bad_rows_are_skipped_counted_and_named(processor, caplog):
    rows = pairs(4)
    rows[1]["image"], rows[2]["caption"] = truncated(), ""
    collator = CaptionCollator(processor, PROMPT)
    batch = collator(rows)
    good = CaptionCollator(processor, PROMPT)([rows[0], rows[3]])
    assert all(torch.equal(batch[name], good[name]) for name in good)
    assert (collator.seen, collator.unreadable) == (4, 2)
    assert "skipped (1 of 2 rows so far): row toy-1: picture cannot be read" in caplog.text
    assert "skipped (2 of 3 rows so far): row toy-2 has no caption." in caplog.text


def test_names_in_data_do_not_command_the_terminal(processor, caplog):
    rows = pairs(2)
    rows[0] |= {"id": "a\x1b[31m", "image": {"bytes": b"none", "path": "b\x1b[2J\u202e.png"}}
    CaptionCollator(processor, PROMPT)(rows)
    assert "row a\\u001b[31m: picture" in caplog.messages[0] and "b\\u001b[2J\\u202e.png" in caplog.messages[0]


def test_counts_include_the_workers_of_a_loader(processor):
    rows = pairs(8)
    rows[3]["caption"] = None
    collator = CaptionCollator(processor, PROMPT)
    loader = DataLoader(memory_rows(rows), 2, collate_fn=collator, num_workers=2, multiprocessing_context="fork")
    assert sum(len(batch["labels"]) for batch in loader) == 7
    assert (collator.seen, collator.unreadable) == (8, 1)


def test_stops_above_the_share_but_not_early(processor):
    good, bad = pairs(1)[0], {**pairs(1)[0], "caption": None}
    collator = CaptionCollator(processor, PROMPT, max_unreadable_share=0.1)
    assert MIN_ROWS_BEFORE_STOP == 100
    assert len(collator([good, bad])["labels"]) == 1  # a half, but of few rows
    assert len(collator([good] * 89 + [bad] * 8)["labels"]) == 89
    assert len(collator([bad, good])["labels"]) == 1  # row 100 is the tenth bad one: the share, not above it
    with pytest.raises(RuntimeError) as caught:
        collator([bad, good])
    assert str(caught.value) == (
        "11 of 102 training rows cannot be read, more than the allowed share of 0.1. "
        "The last one: row toy-0 has no caption."
    )


def test_share_over_few_rows_does_not_stop(processor):
    bad = {**pairs(1)[0], "caption": None}
    collator = CaptionCollator(processor, PROMPT, max_unreadable_share=0.0)
    for _ in range(MIN_ROWS_BEFORE_STOP // 2 - 1):
        assert len(collator([pairs(1)[0], bad])["labels"]) == 1
    assert (collator.seen, collator.unreadable) == (MIN_ROWS_BEFORE_STOP - 2, MIN_ROWS_BEFORE_STOP // 2 - 1)
    with pytest.raises(RuntimeError, match=rf"^50 of {MIN_ROWS_BEFORE_STOP} training rows cannot be read, .* of 0\. "):
        collator([pairs(1)[0], bad])


def test_batch_with_nothing_readable(processor):
    rows = [{**row, "caption": None} for row in pairs(3)]
    with pytest.raises(RuntimeError, match=r"^none of the 3 rows of a batch can be read\.$"):
        CaptionCollator(processor, PROMPT)(rows)


# --- augmentation


def test_augmentation_changes_pictures_only_where_it_is_given(processor):
    plain = CaptionCollator(processor, PROMPT)
    augmented = CaptionCollator(processor, PROMPT, augment=image_augmentation())
    first, expected = augmented(pairs()), plain(pairs())
    assert torch.equal(first["input_ids"], expected["input_ids"]) and torch.equal(first["labels"], expected["labels"])
    assert first["pixel_values"].shape == expected["pixel_values"].shape
    assert all(not torch.equal(a, b) for a, b in zip(first["pixel_values"][:6], expected["pixel_values"][:6]))
    assert torch.equal(plain(pairs())["pixel_values"], expected["pixel_values"])


def test_augmentation_depends_on_seed_epoch_and_pictures_alone(processor):
    make = lambda seed: CaptionCollator(processor, PROMPT, augment=image_augmentation(), seed=seed)  # noqa: E731
    collator = make(0)
    first = collator(pairs())["pixel_values"]
    torch.manual_seed(123)
    before = torch.get_rng_state()
    collator(pairs(4))
    assert torch.equal(collator(pairs())["pixel_values"], first)  # whatever was drawn in between
    assert torch.equal(torch.get_rng_state(), before)  # and the training's own draws are not touched
    assert not torch.equal(make(1)(pairs())["pixel_values"], first)
    assert not torch.equal(collator(pairs(4))["pixel_values"], first[:4])
    collator.set_epoch(1)
    assert not torch.equal(collator(pairs())["pixel_values"], first)
    loader = DataLoader(memory_rows(pairs()), 8, collate_fn=collator, num_workers=1, multiprocessing_context="fork")
    collator.set_epoch(0)
    assert torch.equal(next(iter(loader))["pixel_values"], first)  # workers hear of the epoch too


def test_augmentation_comes_before_the_normalisation(processor):
    seen = []
    collator = CaptionCollator(processor, PROMPT, augment=lambda pictures: seen.append(pictures) or pictures)
    torch.testing.assert_close(
        collator(pairs())["pixel_values"], CaptionCollator(processor, PROMPT)(pairs())["pixel_values"]
    )
    assert seen[0].shape == (8, 3, 32, 32) and (seen[0].min(), seen[0].max()) == (0, 1)


def test_augmentation_keeps_sides_and_range():
    torch.manual_seed(0)
    pictures = torch.ones(64, 3, 32, 32)
    pictures[..., :8] = 0  # dark on the left
    for color in (0.0, 0.25):
        out = image_augmentation(degrees=10, shift=0.1, scale=0.2, color=color)(pictures)
        assert out.shape == pictures.shape and out.dtype == torch.float32
        assert 0 <= out.min() < out.max() <= 1
        assert (out[..., :8].mean((1, 2, 3)) < out[..., -8:].mean((1, 2, 3))).all()  # never flipped
    assert len(set(out.mean((1, 2, 3)).tolist())) == 64  # every picture in its own way


def plain_styles(x: np.ndarray) -> dict[str, np.ndarray]:
    """Every form that `change_style` gives a picture (3, H, W), pixel by pixel in float64."""
    x = x.astype(np.float64)
    _, H, W = x.shape
    at = lambda y, z: x[:, min(max(y, 0), H - 1), min(max(z, 0), W - 1)]  # noqa: E731  the border goes on
    gray = lambda y, z: at(y, z).mean()  # noqa: E731
    edge, lines, blurred = np.zeros((H, W)), np.zeros((H, W)), np.zeros_like(x)
    for y in range(H):
        for z in range(W):
            slope = abs(gray(y, z + 1) - gray(y, z - 1)) + abs(gray(y + 1, z) - gray(y - 1, z))
            edge[y, z] = min(4 * slope, 1)
            blurred[:, y, z] = np.mean([at(y + i, z + j) for i in (-1, 0, 1) for j in (-1, 0, 1)], 0)
    for y in range(H):
        for z in range(W):
            lines[y, z] = 1 - edge[max(y - 1, 0) : y + 2, max(z - 1, 0) : z + 2].max()
    return {"as it was": x, "outlined": lines * x, "lines": np.stack([lines] * 3), "blurred": blurred}


def style_counts(out: torch.Tensor, picture: torch.Tensor) -> dict[str, int]:
    """How many of the pictures (B, 3, H, W) have which form of `picture`; every one has to have one."""
    styles = plain_styles(picture.numpy())
    found = {
        n: int(((out - torch.from_numpy(s).float()).abs().amax((1, 2, 3)) < 1e-5).sum()) for n, s in styles.items()
    }
    assert sum(found.values()) == len(out)
    return found


def test_change_style_outlines_and_blurs_a_share_of_the_pictures(monkeypatch):
    picture = torch.rand(3, 6, 5, generator=torch.Generator().manual_seed(0)) * 0.05 + 0.2
    picture[:, 3:, 2:] += 0.5  # black lines here, faint ones elsewhere
    pictures, before = picture.expand(2000, -1, -1, -1).contiguous(), torch.get_rng_state()
    out = change_style(pictures, 0.2, torch.Generator().manual_seed(0))
    assert torch.equal(out, change_style(pictures, 0.2, torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(pictures[1999], picture)
    counts = style_counts(out, picture)
    expected = {"as it was": 1200, "outlined": 300, "lines": 100, "blurred": 400}
    assert all(abs(counts[name] - number) < 4 * number**0.5 for name, number in expected.items()), counts
    assert torch.equal(change_style(pictures, 0.0), pictures)
    monkeypatch.setattr("microvlm.data.augment.random_affine", lambda B, *limits: torch.eye(2, 3).expand(B, 2, 3))
    torch.manual_seed(0)
    augment = image_augmentation(color=0, style=0.2)
    counts = style_counts(augment(pictures[:500]), picture)
    assert all(abs(counts[name] - number / 4) < 4 * (number / 4) ** 0.5 for name, number in expected.items()), counts


# --- kept features of a frozen vision tower


def test_vision_cache(processor, tmp_path, toy_tower, monkeypatch):
    monkeypatch.setattr("microvlm.data.feature_cache.BATCH_SIZE", 3)
    tower, folder = toy_tower, str(tmp_path / "features")
    tower.register_module("statistics", torch.nn.BatchNorm2d(2))  # its count of batches is a scalar, as a convnet's
    rows = memory_rows([*pairs(3), truncated(3), *pairs(8)[4:]])

    def make():
        return CaptionCollator(processor, PROMPT, augment=image_augmentation(), max_unreadable_share=1.0)

    features, kept = cache_vision_features(tower, make(), rows, 2, folder, "t")
    assert features.dtype == torch.bfloat16 and features.shape == (2, 7, 17, 24)
    assert kept["caption"] == [rows[i]["caption"] for i in (0, 1, 2, 4, 5, 6, 7)] and "image" not in kept.column_names
    assert kept["feature_row"] == list(range(7))
    assert not torch.equal(features[0], features[1])  # another view each
    # the second batch of view 0 holds row 3, which cannot be read; later views skip it
    for view, batch, places in ((0, [4, 5], slice(3, 5)), (0, [6, 7], slice(5, 7)), (1, [0, 1, 2], slice(0, 3))):
        collator = make()
        collator.set_epoch(view)
        pixel_values = collator([rows[i] for i in batch])["pixel_values"]
        with torch.inference_mode():
            expected = copy.deepcopy(tower).bfloat16()(pixel_values.bfloat16()).last_hidden_state
        assert torch.equal(features[view, places], expected)

    # found again, row by row and epoch by epoch
    before = {p.name: p.stat().st_mtime_ns for p in Path(folder).iterdir()}
    again, kept = cache_vision_features(tower, make(), rows, 2, folder, "t")
    assert torch.equal(again, features) and before == {p.name: p.stat().st_mtime_ns for p in Path(folder).iterdir()}
    collator = FeatureCollator(processor, PROMPT, features=again)
    batch, plain = collator([kept[5], kept[0]]), CaptionCollator(processor, PROMPT)([rows[6], rows[0]])
    assert torch.equal(batch["vision_features"], torch.stack([features[1, 5], features[0, 0]]))
    collator.set_epoch(1)
    assert torch.equal(collator([kept[5]])["vision_features"], features[0, 5:6])
    assert torch.equal(batch["input_ids"], plain["input_ids"]) and torch.equal(batch["labels"], plain["labels"])
    assert "pixel_values" not in batch and collator.seen == 3


def test_stale_vision_cache_is_not_taken(processor, tmp_path, toy_tower):
    tower, folder, rows = toy_tower, tmp_path / "features", memory_rows(pairs(4))
    make = lambda **kwargs: CaptionCollator(processor, PROMPT, **kwargs)  # noqa: E731
    files = lambda: len(list(folder.glob("*.bin")))  # noqa: E731
    first, _ = cache_vision_features(tower, make(), rows, 1, str(folder), "t")
    for count, arguments in enumerate(
        [
            (make(), rows, 1, str(folder), "u"),
            (make(seed=1), rows, 1, str(folder), "t"),
            (make(), rows, 2, str(folder), "t"),
        ]
        + [(make(), rows.select([3, 2, 1]), 1, str(folder), "t")],
        start=2,
    ):
        cache_vision_features(tower, *arguments)
        assert files() == count
    with torch.no_grad():
        next(tower.parameters()).mul_(2.0)
    changed, _ = cache_vision_features(tower, make(), rows, 1, str(folder), "t")
    assert files() == 6 and not torch.equal(changed, first)
    with pytest.raises(RuntimeError, match="^none of the 2 training rows can be read.$"):
        bad = memory_rows([truncated(1), truncated(2)])
        cache_vision_features(tower, make(max_unreadable_share=1.0), bad, 1, str(folder), "t")
    assert files() == 6
    # a file whose index was not yet written is an interrupted run: made again
    for index in folder.glob("*.json"):
        index.unlink()
    again, _ = cache_vision_features(tower, make(), rows, 1, str(folder), "t")
    assert torch.equal(again, changed)


def test_changed_pictures_of_a_folder_are_not_taken_from_the_vision_cache(processor, tmp_path, toy_tower):
    folder, cache = write_files(tmp_path / "pictures", pairs(4)), tmp_path / "features"
    make = lambda: cache_vision_features(  # noqa: E731
        toy_tower, CaptionCollator(processor, PROMPT), load_rows(str(folder)), 1, str(cache), "t"
    )[0].clone()
    first = make()
    assert torch.equal(make(), first) and len(list(cache.glob("*.bin"))) == 1
    picture = next(folder.rglob("*.png"))
    picture.write_bytes(png(7))
    changed = make()
    assert not torch.equal(changed, first) and len(list(cache.glob("*.bin"))) == 2


def test_a_vision_cache_is_made_once_by_two_who_need_it(processor, tmp_path, toy_tower, monkeypatch):
    rows, write, made = memory_rows(pairs(4)), write_vision_features, []

    def slow(*args):
        made.append(threading.get_ident())
        out = write(*args)
        time.sleep(0.5)
        return out

    def need(_):
        collator = CaptionCollator(processor, PROMPT)
        return cache_vision_features(toy_tower, collator, rows, 1, str(tmp_path / "features"), "t")[0].clone()

    monkeypatch.setattr("microvlm.data.feature_cache.write_vision_features", slow)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(need, range(2))
    assert len(made) == 1 and torch.equal(first, second) and bool(first.any(-1).all())


def test_long_captions_are_cut(processor):
    prompt = [2, 3]
    rows = pairs()
    whole = CaptionCollator(processor, prompt)(rows)
    cut = CaptionCollator(processor, prompt, max_caption_tokens=3)(rows)
    lengths = (whole["labels"] != -100).sum(1)
    assert lengths.min() < 3 < lengths.max()
    assert torch.equal((cut["labels"] != -100).sum(1), lengths.clamp(max=3))
    for i, length in enumerate(lengths):
        assert torch.equal(cut["labels"][i][cut["labels"][i] != -100], whole["labels"][i][-length:][:3])
    longest = int(lengths.argmax())
    assert processor.tokenizer.eos_token_id not in cut["labels"][longest]  # nothing ends there
