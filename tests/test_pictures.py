"""The picture set is built from packages: what judges stays out, captions follow their rules, a kill costs nothing."""

import csv
import hashlib
import io
import json
import multiprocessing
import os
import struct
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from pyarrow import parquet

from tools.pictures.__main__ import build
from tools.pictures.captions import articled, clip_art_caption, concept_of, emoji_caption, sentence
from tools.pictures.packages import Package, fetch
from tools.pictures.selection import key, read_lists
from tools.pictures.sources import FURNITURE, READERS, qt_resources

EMOJIS = {"1f415": "dog", "1f34e": "red apple", "1f4a3": "bomb", "1f1eb-1f1f7": "flag: France", "1f511": "key"}
FIELDS = Package._fields
NOUNS = {
    "dog": "05",
    "house": "06",
    "lamp": "06",
    "kennel": "06",
    "joy": "12",
    "bomb": "06",
    "ladder": "06",
    "anvil": "06",
}


def shape(number: int) -> str:
    """A drawing unlike those of other numbers."""
    random = np.random.default_rng(number)
    points = " ".join(f"{x},{y}" for x, y in random.integers(0, 32, (9, 2)))
    red, green, blue = random.integers(0, 200, 3)
    return f'<polygon points="{points}" fill="rgb({red},{green},{blue})"/>'


