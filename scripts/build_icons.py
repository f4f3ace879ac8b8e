"""Build `data/icons.parquet`: pictures by other artists of concepts that the training set already names.

    npm pack @iconify-json/fxemoji @iconify-json/emojione @iconify-json/streamline-emojis @iconify-json/circle-flags emojibase-data
    python scripts/build_icons.py FOLDER_WITH_THE_ARCHIVES --train data/pictures/train.parquet \\
        --keep-out data/pictures/validation.parquet data/pictures/validation_seen.parquet --out data/pictures/icons.parquet

Every icon is matched to an emoji by its name, and the emoji to a row of the training set that is not copyleft: its caption and concept
are taken over. An icon of anything else is left out, so no concept is trained on that the training set does not show. Icons that
look like a picture of `--keep-out` are left out as well (cosine of 16 x 16 thumbnails above `--similarity`), so that the pictures a
model is judged by stay unseen. The artists are not among those of the training set. Same columns as the training set, licences by row.
"""

import argparse
import io
import json
import re
import sys
import tarfile
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data_microvlm import is_copyleft, load_rows  # noqa: E402

SETS = {  # package: (source column, licence, style)
    "iconify-json-fxemoji": ("fxemoji", "Apache-2.0", "emoji-flat"),
    "iconify-json-emojione": ("emojione", "CC-BY-4.0", "emoji-flat"),
    "iconify-json-streamline-emojis": ("streamline-emojis", "CC-BY-4.0", "emoji-outline"),
    "iconify-json-circle-flags": ("circle-flags", "MIT", "emoji-flat"),
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


def code_of(name: str, source: str, names: dict[str, str]) -> str | None:
    """The emoji an icon stands for."""
    if source == "circle-flags":
        return "-".join(f"{0x1F1E6 + ord(c) - ord('a'):x}" for c in name) if re.fullmatch("[a-z]{2}", name) else None
    return names.get(letters(name)) or names.get(letters(re.sub(r"-\d+$", "", name)))


def render(svg: str) -> PILImage.Image:
    """An SVG on white, 256 x 256."""
    import resvg_py

    drawn = PILImage.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE))))
    page = PILImage.new("RGBA", (SIDE, SIDE), "white")
    drawn = drawn.convert("RGBA")
    page.alpha_composite(drawn, ((SIDE - drawn.width) // 2, (SIDE - drawn.height) // 2))
    return page.convert("RGB")


def thumbnail(picture: PILImage.Image) -> np.ndarray:
    """A unit vector: the picture at 16 x 16 less white."""
    small = 1 - np.asarray(picture.convert("RGB").resize((16, 16), PILImage.Resampling.BOX), np.float32).ravel() / 255
    return small / (np.linalg.norm(small) + 1e-6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where npm pack put the archives")
    parser.add_argument("--train", required=True)
    parser.add_argument("--keep-out", nargs="+", required=True, metavar="DATA", help="sets a model is judged by")
    parser.add_argument("--similarity", type=float, default=0.97)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    train = load_rows(options.train)
    known = {}  # code points -> caption, concept
    for row in train.remove_columns("image"):
        if "emoji" in row["source"] and not is_copyleft(row["licence"]):
            known.setdefault(row["id"].split("/")[-1].replace("-fe0f", ""), (row["caption"], row["concept"]))
    judged = [
        thumbnail(PILImage.open(io.BytesIO(row["image"]["bytes"])))
        for path in options.keep_out
        for row in load_rows(path)
    ]
    judged = np.stack(judged)
    names = emoji_names(options.folder)
    rows, counts = [], Counter()
    for package, (source, licence, style) in SETS.items():
        icons = json.loads(members(options.folder, package)["icons.json"])
        seen = set()
        for name, icon in icons["icons"].items():
            code = code_of(name, source, names)
            if code not in known or code in seen:
                counts[source, "another concept"] += 1
                continue
            width, height = (icon.get(k, icons.get(k, 16)) for k in ("width", "height"))
            picture = render(
                f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
            )
            if (judged @ thumbnail(picture)).max() > options.similarity:
                counts[source, "looks like a picture that judges"] += 1
                continue
            seen.add(code)
            counts[source, "kept"] += 1
            caption, concept = known[code]
            file = io.BytesIO()
            picture.save(file, "WEBP", quality=85)
            rows.append(
                {
                    "image": {"bytes": file.getvalue(), "path": f"{source}_{name}.webp"},
                    "caption": caption,
                    "source": source,
                    "licence": licence,
                    "id": f"{source}/{name}",
                    "concept": concept,
                    "style": style,
                }
            )
    for (source, what), count in sorted(counts.items()):
        print(f"{source}: {count} {what}")
    texts = {name: Value("string") for name in ("caption", "source", "licence", "id", "concept", "style")}
    temporary = options.out.with_suffix(".tmp")
    Dataset.from_list(rows, features=Features({"image": Image()} | texts)).to_parquet(temporary)
    temporary.replace(options.out)
    print(f"{len(rows)} rows in {options.out}")


if __name__ == "__main__":
    main()
