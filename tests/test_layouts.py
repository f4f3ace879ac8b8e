"""Data as people have it: every layout of the table in docs/training.md gives its pairs, at once and as a stream."""

import json
import re
import shutil
from itertools import islice
from pathlib import Path

import pytest
from conftest import ROOT
from datasets import Dataset, DatasetDict, Image, IterableDataset
from toy_data import CAPTIONS, pairs, png, toy_processor, use_cache, write_files, write_folder, write_parquet, write_tar

from microvlm.data.rows import UnreadableRowError, decode_row, load_rows
from microvlm.data.stream import CaptionStream, load_stream

CONVERSATION = [
    {"from": "human", "value": "<image>\nDescribe it."},
    {"from": "gpt", "value": "?"},
    {"from": "human", "value": "Which colour?"},
    {"from": "gpt", "value": "red"},
]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    use_cache(monkeypatch, tmp_path.parent / f"{tmp_path.name}-cache")


def write_images(folder: Path, suffix: str = ".jpg") -> list[str]:
    """Write the images of the pairs; returns their names."""
    folder.mkdir(parents=True)
    names = [f"{i:012d}{suffix}" for i in range(8)]
    for i, name in enumerate(names):
        (folder / name).write_bytes(png(i))
    return names


def write_table(path: Path, rows: list[dict]) -> None:
    """Write a table in the format of its ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    else:
        Dataset.from_list(rows).to_csv(str(path), sep="\t" if path.suffix == ".tsv" else ",", index=False)


def pair_rows(names: list[str], image: str = "image", caption: str = "caption") -> list[dict]:
    return [{image: name, caption: text} for name, text in zip(names, CAPTIONS, strict=True)]


def hub(folder: Path) -> None:
    """`data/`, a card that lists what is in it, and a picture for the card."""
    (folder / "data").mkdir()
    for k in range(2):
        write_parquet(folder / f"data/train-0000{k}-of-00002.parquet", pairs()[4 * k : 4 * k + 4])
    write_parquet(folder / "data/test-00000-of-00001.parquet", pairs(1))
    files = "".join(f"  - split: {split}\n    path: data/{split}-*\n" for split in ("train", "test"))
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n# Pairs\n")
    (folder / "plot.png").write_bytes(png(0))


def disk(folder: Path) -> None:
    rows = Dataset.from_list(pairs()).cast_column("image", Image())
    rows.save_to_disk(folder / "one")
    DatasetDict({"train": rows, "validation": rows.select([0])}).save_to_disk(folder / "several")


def coco(folder: Path) -> None:
    names = write_images(folder / "train2017")
    (folder / "val2017").mkdir()
    images = [{"id": 100 + i, "file_name": n, "license": 1 + i % 2, "height": 32} for i, n in enumerate(names)]
    kinds = [{"id": 1, "name": "Attribution-ShareAlike License"}, {"id": 2, "name": "Attribution License"}]
    captions = [{"image_id": 100 + i, "id": 7 * i, "caption": text} for i, text in enumerate(CAPTIONS)]
    table = {"info": {}, "licenses": kinds, "images": images, "annotations": captions[::-1]}
    write_table(folder / "annotations/captions_train2017.json", table)
    write_table(folder / "annotations/captions_val2017.json", table | {"annotations": captions[:1]})
    boxes = [{"image_id": 100, "id": 1, "bbox": [0, 0, 1, 1], "segmentation": [[0.5, 1, 2]]}]
    boxes.append(boxes[0] | {"segmentation": {"counts": "a", "size": [1, 2]}})
    write_table(folder / "annotations/instances_train2017.json", table | {"annotations": boxes})


def flickr(folder: Path) -> None:
    names = write_images(folder / "Images")
    (folder / "captions.txt").write_text("image,caption\n" + "".join(f'{n},"{c}"\n' for n, c in zip(names, CAPTIONS)))


def llava(folder: Path) -> None:
    names = write_images(folder / "images/00453")
    rows = [
        {
            "id": i or "first",
            "image": f"00453/{name}",
            "conversations": [t | {"value": caption} if t["value"] == "?" else t for t in CONVERSATION],
        }
        for i, (name, caption) in enumerate(zip(names, CAPTIONS))
    ]
    write_table(folder / "chat.json", rows)


def several(folder: Path) -> None:
    rows = [{"image": {"bytes": png(i), "path": None}, "sentences": CAPTIONS[2 * i : 2 * i + 2]} for i in range(4)]
    for k in range(2):
        part = Dataset.from_list(rows[2 * k : 2 * k + 2]).cast_column("image", Image())
        part.to_parquet(str(folder / f"train-{k}.parquet"))


def table(folder: Path) -> None:
    rows = pair_rows(write_images(folder / "images", ".JPG"), "Image_path", "text")
    for name in ("pairs.csv", "pairs.tsv", "pairs.jsonl", "pairs.json"):
        write_table(folder / name, rows)


def described(folder: Path) -> None:
    shutil.copytree(write_folder(folder / "x", pairs()), folder, dirs_exist_ok=True)
    shutil.rmtree(folder / "x")


def described_by_others(folder: Path) -> None:
    write_table(folder / "metadata.csv", pair_rows([f"images/{n}" for n in write_images(folder / "images")], "path"))


WRITERS = {
    "parquet": lambda folder: [write_parquet(folder / f"{k}.parquet", pairs()[4 * k :][:4]) for k in range(2)],
    "a data set as the Hub has it": hub,
    "`save_to_disk`": disk,
    "COCO captions": coco,
    "Flickr8k": flickr,
    "LLaVA conversations": llava,
    "several captions in a list": several,
    "CSV, TSV, JSON of paths": table,
    "images with `metadata`": described,
    "images with text files": lambda folder: write_files(folder, pairs()),
    "webdataset": lambda folder: [write_tar(folder / f"{k}.tar", pairs()[4 * k :][:4]) for k in range(2)],
}


def read_table(header: str, text: str | None = None) -> dict[str, list[str]]:
    """Read the table under a header line of docs/training.md: the first column gives the other columns."""
    text = text or (ROOT / "docs/training.md").read_text()
    lines = text[text.index(f"{header}\n") :].splitlines()[2:]
    lines = lines[: next((i for i, line in enumerate(lines) if not line.startswith("|")), None)]
    return {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line[1:-1].split("|")] for line in lines)}


DOCS = read_table("| layout | `data.train` | as a stream |")


def test_the_table_has_every_layout():
    assert list(DOCS) == list(WRITERS)


def contents(rows) -> list:
    """Images and captions of rows, in an order of their own."""
    processor = toy_processor().image_processor
    return sorted([text, image.tolist()] for image, text in (decode_row(row, processor) for row in rows))


@pytest.mark.parametrize("layout", WRITERS)
def test_layout(layout, tmp_path, monkeypatch):
    paths, stream_kind = DOCS[layout]
    paths = re.findall("`([^`]+)`", paths)
    monkeypatch.chdir(tmp_path)
    for name in {path.partition("/")[0] for path in paths}:
        (tmp_path / name).mkdir()
        WRITERS[layout](tmp_path / name)
    images = [i // 2 if layout == "several captions in a list" else i for i in range(8)]
    expected = contents({"image": pairs()[i]["image"], "caption": text} for i, text in zip(images, CAPTIONS))
    for path in paths:
        rows, stream = load_rows(path), load_stream(path)
        assert contents(rows) == expected, path
        assert isinstance(stream, IterableDataset) and (stream.num_shards == 2) == (stream_kind == "shard by shard")
        assert contents(islice(CaptionStream(stream, shuffle_buffer=3), 8)) == expected, path


def test_first_captions_come_first_and_images_are_not_copied(tmp_path):
    several(tmp_path)
    rows = load_rows(str(tmp_path))
    assert rows["caption"][:] == CAPTIONS[::2] + CAPTIONS[1::2]
    assert contents(rows.select([4])) == contents([pairs()[0] | {"caption": CAPTIONS[1]}])
    cached = sum(
        p.read_bytes().count(b"\x89PNG") for p in (tmp_path.parent / f"{tmp_path.name}-cache").rglob("*") if p.is_file()
    )
    assert cached == 4
    stream = load_stream(str(tmp_path))
    through = [row["caption"] for row in islice(CaptionStream(stream, 1, 3), 16)]
    assert sorted(through[:8]) == sorted(CAPTIONS) and stream.features["caption"].dtype == "string"
    for cut, row in enumerate(islice(CaptionStream(stream, 1, 3), 12), 1):
        resumed = CaptionStream(stream, 1, 3)
        resumed.go_on(cut, [row["cursor"]], 0)
        assert [row["caption"] for row in islice(resumed, 4)] == through[cut : cut + 4]


def test_rows_without_captions_or_images_are_named(tmp_path):
    rows = [{"id": i, "image": pairs()[i]["image"], "captions": c} for i, c in enumerate((["a", "b"], [], None))]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    for found in (load_rows(str(tmp_path)), load_stream(str(tmp_path))):
        assert sorted((row["id"], row["caption"]) for row in found if row["caption"]) == [(0, "a"), (0, "b")]
        assert [row["id"] for row in found if not row["caption"]] == [1, 2]
    names = write_images(tmp_path / "images")
    chats = [{"id": n, "image": n, "conversations": CONVERSATION} for n in names]
    write_table(tmp_path / "chat.json", [{"id": 5, "conversations": CONVERSATION}, *chats])
    found = load_rows(str(tmp_path / "chat.json"))
    assert len(found) == 9
    spoken = [turn | {"from": {"human": "user", "gpt": "assistant"}[turn["from"]]} for turn in CONVERSATION]
    write_table(tmp_path / "other.json", [{"image": names[0], "conversations": spoken}])
    assert load_rows(str(tmp_path / "other.json"))["caption"][:] == ["?"]
    with pytest.raises(UnreadableRowError, match="row 5 has no picture."):
        decode_row(found[0], toy_processor().image_processor)


def test_a_stream_of_a_parquet_of_paths(tmp_path):
    names = write_images(tmp_path / "images")
    Dataset.from_list(pair_rows(names)).to_parquet(str(tmp_path / "a.parquet"))
    found = [load_rows(str(tmp_path / "a.parquet")), islice(CaptionStream(load_stream(str(tmp_path / "a.parquet"))), 8)]
    assert contents(found[0]) == contents(found[1]) == contents(pairs())


def test_metadata_of_other_columns(tmp_path):
    described_by_others(tmp_path)
    assert contents(load_rows(str(tmp_path))) == contents(pairs())


def test_splits(tmp_path):
    for write in (hub, disk, coco, split_folders):
        folder = tmp_path / write.__name__
        folder.mkdir()
        write(folder)
        source = folder / "several" if write is disk else folder
        assert len(load_rows(str(source))) == 8
        if write is hub:  # train and test
            message = (
                f"{source} has the splits .*train.*, none of them validation: name the files or the folder of one."
            )
            with pytest.raises(ValueError, match=f"^{message}$"):
                load_rows(str(source), split="validation")
        else:
            assert len(load_rows(str(source), split="validation")) == 1
    assert len(load_rows(str(tmp_path / "hub/data/test-*.parquet"), split="validation")) == 1
    parts = tmp_path / "parts"
    for name in ("a.csv", "b.csv"):
        write_table(parts / name, pair_rows(["x.jpg"] * 8))
    with pytest.raises(ValueError, match=rf"^{parts} has several tables, name one: {parts}/a.csv, {parts}/b.csv\.$"):
        load_rows(str(parts))


def split_folders(folder: Path) -> None:
    write_folder(folder / "train", pairs())
    write_folder(folder / "validation", pairs(1))


def test_licences_of_coco(tmp_path):
    coco(tmp_path)
    rows = load_rows(str(tmp_path), exclude_copyleft=True)
    assert sorted(rows["caption"]) == sorted(CAPTIONS[1::2]) and set(rows["licence"]) == {"Attribution License"}


def test_other_images_under_the_same_names_are_other_data(tmp_path):
    table(tmp_path)
    first = load_rows(str(tmp_path / "pairs.csv"))._fingerprint
    assert load_rows(str(tmp_path / "pairs.csv"))._fingerprint == first
    (tmp_path / "images/000000000003.JPG").write_bytes(png(4) + b" ")
    assert load_rows(str(tmp_path / "pairs.csv"))._fingerprint != first


def test_images_of_one_name_in_several_folders_are_not_mistaken(tmp_path):
    for folder in ("a", "b"):
        names = write_images(tmp_path / folder / "images")
        write_table(tmp_path / folder / "pairs.csv", pair_rows([f"images/{name}" for name in names]))
        write_table(tmp_path / f"{folder}.csv", pair_rows([f"{folder}/images/{name}" for name in names]))
    for source in (str(tmp_path / "*/pairs.csv"), [str(tmp_path / f"{folder}/pairs.csv") for folder in ("a", "b")]):
        with pytest.raises(ValueError, match="pairs.csv and others hold paths of images: name one folder's."):
            load_rows(source)
    assert len(load_rows([str(tmp_path / "a.csv"), str(tmp_path / "b.csv")])) == 16
    write_table(tmp_path / "b.csv", pair_rows([f"images/{name}" for name in names]))
    several = f"b.csv names images that are in {tmp_path}/a and in {tmp_path}/b: name them from {tmp_path}.$"
    with pytest.raises(ValueError, match=several):
        load_rows(str(tmp_path / "b.csv"))


def test_images_after_many_rows_without(tmp_path):
    rows = [{"image": None, "caption": "a"}] * 100 + pair_rows(write_images(tmp_path / "images"))
    rows[100:] = [row | {"image": f"images/{row['image']}"} for row in rows[100:]]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    for found in (load_rows(str(tmp_path / "a.parquet")), load_stream(str(tmp_path / "a.parquet"))):
        assert contents(list(found)[100:]) == contents(pairs())


def test_a_format_that_was_saved_is_left_out(tmp_path):
    rows = Dataset.from_list(pairs()).cast_column("image", Image())
    rows.with_format("torch", columns=["caption"]).save_to_disk(tmp_path / "saved")
    assert contents(load_rows(str(tmp_path / "saved"))) == contents(pairs())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            "image,caption\nhttps://a/b.jpg,a\n",
            "names https://a/b.jpg, which is no file in .* or in a folder of",
        ),
        (
            "a.csv",
            "url,caption\nhttps://a/b.jpg,a\n",
            "a.csv has no image column: expected one of .*, found url, caption.",
        ),
        ("a.csv", "image,caption\n3,a\n", "neither images nor paths in its image column, but Value..int64..."),
        ("a.jsonl", '{"image": "a.jpg", "caption": 3.5}', "neither texts nor conversations in its caption column, but"),
        ("a.jsonl", '{"image": "a.jpg", "caption": [{"raw": "a"}]}', "neither texts nor conversations in its caption"),
        ("a.jsonl", '{"image": "a.jpg", "caption": {"from": ["gpt"], "value": ["a"]}}', "neither texts nor conversat"),
        ("a.json", '{"images": [], "annotations": [{"caption": "a"}], "licenses": null}', "a.json has no image column"),
        ("a.csv", "", "a.csv cannot be read: No columns to parse from file"),
        ("a.jsonl", "", "a.jsonl cannot be read: it is empty."),
        ("a.jsonl", '{"image": 1', "a.jsonl cannot be read: .*"),
        ("a.json", "[1, 2]", "a.json is neither rows nor COCO's images and annotations."),
        ("a.json", '{"info": 1}', "a.json has no image column: expected one of .*, found info."),
        ("a.parquet", "PAR1", "a.parquet cannot be read: .*"),
        ("a.npz", "x", "a.npz: expected files of one format of .parquet, .tar, .*, or a folder."),
    ],
)
def test_what_cannot_be_read_is_named(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_text(content)
    for load in (load_rows, load_stream):
        with pytest.raises(ValueError, match=message) as error:
            load(str(path))
        assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "captions"),
    [
        ("a.csv", 'image,caption\n0.JPG,None\n0.JPG,"NA"\n0.JPG,\n', ["None", "NA", ""]),
        ("a.tsv", 'image\tcaption\n0.JPG\t"Stop\n0.JPG\ta "b"\n', ['"Stop', 'a "b"']),
        ("a.json", '{"image": "0.JPG", "caption": "one line"}', ["one line"]),
    ],
    ids=["words for nothing", "quotes", "one row"],
)
def test_captions_are_what_is_written(name, content, captions, tmp_path):
    (tmp_path / "0.JPG").write_bytes(png(0))
    (tmp_path / name).write_text(content)
    for load in (load_rows, load_stream):
        assert [row["caption"] for row in load(str(tmp_path / name))] == captions


def test_boxes_are_no_captions_and_formats_do_not_mix(tmp_path):
    coco(tmp_path)
    with pytest.raises(
        ValueError, match="instances_train2017.json has no caption column: expected one of caption, .*bbox"
    ):
        load_rows(str(tmp_path / "annotations/instances_train2017.json"))
    files = [str(write_parquet(tmp_path / "a.parquet", pairs(1))), str(write_tar(tmp_path / "b.tar", pairs(1)))]
    with pytest.raises(ValueError, match="a.parquet: expected files of one format"):
        load_rows(files)


def test_what_does_not_exist_is_told_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("data/captions.txt", "data/a.arrow", "a.npz", "none", "a/b/c"):
        for load in (load_rows, load_stream):
            with pytest.raises(FileNotFoundError, match=f"^data {path} does not exist.$"):
                load(path)
