"""tools/build_icons.py: which icon becomes an image of what, and which is left out, because it judges a model."""

import io
import json
import sys
import tarfile

import build_icons
import pytest
from build_icons import IconSet
from datasets import Dataset
from toy_data import png, use_cache, write_parquet

from microvlm.data.rows import load_rows

GRIN, CAT, DOG, BIRD, FRANCE = "1f600", "1f431", "1f436", "1f426", "1f1eb-1f1f7"
EMOJIS = [
    {"label": "grinning face", "hexcode": "1F600"},
    {"label": "cat face", "hexcode": "1F431"},
    {"label": "dog face", "hexcode": "1F436"},
    {"label": "bird", "hexcode": "1F426"},
    {"label": "umbrella", "hexcode": "2602-FE0F"},
    {"label": "waving hand", "hexcode": "1F44B", "skins": [{"label": "waving hand: dark", "hexcode": "1F44B-1F3FF"}]},
    {"label": "flag: France", "hexcode": "1F1EB-1F1F7"},
]
SHORTCODES = {"1F431": ["cat", "kitty"], "1F436": "dog"}
SETS = {
    "faces": IconSet("MIT", "emoji-flat", "emoji", same_artist="noto-emoji"),
    "things": IconSet("CC0-1.0", "icon", "words", variant="-fill$", unlabelled=True),
}
BY_EMOJI = {
    GRIN: ("A grinning face.", "face"),
    CAT: ("A cat.", "cat"),
    DOG: ("A dog.", "dog"),
    BIRD: ("A bird.", "bird"),
}
BY_WORDS = {frozenset({"hot", "dog"}): ("A hot dog.", "hot dog"), frozenset({"cat"}): ("A cat.", "cat")}


def write_package(folder, package: str, files: dict[str, object]) -> None:
    """An archive as `npm pack` leaves it."""
    with tarfile.open(folder / f"{package}-1.2.3.tgz", "w:gz") as archive:
        for name, content in (files | {"README.md": "no JSON"}).items():
            content = json.dumps(content).encode()
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def write_packages(folder, icons: dict[str, dict[str, str]]) -> None:
    """`emojibase-data`, and the icon sets: source -> name -> body of the SVG."""
    write_package(folder, "emojibase-data", {"en/data.json": EMOJIS, "en/shortcodes/x.json": SHORTCODES})
    for source, bodies in icons.items():
        content = {name: {"body": body} for name, body in bodies.items()}
        write_package(folder, f"iconify-json-{source}", {"icons.json": {"icons": content, "width": 24, "height": 20}})


# --- names


@pytest.mark.parametrize(
    "name,words",
    [
        ("hot-dogs", {"hot", "dog"}),
        ("Hot_Dog 24/red", {"hot", "dog", "red"}),
        ("wine-glass", {"wine", "glass"}),  # no plural
        ("bus", {"bus"}),
        ("cat-2", {"cat"}),
        ("2", set()),
    ],
)
def test_words_of_a_name(name, words):
    assert build_icons.concept_words(name) == words


@pytest.mark.parametrize(
    "caption,expected",
    [
        ("A 3d model of a red apple.", "A red apple."),
        ("A 3d model of an apple.", "An apple."),
        ("A 3d model of scissors.", "A picture of scissors."),
        ("A cat next to A 3d model of a dog.", "A cat next to A 3d model of a dog."),
    ],
)
def test_captions_without_their_style(caption, expected):
    assert build_icons.without_style(caption) == expected


def test_emojis_by_any_of_their_names(tmp_path):
    write_packages(tmp_path, {})
    names = build_icons.emoji_names(tmp_path)
    codes = {
        "grinning-face": GRIN,
        "Grinning Face": GRIN,
        "kitty": CAT,  # shortcodes, one or several
        "dog": DOG,
        "dog-2": DOG,
        "umbrella": "2602",  # as the training set's ids, without FE0F
        "waving-hand-dark": "1f44b-1f3ff",
        "waving-hand-sign": "1f44b",  # Unicode's name
        "flag-france": FRANCE,
        "flag-for-france": FRANCE,
        "nobody": None,
    }
    assert {name: build_icons.code_of(name, names, country=False) for name in codes} == codes
    countries = {"fr": FRANCE, "fra": None, "FR": None, "dog": None}
    assert {name: build_icons.code_of(name, names, country=True) for name in countries} == countries


def test_a_missing_archive_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no emojibase-data-.*tgz in "):
        build_icons.emoji_names(tmp_path)