class Packages:
    """A folder of made-up packages and the files that the builder reads."""

    def __init__(self, folder):
        self.folder, self.rows, self.keep_out, self.validation = folder, [], [], []
        self.file("words", "dict/american-english", "\n".join([*NOUNS, "red", "apple", "big", "off", "image"]))
        senses = {f"{number:08d}": (noun, file) for number, (noun, file) in enumerate(NOUNS.items())}
        self.file("wordnet", "data.noun", "".join(f"{at} {file} n 01 {n}\n" for at, (n, file) in senses.items()))
        self.file("wordnet", "index.noun", "".join(f"{n} n 1 0 1 0 {at}  \n" for at, (n, _) in senses.items()))
        labels = [{"hexcode": code.upper(), "label": label, "group": 1} for code, label in EMOJIS.items()]
        self.file("names", "en/data.json", json.dumps(labels))
        for source in ("words", "wordnet", "names"):
            self.add(source, by="Lexicographers")

    def file(self, source: str, path: str, text: str) -> None:
        target = self.folder / "work/packages" / f"{source}-1" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def add(self, source: str, **values) -> None:
        row = {"source": source, "registry": "npm", "name": source, "version": "1", "licence": "MIT", "by": source}
        self.rows.append(dict.fromkeys(FIELDS, "") | row | values)

    def icons(self, source: str, drawings: dict[str, str], **values) -> None:
        icons = {name: {"body": body} for name, body in drawings.items()}
        self.file(source, "icons.json", json.dumps({"icons": icons, "width": 32, "height": 32}))
        self.file(source, "chars.json", "{}")
        self.add(source, **{"reader": "icons", "style": "icon-art"} | values)

    def build(self) -> dict[str, list[dict]]:
        """Build, and read what was written."""
        out, paths = (
            self.folder / "out",
            [self.folder / name for name in ("table.csv", "keep_out.txt", "validation_ids.txt")],
        )
        with open(paths[0], "w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(self.rows)
        for path, lines in zip(paths[1:], (self.keep_out, self.validation)):
            path.write_text("# keys\n" + "".join(f"{line}\n" for line in lines))
        build(out, self.folder / "work", paths[0], self.folder)
        return {path.stem: parquet.read_table(path).to_pylist() for path in out.glob("*.parquet")}


@pytest.fixture
def packages(tmp_path):
    return Packages(tmp_path)


def ids(rows: list[dict]) -> list[str]:
    return sorted(row["id"] for row in rows)


def test_what_is_built(packages):
    packages.icons("art", {"dog": shape(1), "house": shape(2), "xyz": shape(3)}, licence="CC-BY-4.0", by="An artist")
    sets = packages.build()
    (dog, _), (other,) = sorted(sets["train"], key=lambda row: row["id"]), sets["unlabelled"]
    columns = {name: dog[name] for name in ("source", "licence", "id", "caption", "concept", "style")}
    values = ("art", "CC-BY-4.0", "art/dog", "A dog.", "dog", "icon-art")
    assert columns == dict(zip(("source", "licence", "id", "caption", "concept", "style"), values))
    assert Image.open(io.BytesIO(dog["image"]["bytes"])).size == (256, 256)
    assert (other["id"], other["caption"], other["concept"]) == ("art/xyz", "", "")
    text = (packages.folder / "out/ATTRIBUTION.md").read_text()
    assert "| art | art 1 | CC-BY-4.0 | 2 | 1 | An artist |" in text and "Words: names 1, MIT, Lexicographers." in text


def test_authors_are_named_without_their_addresses(packages):
    about = (
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 32 32'><!-- licenses/publicdomain <dc:title>{}</dc:title>"
    )
    about += "<dc:creator><dc:title>{}</dc:title></dc:creator> -->{}</svg>"
    for number, author in enumerate(["Ann Artist &lt;ann@example.org&gt;", "http://example.org", "unknown"]):
        text = about.format("Red dog", author, shape(number))
        packages.file("clip", f"openclipart/svg/dog{number}.svg", text)
    packages.add("clip", reader="clip_art", style="clipart", licence="Public Domain")
    captions = [row["caption"] for row in packages.build()["train"]]
    assert captions == ["A red dog."] * 3
    assert (packages.folder / "out/ATTRIBUTION.md").read_text().endswith("## Authors that clip names\n\nAnn Artist\n")


def test_a_row_that_judges_is_left_out_and_its_concept_is_not(packages):
    packages.icons("one", {"dog": shape(1), "house": shape(2)})
    packages.icons("two", {"dog": shape(3)})
    packages.keep_out = [f"row {key('one|one/dog')}"]
    assert ids(packages.build()["train"]) == ["one/house", "two/dog"]


def test_no_picture_of_a_concept_that_judges(packages):
    packages.icons(
        "one", {"dog": shape(1), "lamp": shape(2), "dogs": shape(3), "dog-house": shape(4), "dog-xyz": shape(5)}
    )
    packages.icons("emojis", {"dog": shape(6), "bomb": shape(7)}, reader="emoji", style="emoji")
    packages.keep_out = [f"concept {key('dog')}"]
    sets = packages.build()
    assert ids(sets["train"]) == ["emojis/1f4a3", "one/lamp"] and sets["unlabelled"] == []


def test_validation_is_built_whatever_its_licence_and_kept_out(packages):
    packages.icons("free", {"dog": shape(1), "house": shape(2), "lamp": shape(3), "dog-off": shape(4)})
    packages.icons("copyleft", {"dog": shape(5), "house": shape(6), "kennel": shape(7)}, licence="CC-BY-SA-4.0")
    packages.validation = ["validation copyleft/dog", "validation_seen copyleft/house", "validation_seen free/lamp"]
    sets = packages.build()
    assert ids(sets["validation"]) == ["copyleft/dog"]
    assert [row["id"] for row in sets["validation_seen"]] == ["copyleft/house", "free/lamp"]
    assert ids(sets["train"]) == ["free/house"]


def test_a_validation_picture_that_no_package_has_is_named(packages):
    packages.validation = ["validation one/unicorn"]
    with pytest.raises(ValueError, match="lack 1 pictures that judge: one/unicorn"):
        packages.build()


@pytest.mark.parametrize("judge", ["keep_out", "validation"])
def test_look_alikes_of_what_judges_are_left_out(packages, judge):
    nearly = shape(1).replace("/>", ' opacity="0.97"/>')
    packages.icons("one", {"dog": shape(1), "house": shape(2)})
    packages.icons("two", {"lamp": nearly, "anvil": shape(3), "xyz": nearly})
    packages.keep_out = [f"row {key('one|one/dog')}"] if judge == "keep_out" else []
    packages.validation = ["validation_seen one/dog"] if judge == "validation" else []
    sets = packages.build()
    assert ids(sets["train"]) == ["one/house", "two/anvil"] and sets["unlabelled"] == []


def test_the_same_emoji_by_the_artist_of_one_that_judges_is_left_out(packages):
    names = ("dog", "red-apple", "bomb")
    packages.icons("noto", {name: shape(i) for i, name in enumerate(names)}, reader="emoji", style="emoji")
    packages.icons(
        "old", {name: shape(9 + i) for i, name in enumerate(names)}, reader="emoji", artist="noto", style="emoji"
    )
    packages.icons("other", {name: shape(19 + i) for i, name in enumerate(names)}, reader="emoji", style="emoji")
    packages.keep_out = [f"row {key('noto|noto/1f415')}"]
    codes = ["1f34e", "1f4a3"]
    expected = [f"{source}/{code}" for source in ("noto", "old", "other") for code in codes]
    assert ids(packages.build()["train"]) == sorted([*expected, "other/1f415"])


def test_near_duplicates_are_learned_from_once(packages):
    packages.icons("one", {"dog": shape(1), "house": shape(2)})
    packages.icons("two", {"dog": shape(1), "lamp": shape(2), "xyz": shape(1)})  # another name keeps its row
    sets = packages.build()
    assert ids(sets["train"]) == ["one/dog", "one/house", "two/lamp"] and sets["unlabelled"] == []


def test_names_of_icons(packages):
    packages.icons("emojis", {"red-apple": shape(1)}, reader="emoji", style="emoji-flat")
    packages.icons("art", {"apple-red": shape(2), "kennel": shape(3), "joy": shape(4), "dog-off": shape(5)})
    plain = {"reader": "icons", "style": "icon"}
    packages.icons("plain", {"red-apple-2": shape(6), "ladder": shape(7), "anvil": shape(8), "xyz": shape(9)}, **plain)
    packages.icons("plain2", {"anvil-fill": shape(10), "house": shape(11)}, variant="-fill$", **plain)
    sets = packages.build()
    captions = {row["id"]: row["caption"] for row in sets["train"]}
    # as the emoji; a thing; named so by two artists
    apples = dict.fromkeys(("emojis/1f34e", "art/apple-red", "plain/red-apple-2"), "A red apple.")
    anvils = dict.fromkeys(("plain/anvil", "plain2/anvil"), "An anvil.")
    assert captions == apples | anvils | {"art/kennel": "A kennel."}
    assert ids(sets["unlabelled"]) == ["art/dog-off", "art/joy"]


def test_an_icon_is_not_called_as_a_scene_or_half_its_name(packages):
    packages.icons("emojis", {"bomb": shape(1)}, reader="emoji", style="emoji-flat")
    packages.icons("plain", {"bomb-off": shape(2), "bomb-image": shape(3), "bomb": shape(4)}, style="icon")
    assert ids(packages.build()["train"]) == ["emojis/1f4a3", "plain/bomb"]


def test_flags_are_named_by_countries(packages):
    packages.icons(
        "flags", {"fr-4x3": shape(1), "fr-1x1": shape(2)}, reader="flags", variant="-4x3$", style="emoji-flat"
    )
    (row,) = packages.build()["train"]
    assert (row["id"], row["caption"], row["concept"]) == ("flags/1f1eb-1f1f7", "The flag of France.", "flag france")


def test_a_file_that_cannot_be_drawn_is_left_out(packages, capfd):
    packages.icons("one", {"dog": shape(1), "house": "<polygon", "lamp": ""})
    assert ids(packages.build()["train"]) == ["one/dog"]
    assert "one/house cannot be drawn" in capfd.readouterr().out


def test_what_was_drawn_before_a_kill_is_not_drawn_again(packages):
    packages.icons("one", {f"xyz-{'x' * i}": shape(i) for i in range(30)})
    drawn = packages.folder / "work/drawn"
    process = multiprocessing.get_context("fork").Process(target=packages.build)
    process.start()
    while process.is_alive() and not (drawn.exists() and len(list(drawn.glob("*.webp"))) > 3):
        time.sleep(0.01)
    process.kill()
    process.join()
    before = {path: path.stat().st_mtime_ns for path in drawn.glob("[!.]*.webp")}
    assert 3 < len(before) < 30 and not (packages.folder / "out/train.parquet").exists()
    first = packages.build()
    assert before.items() <= {path: path.stat().st_mtime_ns for path in drawn.iterdir()}.items()
    assert packages.build() == first and len(first["unlabelled"]) == 30


def test_a_package_is_fetched_once_and_whole(tmp_path, monkeypatch):
    """A made-up client stands for the network."""
    package = Package(*(dict.fromkeys(FIELDS, "") | {"registry": "npm", "name": "@a/b", "version": "2"}).values())
    (tmp_path / "package").mkdir()
    (tmp_path / "package/icons.json").write_text("{}")
    with tarfile.open(tmp_path / "b.tgz", "w:gz") as archive:
        archive.add(tmp_path / "package", "package")
    client = tmp_path / "bin/npm"
    client.parent.mkdir()
    monkeypatch.setenv("PATH", f"{client.parent}{os.pathsep}{os.environ['PATH']}")
    client.write_text("#!/bin/sh\ntouch half.tgz\nexit 1\n")
    client.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    work = Path("work")
    (work / "packages").mkdir(parents=True)
    with pytest.raises(OSError, match="cannot get @a/b 2 of npm"):
        fetch(package, work)
    assert list((work / "packages").iterdir()) == []
    client.write_text(f'#!/bin/sh\n[ "$*" = "pack --silent @a/b@2" ] && cp {tmp_path}/b.tgz .\n')
    folder = fetch(package, work)
    assert [path.name for path in folder.iterdir()] == ["icons.json"]
    client.write_text("#!/bin/sh\nexit 1\n")
    assert fetch(package, work) == folder


def test_qt_resources(tmp_path):
    """The tree: / -> a/ -> b.txt."""
    names = b"".join(struct.pack(">HI", len(name), 0) + name.encode("utf-16-be") for name in ("a", "b.txt"))
    nodes = [(0, 2, 1, 1), (0, 2, 1, 2), (8, 0, 0, 0)]
    tree = b"".join(struct.pack(">IHII", *node) for node in nodes)
    data = struct.pack(">I", 5) + b"hello"
    header = struct.pack(">4s4I", b"qres", 1, 20, 20 + len(tree), 20 + len(tree) + len(data))
    (tmp_path / "x.rcc").write_bytes(header + tree + data + names)
    assert qt_resources(tmp_path / "x.rcc") == {"/a/b.txt": b"hello"}


def read(reader: str, folder) -> list[tuple]:
    package = Package(*(dict.fromkeys(FIELDS, "") | {"source": "source", "style": "style"}).values())
    pictures = READERS[reader](package, {"source": folder})
    return [(p.id, p.caption, p.concept, p.style, p.licence, p.author, p.read()) for p in pictures]


def test_stamps(tmp_path):
    sentences = {
        "animals/dog": "A big dog!",
        "town/cartoon/long": f"A short sentence. {'Word ' * 25}",
        "town/letters/a": "A",
    }
    for name, text in sentences.items():
        path = tmp_path / "stamps" / name
        path.parent.mkdir(parents=True)
        path.with_suffix(".png").write_text(name)
        path.with_suffix(".txt").write_text(f"{text}\nde.utf8=Ein Hund")
    dog = ("source/animals/dog", "A big dog.", "dog", "stamp", "", "", b"animals/dog")
    short = ("source/town/cartoon/long", "A short sentence.", "sentence short", "drawing", "", "", b"town/cartoon/long")
    assert read("stamps", tmp_path) == [dog, short]


def test_furniture(tmp_path):
    lines = "name#1=Oak Chair (old) 2\nicon#1=/a.png\ncreator#1=Ann\nname#2=Male\nicon#2=b.png\nname#3=No icon"
    for catalogue in FURNITURE:
        with zipfile.ZipFile(tmp_path / f"{catalogue}.sh3f", "w") as archive:
            archive.writestr("PluginFurnitureCatalog.properties", lines if catalogue == "BlendSwap-CC-0" else "")
            archive.writestr("a.png", "a")
            archive.writestr("b.png", "b")
    chair, man = "A 3d model of an oak chair.", "A 3d model of a man."
    expected = [("source/BlendSwap-CC-0/1", chair, "chair oak", "style", "CC0-1.0", "Ann", b"a")]
    expected += [("source/BlendSwap-CC-0/2", man, "man", "style", "CC0-1.0", "", b"b")]
    assert read("furniture", tmp_path) == expected


@pytest.mark.parametrize(
    "label, caption",
    [
        ("flag: France", "The flag of France."),
        ("keycap: 5", "A keycap with the symbol 5."),
        ("man: bald", "A man with a bald head."),
        ("three-thirty", "A clock face showing three-thirty."),
        ("no smoking", "A sign that says no smoking."),
        ("kiss: woman, man", "A kiss of woman, man."),
        ("OK hand", "An OK hand."),
        ("Libra", "A libra."),
        ("unicorn", "A unicorn."),
        ("hour glass", "An hour glass."),
        ("glasses", "A picture of glasses."),
        ("footprints", "A picture of footprints."),
        ("people hugging", "A people hugging."),
        ("bus", "A bus."),
        ("E10: dark skin", ""),
    ],
)
def test_captions_of_emojis(label, caption):
    assert sentence(emoji_caption(label)) == caption


def test_articles():
    phrases = ["two dogs", "a dog", "bowl of cherries", "red shoes", "old lens", "x-ray", "some men"]
    expected = ["two dogs", "a dog", "a bowl of cherries", "red shoes", "an old lens", "an x-ray", "some men"]
    assert list(map(articled, phrases)) == expected


def test_concepts_leave_out_style_number_and_gender():
    assert concept_of("Two small cherries.") == "cherry two" and concept_of("The cartoon dogs' house") == "dog house"
    assert concept_of("a woman walking") == concept_of("man walking") == "walking" and concept_of("A man.") == "man"


@pytest.mark.parametrize(
    "path, title, expected",
    [
        ("animals/dog_01", "Big dog 2", ("A big dog.", "dog")),
        ("animals/dog_02", "RedDog_bw", ("A red dog in black and white.", "dog red")),
        ("animals/dog_03", "Chien", ("", "")),
        ("animals/dog_04", "Dog part of 3", ("", "")),
        ("animals/dog_05", "design", ("", "")),
        ("signs/flags/france", "untitled", ("The flag of France.", "flag france")),
        ("signs/flags/x", "National flag of Ivory Coast", ("The flag of Ivory Coast.", "coast flag ivory")),
        ("signs/flags/y", "naval flag", ("", "")),
        ("signs/aiga-symbols/aiga_dog_inv", "", ("A black and white symbol for dog.", "black dog white")),
    ],
)
def test_captions_of_clip_art(tmp_path, path, title, expected):
    (tmp_path / "american-english").write_text("big\nred\ndog\ndesign\npart\nof\n")
    caption, concept = clip_art_caption(path, title, tmp_path)
    assert (sentence(caption), concept_of(concept or caption)) == expected


def test_the_repos_own_lists_agree():
    """The judges' lists are whole: what stands in both would be built and never be there."""
    validation = read_lists(ROOT / "data/validation_ids.txt")
    assert {name: len(part) for name, part in validation.items()} == {"validation": 1369, "validation_seen": 350}
    keys = read_lists(ROOT / "data/keep_out.txt")
    rows = {
        hashlib.sha256(f"{i.split('/')[0]}|{i}".encode()).hexdigest()[:16] for part in validation.values() for i in part
    }
    assert not rows & set(keys["row"]) and {len(k) for part in keys.values() for k in part} == {16}
