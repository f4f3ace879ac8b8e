"""Find images on disk or by URL, and make small copies of them."""

import base64
import glob
import os
import re
import sys
from collections.abc import Iterable, Iterator
from io import BytesIO

from PIL import Image
from tqdm import tqdm

from .files import one_line

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm", ".pgm", ".jp2", ".ico"}
URL_SCHEMES = ("http://", "https://", "file://")


def find_images(sources: Iterable[str], recursive: bool = False) -> tuple[list[str], list[str]]:
    """Find the images that paths, folders, globs and URLs stand for, each once, and the sources without one.

    Sources keep their order; inside a folder or a glob the order is natural (`p2` before `p10`). Folders give the files
    with an image's suffix that are not hidden, with `recursive` also those of their folders; files named outright are
    all taken.
    """
    images, empty = {}, []
    for source in sources:
        paths = list(_expand(str(source), recursive))
        if not paths:
            empty.append(str(source))
        # one entry per file, however it was named
        for path in paths:
            images.setdefault(path if path.startswith(URL_SCHEMES) else os.path.realpath(path), path)
    return list(images.values()), empty


def _expand(source: str, recursive: bool) -> Iterator[str]:
    if source.startswith(URL_SCHEMES) or os.path.isfile(source):
        yield source
    elif os.path.isdir(source):
        # visit subfolders only if asked to, hidden ones never
        for folder, folders, files in os.walk(source):
            folders[:] = sorted((f for f in folders if recursive and not f.startswith(".")), key=natural_key)
            for file in sorted(files, key=natural_key):
                if os.path.splitext(file)[1].lower() in SUFFIXES and not file.startswith("."):
                    yield os.path.join(folder, file)
    elif glob.has_magic(source):
        for match in sorted(glob.glob(source, recursive=True), key=natural_key):
            yield from _expand(match, recursive)


def natural_key(name: str) -> list:
    """Make a sort key under which numbers count as numbers."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part.lower()) for part in re.split(r"(\d+)", name)]


def warn(message: str) -> None:
    tqdm.write(f"microvlm: {one_line(message)}", file=sys.stderr)


def thumbnail(image: Image.Image, size: int) -> Image.Image:
    small = image.copy()
    small.thumbnail((size, size))
    return small


def data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def small_jpeg(image: Image.Image, size: int) -> dict:
    """Shrink an RGB image into a square of `size` pixels, for a page that needs no other file."""
    small, data = thumbnail(image, size), BytesIO()
    small.save(data, "JPEG", quality=85)
    return {"uri": data_uri(data.getvalue(), "jpeg"), "width": small.width, "height": small.height}
