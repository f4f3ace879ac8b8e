"""Build `data/icons.parquet`: pictures by other artists of concepts that the training set already names, and pictures without words.

    npm pack @iconify-json/{fxemoji,emojione,...} emojibase-data     (`--list` prints the whole command)
    apt-get download openclipart-svg && dpkg-deb -x openclipart-svg_*.deb openclipart
    python tools/build_icons.py FOLDER_WITH_THE_ARCHIVES --train data/pictures/train.parquet \\
        --keep-out data/pictures/validation.parquet data/pictures/validation_seen.parquet --out data/icons.parquet \\
        --openclipart openclipart --unlabelled data/unlabelled.parquet

An icon of an emoji set is matched to an emoji by its name, and the emoji to a row of the training set that is not copyleft; an icon of
another set is matched to the concept whose words are those of its name. Caption and concept of that row are taken over. An icon of
anything else is left out, so no concept is trained on that the training set does not show. Icons that look like a picture of
`--keep-out` are left out as well (cosine of 16 x 16 thumbnails above `--similarity`), and so are those of an artist whose other drawing
of the same emoji is in there, so that the pictures a model is judged by stay unseen. Same columns as the training set, licences by row.

`--unlabelled` gets what is left of the sets in colour and of game-icons, and with `--openclipart` the clip art of that package: pictures
for distillation, their captions and concepts empty. None has a name with all words of a concept of the first file of `--keep-out`, whose
concepts are never shown; none looks like a picture that judges.
"""

import argparse
import io
import json
import re
import tarfile
import unicodedata
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

from microvlm.data.rows import is_copyleft, load_rows
from microvlm.files import atomic_file


class IconSet(NamedTuple):
    """A set of icons in @iconify-json/NAME."""

    licence: str
    style: str
    match: str  # emoji: by the emoji's name; words: by the words of the concept
    variant: str = ""  # a regular expression: only names with it, which is then taken out of the name
    same_artist: str = ""  # source of the training set by the same artist
    unlabelled: bool = False  # also gives pictures without words


SETS = {
    "fxemoji": IconSet("Apache-2.0", "emoji-flat", "emoji"),
    "emojione": IconSet("CC-BY-4.0", "emoji-flat", "emoji"),
    "streamline-emojis": IconSet("CC-BY-4.0", "emoji-outline", "emoji", unlabelled=True),
    "circle-flags": IconSet("MIT", "emoji-flat", "emoji"),
    "noto-v1": IconSet("Apache-2.0", "emoji-flat", "emoji", same_artist="noto-emoji"),
    "emojione-monotone": IconSet("CC-BY-4.0", "emoji-outline", "emoji"),
    "fluent-emoji-high-contrast": IconSet("MIT", "emoji-outline", "emoji", same_artist="fluent-emoji"),
    "flag": IconSet("MIT", "emoji-flat", "emoji", variant="-4x3$"),
    "flagpack": IconSet("MIT", "emoji-flat", "emoji"),
    "game-icons": IconSet("CC-BY-3.0", "icon", "words", unlabelled=True),
    "icon-park": IconSet("Apache-2.0", "icon", "words", unlabelled=True),
    "flat-color-icons": IconSet("MIT", "icon", "words", unlabelled=True),
    "fluent-color": IconSet("MIT", "icon", "words", variant="-(48|32)$", unlabelled=True),
    "marketeq": IconSet("MIT", "icon", "words", unlabelled=True),
    "meteocons": IconSet("MIT", "icon", "words", variant="-fill$", unlabelled=True),
    "streamline-color": IconSet("CC-BY-4.0", "icon", "words", variant="-flat$", unlabelled=True),
    "streamline-cyber-color": IconSet("CC-BY-4.0", "icon", "words", unlabelled=True),
    "streamline-freehand-color": IconSet("CC-BY-4.0", "icon", "words", unlabelled=True),
    "streamline-kameleon-color": IconSet("CC-BY-4.0", "icon", "words", variant="-duo$|$", unlabelled=True),
    "streamline-plump-color": IconSet("CC-BY-4.0", "icon", "words", variant="-flat$", unlabelled=True),
    "streamline-stickies-color": IconSet("CC-BY-4.0", "icon", "words", variant="-duo$|$", unlabelled=True),
    "streamline-ultimate-color": IconSet("CC-BY-4.0", "icon", "words", unlabelled=True),
    "healthicons": IconSet("MIT", "icon", "words", variant="^(?!.*(outline|24px|negative))"),
    "hugeicons": IconSet("MIT", "icon", "words"),
    "mdi": IconSet("Apache-2.0", "icon", "words"),
    "mingcute": IconSet("Apache-2.0", "icon", "words", variant="-fill$"),
    "ph": IconSet("MIT", "icon", "words", variant="-duotone$"),
    "solar": IconSet("CC-BY-4.0", "icon", "words", variant="-bold-duotone$"),
    "tabler": IconSet("MIT", "icon", "words"),
    "temaki": IconSet("CC0-1.0", "icon", "words"),
}
SIDE = 256


