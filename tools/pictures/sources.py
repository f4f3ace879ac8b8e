"""List the pictures of each package: file, caption, concept, licence."""

import csv
import html
import json
import re
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from .captions import articled, clip_art_caption, concept_of, emoji_caption, matches, names_thing, rewrite, sentence
from .packages import Package

FURNITURE = "BlendSwap-CC-0 BlendSwap-CC-BY KatorLegaz Reallusion Scopia".split()
SVG = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="black" '
Folders = dict[str, Path]


@dataclass
class Picture:
    """A file that can become a row; without a caption it can be learned from without words."""

    package: Package
    id: str
    read: Callable[[], bytes]  # SVG, or what Pillow opens
    caption: str
    concept: str = ""  # made of the caption where empty
    style: str = ""
    licence: str = ""
    author: str = ""
    name: str = ""  # of an icon: what its artist calls it
    webp: bytes = b""  # what render.py makes of it: empty, unusable
    look: tuple = ()

    def __post_init__(self):
        self.source = self.package.source
        self.id = f"{self.source}/{self.id}"
        self.caption, self.concept = sentence(self.caption), concept_of(self.concept or self.caption)
        self.style, self.licence = self.style or self.package.style, self.licence or self.package.licence


def listed(package: Package, folders: Folders) -> Iterator[Picture]:
    """Photographs and drawings of `captions.csv`, whose captions and licences are written down."""
    with open(Path(__file__).with_name("captions.csv"), newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == package.source]
    for row in rows:
        read = partial(read_listed, folders[package.source], row["path"])
        values = {name: row[name] for name in ("caption", "concept", "style", "licence", "author")}
        yield Picture(package, row["path"], read, **values)


def read_listed(folder: Path, path: str) -> bytes:
    if resources := next(folder.rglob(f"{path.split('/')[0]}.rcc"), None):
        return qt_resources(resources)[f"/gcompris/src/activities/{path}"]
    return (folder / "skimage/data" / path).read_bytes()


@cache
def qt_resources(path: Path) -> dict[str, bytes]:
    """Read the files of a Qt resource file (.rcc)."""
    content, files = path.read_bytes(), {}
    version, tree, data, names = struct.unpack_from(">4I", content, 4)

    def walk(node: int, prefix: str) -> None:
        name, flags, first, second = struct.unpack_from(">IHII", content, tree + node * (22 if version >= 2 else 14))
        if node:
            (length,) = struct.unpack_from(">H", content, names + name)
            prefix += "/" + content[names + name + 6 :][: 2 * length].decode("utf-16-be")
        if flags & 2:  # a folder: number of children, the first of them
            for child in range(second, second + first):
                walk(child, prefix)
            return
        (length,) = struct.unpack_from(">I", content, data + second)  # a file: language, place
        file = content[data + second + 4 :][:length]
        files[prefix] = zlib.decompress(file[4:]) if flags & 1 else file

    walk(0, "")
    return files


def stamps(package: Package, folders: Folders) -> Iterator[Picture]:
    """Tux Paint's stamps, each with a sentence in a text file."""
    root = next(folders[package.source].rglob("stamps"))
    for text in sorted(root.rglob("*.txt")):
        name = str(text.relative_to(root).with_suffix(""))
        file = next((f for f in map(text.with_suffix, (".png", ".svg")) if f.exists()), None)
        if file and "/letters" not in name:
            caption = rewrite(text.read_text(encoding="utf-8").split("\n")[0].strip(), "stamp")
            is_drawn = file.suffix == ".svg" or "cartoon" in name or "symbols/" in name
            yield Picture(package, name, file.read_bytes, caption, style="drawing" if is_drawn else "stamp")


def furniture(package: Package, folders: Folders) -> Iterator[Picture]:
    """Sweet Home 3D's models, each with a rendered icon in its catalogue."""
    for catalogue in FURNITURE:
        licence = "CC0-1.0" if catalogue.endswith("CC-0") else "CC-BY-3.0"
        archive = zipfile.ZipFile(next(folders[package.source].rglob(f"{catalogue}.sh3f")))
        lines = archive.read("PluginFurnitureCatalog.properties").decode("latin-1").splitlines()
        values = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
        for number in sorted(key[5:] for key in values if key.startswith("name#")):
            name, file, author = (values.get(f"{key}#{number}", "").strip(" /") for key in ("name", "icon", "creator"))
            if (name := rewrite(name.lower(), "model")) and file in archive.namelist():
                values_of = {"caption": f"a 3d model of {articled(name)}", "licence": licence, "author": author}
                yield Picture(package, f"{catalogue}/{number}", partial(archive.read, file), concept=name, **values_of)


