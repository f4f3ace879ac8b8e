"""Find images on disk or by URL, and make small copies of them."""

import base64
import glob
import os
import re
from collections.abc import Iterable, Iterator

from PIL import Image

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm", ".pgm", ".jp2", ".ico"}
URL_SCHEMES = ("http://", "https://", "file://")


def find_images(sources: Iterable[str], recursive: bool = False) -> tuple[list[str], list[str]]:
    """Pictures that paths, folders, globs and URLs stand for.

    Sources keep their order; inside a folder or a glob the order is natural (`p2` before `p10`). Files named twice come
    once. Folders give the files with a picture's suffix that are not hidden; files named outright are all taken.

    Args:
        sources: paths of files and folders, glob patterns (`**` crosses folders), URLs.
        recursive: also look into the folders of folders.

    Returns:
        the paths, and the sources at which nothing was found.
    """
    found, empty = {}, []
    for source in sources:
        pictures = list(_expand(str(source), recursive))
        if not pictures:
            empty.append(str(source))
        for path in pictures:
            found.setdefault(path if path.startswith(URL_SCHEMES) else os.path.realpath(path), path)
    return list(found.values()), empty


def _expand(source: str, recursive: bool) -> Iterator[str]:
    if source.startswith(URL_SCHEMES) or os.path.isfile(source):
        yield source
    elif os.path.isdir(source):
        for folder, folders, files in os.walk(source):
            folders[:] = sorted((f for f in folders if recursive and not f.startswith(".")), key=natural_key)
            for file in sorted(files, key=natural_key):
                if os.path.splitext(file)[1].lower() in SUFFIXES and not file.startswith("."):
                    yield os.path.join(folder, file)
    elif glob.has_magic(source):
        for match in sorted(glob.glob(source, recursive=True), key=natural_key):
            yield from _expand(match, recursive)


def natural_key(name: str) -> list:
    """Sort key under which numbers count as numbers."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part.lower()) for part in re.split(r"(\d+)", name)]


def thumbnail(picture: Image.Image, size: int) -> Image.Image:
    small = picture.copy()
    small.thumbnail((size, size))
    return small


def data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