def members(folder: Path, package: str) -> dict[str, bytes]:
    """The JSON files of a package's archive, `npm pack`'s `package-version.tgz`."""
    found = sorted(folder.glob(f"{package}-[0-9]*.tgz"))
    if not found:
        raise FileNotFoundError(f"no {package}-*.tgz in {folder}: see the npm command in this file's docstring.")
    with tarfile.open(found[-1]) as archive:
        return {
            m.name.removeprefix("package/"): archive.extractfile(m).read() for m in archive if m.name.endswith(".json")
        }


def letters(name: str) -> str:
    name = unicodedata.normalize("NFKD", name.lower())
    return re.sub("[^a-z0-9]", "", name)


def emoji_names(folder: Path) -> dict[str, str]:
    """Name in letters -> code points as in the training set's ids ("1f1eb-1f1f7"), from emojibase and Unicode."""
    files = members(folder, "emojibase-data")
    names = {}
    emojis = json.loads(files["en/data.json"])
    for emoji in emojis + [skin for e in emojis for skin in e.get("skins", [])]:
        names.setdefault(letters(emoji["label"]), emoji["hexcode"])
        if emoji["label"].startswith("flag: "):
            names.setdefault("flagfor" + letters(emoji["label"][6:]), emoji["hexcode"])
    for file, content in sorted(files.items()):
        if file.startswith("en/shortcodes/"):
            for code, short in json.loads(content).items():
                for name in [short] if isinstance(short, str) else short:
                    names.setdefault(letters(name), code)
    for emoji in emojis:
        code = emoji["hexcode"].removesuffix("-FE0F")
        if "-" not in code:
            names.setdefault(letters(unicodedata.name(chr(int(code, 16)), code)), emoji["hexcode"])
    return {name: code.lower().replace("-fe0f", "") for name, code in names.items()}


def code_of(name: str, names: dict[str, str], country: bool) -> str | None:
    """The emoji an icon stands for."""
    if country:
        return "-".join(f"{0x1F1E6 + ord(c) - ord('a'):x}" for c in name) if re.fullmatch("[a-z]{2}", name) else None
    return names.get(letters(name)) or names.get(letters(re.sub(r"-\d+$", "", name)))


def concept_words(name: str) -> frozenset[str]:
    """The words of an icon's name or of a concept, plural or not."""
    words = [word for word in re.split("[-_ /]", name.lower()) if word and not word.isdigit()]
    return frozenset(w[:-1] if len(w) > 3 and re.search("[^s]s$", w) else w for w in words)


def plain(caption: str) -> str:
    """A caption without what it says of the style."""
    caption = re.sub(r"^A 3d model of (an?) ", lambda m: m[1].capitalize() + " ", caption)
    return re.sub(r"^A 3d model of ", "A picture of ", caption)