def clip_art(package: Package, folders: Folders) -> Iterator[Picture]:
    """Open Clip Art's public domain drawings; without words where the title says nothing."""
    root = next(folders[package.source].rglob("openclipart/svg"))
    for file in sorted(root.rglob("*.svg")):
        path, content = str(file.relative_to(root).with_suffix("")), file.read_text(encoding="utf-8", errors="replace")
        if len(content) > 3_000_000 or not re.search("web.resource.org/cc/PublicDomain|licenses/publicdomain", content):
            continue
        title, author = (
            html.unescape(html.unescape(match[1])).strip() if (match := re.search(pattern, content, re.S)) else ""
            for pattern in ("<dc:title>(.*?)</dc:title>", "<dc:creator>.*?<dc:title>(.*?)</dc:title>")
        )
        is_art = not matches(path, "skip_paths")
        caption, concept = clip_art_caption(path, title, folders["words"]) if is_art else ("", "")
        name = "" if caption else file.stem
        yield Picture(package, path, file.read_bytes, caption, concept, author=author, name=name)


# --- emojis: captions from their names in CLDR


def plain_code(code: str) -> str:
    return code.lower().replace("-fe0f", "")


def letters(name: str) -> str:
    return re.sub("[^a-z0-9]", "", unicodedata.normalize("NFKD", name.lower()))


@cache
def emoji_names(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Map code points to names, and names in letters to code points: CLDR's, those of chats, Unicode's."""
    emojis = json.loads((folder / "en/data.json").read_text())
    labels = {plain_code(emoji["hexcode"]): emoji["label"] for emoji in emojis if "group" in emoji}
    names = [(label, code) for code, label in labels.items()]
    names += [(label.replace("flag: ", "flag for "), code) for code, label in labels.items()]
    for file in sorted(folder.glob("en/shortcodes/*.json")):
        for code, short in json.loads(file.read_text()).items():
            names += [(name, plain_code(code)) for name in ([short] if isinstance(short, str) else short)]
    names += [(unicodedata.name(chr(int(code, 16)), code), code) for code in labels if "-" not in code]
    return labels, {letters(name): code for name, code in reversed(names)}


def svg_icons(package: Package, folder: Path) -> dict[str, Callable[[], bytes]]:
    """Read the icons of an Iconify package, by their names less the package's variant."""
    icons, files = json.loads((folder / "icons.json").read_text()), {}
    for name, icon in icons["icons"].items():
        left, top = (icon.get(key, icons.get(key, 0)) for key in ("left", "top"))
        width, height = (icon.get(key, icons.get(key, 16)) for key in ("width", "height"))
        size = f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}"'
        files[name] = partial(str.encode, f"{SVG}{size}>{icon['body']}</svg>")
    files |= {name: files[a["parent"]] for name, a in icons.get("aliases", {}).items() if a["parent"] in files}
    return {re.sub(package.variant, "", name): read for name, read in files.items() if re.search(package.variant, name)}


def emoji(package: Package, folders: Folders) -> Iterator[Picture]:
    """A set of emojis: Iconify's, whose icons are named as emojis or countries are, or files named by code points."""
    (labels, codes), folder, files = emoji_names(folders["names"]), folders[package.source], {}
    icons = svg_icons(package, folder) if (folder / "icons.json").exists() else {}
    given = json.loads((folder / "chars.json").read_text()) if icons else {}
    for name, read in () if given else icons.items():
        code = codes.get(letters(name)) or codes.get(letters(re.sub(r"-\d+$", "", name)))
        if package.reader == "flags":
            code = "-".join(f"{0x1F1E6 - ord('a') + ord(letter):x}" for letter in name)
        files.setdefault(code, read)
    files |= {plain_code(code): icons[name] for code, name in given.items() if name in icons}
    files |= {plain_code(file.stem): file.read_bytes for file in sorted(folder.glob("assets/*.webp"))}
    for code, label in labels.items():
        if code in files and (caption := emoji_caption(label)):
            yield Picture(package, code, files[code], caption, label)


def openmoji(package: Package, folders: Folders) -> Iterator[Picture]:
    """OpenMoji's own emojis and symbols, by its annotations."""
    folder = folders[package.source]
    for entry in json.loads((folder / "data/openmoji.json").read_text()):
        label, file = entry["annotation"], folder / "color/svg" / f"{entry['hexcode']}.svg"
        is_part = entry["skintone"] or entry["group"] == "component" or not file.exists()
        if not is_part and not matches(f"{entry['subgroups']} {label}", "skip_openmoji"):
            if caption := emoji_caption(label):
                yield Picture(package, entry["hexcode"].lower(), file.read_bytes, caption, label)


def icons(package: Package, folders: Folders) -> Iterator[Picture]:
    """A set of icons; with a caption where the name is of a thing."""
    for name, read in svg_icons(package, folders[package.source]).items():
        phrase = " ".join(word for word in re.split("[-_ ]", name) if word and not word.isdigit())
        is_thing = names_thing(phrase, folders["words"], folders["wordnet"])
        yield Picture(package, name, read, articled(phrase) if is_thing else "", name=phrase)


READERS = {f.__name__: f for f in (listed, stamps, furniture, clip_art, emoji, openmoji, icons)} | {"flags": emoji}