def test_only_rows_that_are_not_copyleft_give_words():
    columns = ("id", "source", "licence", "caption", "concept")
    rows = [
        ("noto-emoji/1f431", "noto-emoji", "OFL-1.1", "A cat.", "cat"),
        ("openmoji/1f436", "openmoji", "CC-BY-SA-4.0", "A dog.", "dog"),
        ("twemoji/2602-fe0f", "twemoji-emoji", "CC-BY-4.0", "An umbrella.", "umbrella"),
        ("fluent/1f431", "fluent-emoji", "MIT", "A 3d model of a white cat.", "cats"),
        ("fluent/1f638", "fluent-emoji", "MIT", "A white cat.", "cat"),
        ("art/1f426", "openclipart", "Public Domain", "A bird.", "bird"),
        ("art/none", "openclipart", "Public Domain", "Something.", ""),
    ]
    train = Dataset.from_list([dict(zip(columns, row)) | {"image": "none"} for row in rows])
    by_emoji, by_words = build_icons.concepts_of(train)
    assert by_emoji == {CAT: ("A cat.", "cat"), "2602": ("An umbrella.", "umbrella"), "1f638": ("A white cat.", "cat")}
    assert by_words == {
        frozenset({"cat"}): ("A white cat.", "cat"),  # said twice, whatever the style
        frozenset({"umbrella"}): ("An umbrella.", "umbrella"),
        frozenset({"bird"}): ("A bird.", "bird"),
    }


# --- icons


@pytest.fixture
def icons_of(tmp_path, monkeypatch):
    """Rows of icons whose body is their name."""

    def rows(sets: dict[str, IconSet], judging: set[str] = frozenset(), **names: list[str]) -> list[dict]:
        monkeypatch.setattr(build_icons, "SETS", sets)
        write_packages(tmp_path, {source: {name: f"<g>{name}</g>" for name in names[source]} for source in sets})
        return build_icons.icons_of(tmp_path, BY_EMOJI, BY_WORDS, judging)

    return rows


def test_icons_take_the_words_of_what_they_show(icons_of):
    """Emoji by name, other icons by words, each once; what the training set does not name only from a set for that."""
    rows = icons_of(
        SETS,
        faces=["grinning-face", "cat", "kitty", "cat-2", "umbrella", "nobody"],
        things=["dog-hot-fill", "hot-dogs-fill", "hot-dog", "zeppelin-fill", "zeppelins-fill", "zeppelin", "dog-fill"],
    )
    words = [(row["id"], row["caption"], row["concept"], row["name"]) for row in rows]
    assert words == [
        ("faces/grinning-face", "A grinning face.", "face", "grinning-face"),
        ("faces/cat", "A cat.", "cat", "cat"),
        ("things/dog-hot-fill", "A hot dog.", "hot dog", "dog-hot"),
        ("things/zeppelin-fill", "", "", "zeppelin"),
        ("things/zeppelins-fill", "", "", "zeppelins"),
        ("things/dog-fill", "", "", "dog"),  # the dog of BY_EMOJI has no words here
    ]
    assert {(row["source"], row["licence"], row["style"]) for row in rows} == {
        ("faces", "MIT", "emoji-flat"),
        ("things", "CC0-1.0", "icon"),
    }
    assert 'viewBox="0 0 24 20"' in rows[0]["svg"] and "<g>grinning-face</g></svg>" in rows[0]["svg"]


def test_flags_are_countries(icons_of):
    rows = icons_of({"my-flags": IconSet("MIT", "flat", "emoji", unlabelled=True)}, **{"my-flags": ["fr", "grinning"]})
    assert [row["concept"] for row in rows] == ["", ""]
    BY_FLAG = {FRANCE: ("The flag of France.", "flag of France")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BY_EMOJI, FRANCE, BY_FLAG[FRANCE])
        rows = icons_of({"my-flags": IconSet("MIT", "flat", "emoji")}, **{"my-flags": ["fr", "grinning-face"]})
    assert [(row["id"], row["concept"]) for row in rows] == [("my-flags/fr", "flag of France")]


def test_an_artists_other_drawing_of_a_judged_emoji_is_left_out(icons_of):
    judging = {f"noto-emoji/{DOG}", f"twemoji/{BIRD}", f"noto-emoji-old/x-{CAT}"}
    rows = icons_of(SETS, judging, faces=["dog", "bird", "cat"], things=[])
    assert [row["id"] for row in rows] == ["faces/bird", "faces/cat"]


