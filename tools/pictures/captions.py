"""Make captions and concepts from titles and names, by the rules of `captions.toml`."""

import re
import tomllib
from functools import cache
from pathlib import Path

RULES = tomllib.loads(Path(__file__).with_name("captions.toml").read_text(encoding="utf-8"))
WORDS = {name: frozenset(rule.split()) for name, rule in RULES.items() if isinstance(rule, str)}


def rewrite(text: str, rules: str) -> str:
    for pattern, replacement in RULES[rules]:
        text = re.sub(pattern, replacement, text)
    return text


def matches(text: str, rule: str) -> bool:
    return re.search(RULES[rule].replace("\n", ""), text, re.IGNORECASE) is not None


def articled(phrase: str) -> str:
    """Put a or an before a noun phrase that takes one; a bare plural becomes a picture of it."""
    first = phrase.split(" ")[0].lower()
    if first in WORDS["determiners"] or first[:1].isdigit():
        return phrase
    head = re.split(RULES["after_head"].replace("\n", ""), phrase)[0].strip().split(" ")[-1].lower()
    is_plural = head not in WORDS["singular_with_s"] and head != stem(head) and not head.endswith("lens")
    if is_plural or head in WORDS["mass"]:
        return phrase if " " in phrase else f"a picture of {phrase}"
    article = "" if head in WORDS["plural_without_s"] else "an " if re.match(RULES["an"], first) else "a "
    return article + phrase


def sentence(text: str) -> str:
    text = text.strip(" .,;:-")
    return text[:1].upper() + text[1:] + ("" if text[-1:] in '!?.”"' else ".") if text else ""


def stem(word: str) -> str:
    if len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    return word[:-3] + "y" if word.endswith("ies") else word[:-1]


def words_of(text: str) -> list[str]:
    """List the words, plural or not, and numbers of a name or caption."""
    return [stem(w) for w in re.findall(r"[a-z]+|\d+(?=\D|$)", re.sub(r"[’']s?\b", "", text.lower()))]


def concept_of(text: str) -> str:
    """Key pictures of one concept alike: the sorted words less those of style, number and gender."""
    words = words_of(text)
    content = {w for w in words if w not in WORDS["style_words"] and not w.isdigit()} or set(words)
    return " ".join(sorted(content - WORDS["people"] or content))


def emoji_caption(label: str) -> str:
    """Make a caption of an emoji's name in CLDR; empty for a name that is no phrase."""
    text = rewrite(label, "emoji")
    if ":" in text:
        return ""
    return articled(text if re.match("[A-Z]{2}|[A-Z][a-z]+ ", text) else text[0].lower() + text[1:])


def clip_art_caption(path: str, title: str, dictionary: Path) -> tuple[str, str]:
    """Make caption and concept from a title, or a file's name; empty where they say nothing in English."""
    name = rewrite(path.split("/")[-1], "file").strip()
    if "/flags/" in path:
        name = rewrite(name if matches(title, "unnamed") or re.search(r"[^\w ,.'-]", title) else title, "flag")
        country = " ".join(w if w in ("of", "and", "the") else w.capitalize() for w in name.split())
        return ("", "") if matches(name, "no_flag") else (f"the flag of {country}", f"flag {name}")
    if "aiga-symbols" in path:
        name = rewrite(name, "sign")
        return (f"a black and white symbol for {name}" if name and is_english(name, dictionary) else "", "")
    text = rewrite(title, "title").lower()
    words = re.findall("[a-z'-]+", text)
    # one artist's titles name series, unless the file has the name too
    is_series = "architetto" in path and len(words) < 3 and not any(word in path for word in words)
    says_nothing = set(words) <= WORDS["vague"] or len(words) > 12 or max(map(len, words)) < 3 or is_series
    if says_nothing or matches(title, "unnamed") or not is_english(" ".join(words), dictionary):
        return "", ""
    is_colourless = matches(title.replace("_", " "), "colourless") and "black" not in text
    return articled(text) + (" in black and white" if is_colourless else ""), text


@cache
def read_dictionary(folder: Path) -> frozenset[str]:
    words = next(folder.rglob("american-english")).read_text(encoding="utf-8").lower().split()
    return frozenset(words) | {"tv", "led", "cd", "dvd", "usb", "pc", "ii", "iii"}


def is_english(text: str, dictionary: Path) -> bool:
    """Tell whether all words, and parts of words with hyphens, are in Debian's word list."""
    parts = [part for word in text.split() for part in word.strip("'’").split("-") if part and not part.isdigit()]
    return read_dictionary(dictionary).issuperset(parts)


@cache
def read_things(folder: Path) -> frozenset[str]:
    """Read the nouns of WordNet whose first sense is something to be seen."""
    index, data = (next(folder.rglob(name)).read_text().splitlines() for name in ("index.noun", "data.noun"))
    files = {line[:8]: line[9:11] for line in data if line[0] != " "}
    entries = [line.split() for line in index if line[0] != " "]  # lemma, class, number of senses, ..., their offsets
    return frozenset(entry[0] for entry in entries if files[entry[-int(entry[2])]] in WORDS["things"])


def names_thing(name: str, dictionary: Path, wordnet: Path) -> bool:
    """Tell whether an icon's name ends in a thing to be seen, in English and not of user interfaces."""
    words = name.split()
    ends = {"_".join(words[start:]) for start in range(len(words))}
    is_thing = not read_things(wordnet).isdisjoint(ends | set(map(stem, ends)))
    is_short = len(words) < 4 and all(len(word) > 2 for word in words)
    return is_thing and is_short and not WORDS["interface"].intersection(words) and is_english(name, dictionary)