def render(svg: str) -> bytes | None:
    """An SVG on white, 256 x 256, as WebP; None where it cannot be drawn, or is blank."""
    import resvg_py

    try:
        drawn = PILImage.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE))))
    except (ValueError, OSError):
        return None
    drawn = drawn.convert("RGBA")
    drawn.thumbnail((SIDE, SIDE))
    page = PILImage.new("RGBA", (SIDE, SIDE), "white")
    page.alpha_composite(drawn, ((SIDE - drawn.width) // 2, (SIDE - drawn.height) // 2))
    page = page.convert("RGB")
    if np.asarray(page).std() < 4:
        return None
    file = io.BytesIO()
    page.save(file, "WEBP", quality=85)
    return file.getvalue()


def thumbnail(picture: bytes) -> np.ndarray:
    """A unit vector: the encoded picture at 16 x 16 less white."""
    picture = PILImage.open(io.BytesIO(picture)).convert("RGB").resize((16, 16), PILImage.Resampling.BOX)
    small = 1 - np.asarray(picture, np.float32).ravel() / 255
    return small / (np.linalg.norm(small) + 1e-6)


def drawn_and_seen(svg: str) -> tuple[bytes | None, np.ndarray | None]:
    """`render` and its `thumbnail`."""
    picture = render(svg)
    return picture, None if picture is None else thumbnail(picture)


def known_concepts(train) -> tuple[dict, dict]:
    """Caption and concept of the training set's rows that are not copyleft, by emoji and by the concept's words."""
    by_emoji, by_words = {}, {}
    for row in train.remove_columns("image"):
        if is_copyleft(row["licence"]):
            continue
        if "emoji" in row["source"]:
            by_emoji.setdefault(row["id"].split("/")[-1].replace("-fe0f", ""), (row["caption"], row["concept"]))
        if words := concept_words(row["concept"]):
            found = by_words.setdefault(words, (Counter(), row["concept"]))
            found[0][plain(row["caption"])] += 1
    return by_emoji, {words: (c.most_common(1)[0][0], concept) for words, (c, concept) in by_words.items()}


def icons_of(folder: Path, by_emoji: dict, by_words: dict, judged_ids: set[str]) -> list[dict]:
    """Rows of all sets with their SVG in place of a picture; caption and concept are empty where the training set names nothing."""
    names, rows = emoji_names(folder), []
    for source, icon_set in SETS.items():
        icons = json.loads(members(folder, f"iconify-json-{source}")["icons.json"])
        seen = set()
        for name, icon in icons["icons"].items():
            if not re.search(icon_set.variant, name):
                continue
            short = re.sub(icon_set.variant, "", name) if icon_set.variant else name
            if icon_set.match == "emoji":
                key = code_of(short, names, country="flag" in source)
                if icon_set.same_artist and any(
                    i.startswith(icon_set.same_artist) and i.endswith(f"/{key}") for i in judged_ids
                ):
                    continue
                caption, concept = by_emoji.get(key, ("", ""))
            else:
                key = concept_words(short)
                caption, concept = by_words.get(key, ("", ""))
            key = key if concept else short
            if key in seen or not (concept or icon_set.unlabelled):
                continue
            seen.add(key)
            width, height = (icon.get(k, icons.get(k, 16)) for k in ("width", "height"))
            svg = (
                f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="0 0 {width} {height}" color="black">{icon["body"]}</svg>'
            )
            row = {"caption": caption, "source": source, "licence": icon_set.licence, "id": f"{source}/{name}"}
            rows.append(row | {"concept": concept, "style": icon_set.style, "svg": svg, "name": short})
    return rows


def clip_art(folder: Path, known_ids: set[str]) -> list[dict]:
    """Rows without words for the public domain SVG of Debian's openclipart-svg that are not in the picture set."""
    rows, root = [], next(folder.rglob("openclipart/svg"), None)
    if root is None:
        raise FileNotFoundError(f"no openclipart/svg in {folder}: see the apt-get command in this file's docstring.")
    for path in sorted(root.rglob("*.svg")):
        ident = f"openclipart/{path.relative_to(root).with_suffix('')}"
        svg = path.read_text(errors="ignore")
        if ident in known_ids or "publicdomain" not in svg.lower() or len(svg) > 2**20:
            continue
        row = {"caption": "", "source": "openclipart", "licence": "Public Domain", "id": ident, "concept": ""}
        rows.append(row | {"style": "clipart", "svg": svg, "name": path.stem})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where npm pack put the archives")
    parser.add_argument("--train", required=True)
    parser.add_argument("--keep-out", nargs="+", required=True, metavar="DATA", help="sets a model is judged by")
    parser.add_argument("--similarity", type=float, default=0.97)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--openclipart", type=Path, help="the unpacked Debian package")
    parser.add_argument("--unlabelled", type=Path, help="also write pictures without words to this file")
    parser.add_argument(
        "--list",
        action="version",
        help="print the npm command and exit",
        version=f"npm pack @iconify-json/{{{','.join(SETS)}}} emojibase-data",
    )
    options = parser.parse_args()
    if options.openclipart and not options.unlabelled:
        parser.error("--openclipart takes --unlabelled FILE: clip art has no words.")

    train = load_rows(options.train)
    judged = [load_rows(path) for path in options.keep_out]
    pictures = np.stack([thumbnail(row["image"]["bytes"]) for rows in judged for row in rows])
    unseen = {words for concept in judged[0]["concept"] if (words := concept_words(concept))}
    judged_ids = {ident.replace("-fe0f", "") for rows in judged for ident in rows["id"]}

    rows = icons_of(options.folder, *known_concepts(train), judged_ids)
    if options.unlabelled is None:
        rows = [row for row in rows if row["concept"]]
    elif options.openclipart:
        rows += clip_art(options.openclipart, {ident for part in [train, *judged] for ident in part["id"]})
    rows = [r for r in rows if r["concept"] or not any(words <= concept_words(r["name"]) for words in unseen)]
    kept, counts = {True: [], False: []}, Counter()
    with ProcessPoolExecutor() as pool:
        drawn = list(pool.map(drawn_and_seen, [r["svg"] for r in rows], chunksize=32))
    drawn = [(row, *pair) for row, pair in zip(rows, drawn) if pair[0] is not None]
    alike = (np.stack([small for *_, small in drawn]) @ pictures.T).max(1)
    for (row, picture, _), similarity in zip(drawn, alike):
        if similarity > options.similarity:
            counts[row["source"], "look like a picture that judges"] += 1
            continue
        path = row["id"].replace("/", "_") + ".webp"
        columns = {k: row[k] for k in ("caption", "source", "licence", "id", "concept", "style")}
        kept[bool(row["concept"])].append({"image": {"bytes": picture, "path": path}} | columns)
        counts[row["source"], "with words" if row["concept"] else "without words"] += 1
    print(f"{len(rows) - len(drawn)} blank, or not to be drawn")
    for (source, what), count in sorted(counts.items()):
        print(f"{source}: {count} {what}")
    texts = {name: Value("string") for name in ("caption", "source", "licence", "id", "concept", "style")}
    features = Features({"image": Image()} | texts)
    for path, part in ((options.out, kept[True]), (options.unlabelled, kept[False])):
        if path is not None:
            with atomic_file(str(path), "wb") as file:
                Dataset.from_list(part, features=features).to_parquet(file)
            print(f"{len(part)} rows in {path}")


if __name__ == "__main__":
    main()