def test_clip_art_is_public_and_new(tmp_path):
    root = tmp_path / "usr" / "share" / "openclipart" / "svg"
    (root / "animals").mkdir(parents=True)
    licence = "<metadata>http://web.resource.org/cc/PublicDomain</metadata>"
    for name, text in {"animals/owl": licence, "known": licence, "fox": "GPL", "huge": licence + " " * 2**20}.items():
        (root / f"{name}.svg").write_text(text)
    (row,) = build_icons.clip_art(tmp_path, {"openclipart/known"})
    assert row["id"] == "openclipart/animals/owl" and row["name"] == "owl" and not row["caption"] + row["concept"]


# --- the whole script


def square(x: int, y: int, colour: str = "navy") -> str:
    """An eighth of the page in each direction; two at different places have nothing in common."""
    return f'<rect x="{3 * x}" y="{3 * y}" width="3" height="3" fill="{colour}"/>'


def build(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["build_icons.py", *map(str, arguments)])
    build_icons.main()


def test_what_judges_stays_unseen(tmp_path, monkeypatch, capsys):
    """No look-alike of an image of either judging file; without words, none named like a concept of the first."""
    pytest.importorskip("resvg_py")
    use_cache(monkeypatch, tmp_path / "cache")
    monkeypatch.setattr(build_icons, "SETS", SETS)
    bodies = {
        "faces": {"grinning-face": square(0, 0), "cat": square(2, 0), "bird": square(4, 0), "dog": square(6, 0)},
        "things": {
            "hot-dog-fill": square(0, 2),
            "old-zeppelins-fill": square(2, 2),  # has all words of a concept that is never shown
            "zeppelin-cat-fill": square(4, 2),
            "lighthouse-fill": square(6, 2),  # a concept of the second file: seen
            "old-fill": square(0, 4),  # one word of "old zeppelin"
            "alike-fill": square(2, 4),
            "blank-fill": "",
            "broken-fill": "<rect",
        },
    }
    write_packages(tmp_path, bodies)

    def rows(name: str, *images: tuple[str, str, bytes]):
        columns = {"caption": "A thing.", "licence": "MIT", "style": "flat", "source": "noto-emoji"}
        table = [columns | {"image": {"bytes": b, "path": None}, "id": i, "concept": c} for i, c, b in images]
        return write_parquet(tmp_path / name, table)

    def drawn(body: str) -> bytes:
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 20">{body}</svg>'
        return build_icons.render(svg)

    train = rows(
        "train.parquet",
        (f"noto-emoji/{GRIN}", "face", png(0)),
        (f"noto-emoji/{CAT}", "cat", png(1)),
        (f"noto-emoji/{BIRD}", "bird", png(2)),
        (f"noto-emoji/{DOG}", "dog", png(3)),
        ("icons/1", "hot dog", png(4)),
    )
    look_alike, slightly = square(4, 0), square(2, 4) + square(7, 6, "#f4f4f4")
    unseen = rows("unseen.parquet", ("a/1", "old zeppelin", png(5)), ("a/2", "", drawn(slightly)))
    seen = rows("seen.parquet", ("a/3", "lighthouse", drawn(look_alike)), (f"noto-emoji/{DOG}", "dog", png(6)))
    out, unlabelled = tmp_path / "icons.parquet", tmp_path / "unlabelled.parquet"
    options = [tmp_path, "--train", train, "--keep-out", unseen, seen, "--out", out]

    build(monkeypatch, *options, "--unlabelled", unlabelled)
    printed = capsys.readouterr().out
    named, nameless = load_rows(str(out)), load_rows(str(unlabelled))
    assert list(zip(named["id"], named["concept"])) == [
        ("faces/grinning-face", "face"),
        ("faces/cat", "cat"),
        ("things/hot-dog-fill", "hot dog"),
    ]
    assert named["caption"] == ["A thing."] * 3 and named["licence"] == ["MIT", "MIT", "CC0-1.0"]
    assert nameless["id"] == ["things/zeppelin-cat-fill", "things/lighthouse-fill", "things/old-fill"]
    assert set(nameless["caption"]) | set(nameless["concept"]) == {""}
    for line in (
        "things: 2 blank",
        "faces: 1 look like an image",
        "things: 1 look like an image",
        f"3 rows in {unlabelled}",
    ):
        assert line in printed, printed
    image = build_icons.PILImage.open(io.BytesIO(named[1]["image"]["bytes"]))
    assert image.size == (256, 256) and image.format == "WEBP"

    unlabelled.unlink()
    build(monkeypatch, *options, "--similarity", "1.1")  # nothing is that similar
    assert load_rows(str(out))["id"] == [*named["id"][:2], "faces/bird", named["id"][2]]
    assert not unlabelled.exists()
