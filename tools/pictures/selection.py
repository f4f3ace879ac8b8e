"""Keep out what judges, and choose what is learned from."""

import hashlib
import re
from collections import defaultdict
from itertools import combinations
from pathlib import Path

from microvlm.data.rows import is_copyleft
from microvlm.model import require

from .captions import WORDS, sentence, words_of
from .render import look_alikes
from .sources import Picture


def key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_lists(path: Path) -> dict[str, list[str]]:
    """Read lines of a list's name and an entry each."""
    lists = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, entry = line.split(" ", 1)
            lists[name].append(entry)
    return lists


class Judges:
    """Pictures and concepts that are never learned from: those whose keys are given, and the validation sets."""

    def __init__(self, keys: dict[str, list[str]], ids: dict[str, list[str]], pictures: list[Picture]):
        by_id = {picture.id: picture for picture in pictures}
        missing = sorted({ident for part in ids.values() for ident in part} - by_id.keys())
        require(not missing, f"the packages lack {len(missing)} pictures that judge: {', '.join(missing[:5])}.")
        self.sets = {name: [by_id[ident] for ident in part] for name, part in ids.items()}
        self.concepts = {*keys["concept"], *(key(picture.concept) for picture in self.sets.get("validation", []))}
        rows = set(keys["row"]).union(key(f"{p.source}|{p.id}") for part in self.sets.values() for p in part)
        self.pictures = {p.id: p for p in pictures if key(f"{p.source}|{p.id}") in rows}

    def spare(self, picture: Picture) -> bool:
        """Tell whether a picture may be learned from, as far as its licence and its names say."""
        artist, code = picture.package.artist, picture.id.split("/")[-1]
        is_twin = artist and any(i.startswith(artist) and i.endswith(f"/{code}") for i in self.pictures)
        is_judged = picture.id in self.pictures or key(picture.concept) in self.concepts or is_twin
        return not is_judged and not is_copyleft(picture.licence) and not self.holds_concept(picture.name)

    def holds_concept(self, name: str) -> bool:
        """Tell whether a name has all words of a concept that judges."""
        words = sorted(set(words_of(name)))[:10]
        groups = (group for size in range(1, len(words) + 1) for group in combinations(words, size))
        return any(key(" ".join(group)) in self.concepts for group in groups)


def with_captions(pictures: list[Picture]) -> list[Picture]:
    """Caption icons as another picture with the name's words, or by the name; leave out or unname the others.

    Names of art are trusted; on other icons' names two artists have to agree.
    """
    known, artists = {}, defaultdict(set)
    for picture in pictures:
        artists[picture.concept].add(picture.package.by)
        caption = sentence(picture.caption.removeprefix("A 3d model of "))
        if caption and not picture.name:
            words = frozenset(re.findall("[a-z]+", caption.lower())) - WORDS["style_words"]
            known.setdefault(words, (caption, picture.concept))
    for picture in pictures:
        if picture.name:
            is_agreed = picture.style != "icon" or len(artists[picture.concept]) > 1
            own = (picture.caption, picture.concept) if is_agreed else ("", "")
            picture.caption, picture.concept = known.get(frozenset(picture.name.split()), own)
    chosen = [picture for picture in pictures if picture.caption or picture.style != "icon"]
    return sorted(chosen, key=lambda picture: not picture.caption)  # those without words last


def distinct(pictures: list[Picture], judges: list[Picture]) -> list[Picture]:
    """Leave out what looks like a judge, and near-duplicates: of one concept, or of one source and the same look."""
    dropped = {i for i, _, _ in look_alikes(pictures, judges)}
    for i, j, is_same in look_alikes(pictures, pictures):
        first, second = pictures[i], pictures[j]
        is_one = second.concept in ("", first.concept) or is_same and first.source == second.source
        if i < j and i not in dropped and is_one:
            dropped.add(j)
    return [picture for i, picture in enumerate(pictures) if i not in dropped]
