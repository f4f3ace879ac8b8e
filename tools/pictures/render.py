"""Draw a picture as RGB WebP of short side 256, and measure how it looks."""

import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image

from microvlm.files import atomic_file

from .sources import Picture

SIDE, MARGIN, QUALITY = 256, 8, 85
VIEW_BOX = rb"<svg[^>]*?\bviewBox\s*=\s*[\"']\s*[-\d.e]+[\s,]+[-\d.e]+[\s,]+([\d.e]+)[\s,]+([\d.e]+)"


def open_file(content: bytes) -> Image.Image:
    """Open a raster file, or draw SVG with a long side of 512."""
    if b"<svg" not in content[:100_000]:
        return Image.open(io.BytesIO(content)).convert("RGBA")
    box = re.search(VIEW_BOX, content, re.S)
    tall = box is not None and float(box[2]) > float(box[1])
    size = {"height" if tall else "width": 2 * SIDE}
    svg, has_text = content.decode("utf-8", errors="replace"), b"<text" in content
    # dpi: sodipodi's, without one sizes in pt or mm come out as 0
    png = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=not has_text, dpi=90, **size)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def render(content: bytes) -> bytes:
    """Draw a file on white: photographs with their aspect, the rest cropped and padded to a square; b"": unusable."""
    image = open_file(content)
    alpha = np.asarray(image)[..., 3]
    if alpha.max() < 16:
        return b""
    is_clear = (alpha < 250).mean() > 0.02
    if is_clear:  # crop to what is drawn
        rows, columns = np.where(alpha > 8)
        image = image.crop((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
    page = Image.new("RGBA", image.size, "white")
    page.alpha_composite(image)
    image = page.convert("RGB")
    pixels, short, long = np.asarray(image), min(image.size), max(image.size)
    if long < 40 or short < 4 or long / short > 8 or pixels.std() < 4:
        return b""
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    is_drawing = is_clear or (border > 244).all(-1).mean() > 0.9 or long / short > 2
    scale = (SIDE - 2 * MARGIN) / long if is_drawing else SIDE / short
    if scale > 5:
        return b""
    image = image.resize([max(1, round(side * scale)) for side in image.size], Image.LANCZOS)
    if is_drawing:
        square = Image.new("RGB", (SIDE, SIDE), "white")
        square.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
        image = square
    file = io.BytesIO()
    image.save(file, "WEBP", quality=QUALITY, method=4)
    return file.getvalue()


def draw(content: bytes, folder: Path, name: str) -> tuple[bytes, tuple[np.ndarray, np.ndarray] | None]:
    """Draw a file unless it is in `folder`; returns WebP, empty if unusable, and looks."""
    file = folder / f"{hashlib.sha256(content).hexdigest()[:32]}.webp"
    if not file.exists():
        try:
            webp = render(content)
        except (ValueError, OSError) as error:
            print(f"{name} cannot be drawn: {error}", flush=True)
            webp = b""
        with atomic_file(file, "wb") as out:
            out.write(webp)
    webp = file.read_bytes()
    return webp, look(webp) if webp else None


def render_all(pictures: Iterable[Picture], folder: Path) -> list[Picture]:
    """Draw what is not in `folder`, on all cores; returns the usable pictures."""
    pictures = list(pictures)
    with ProcessPoolExecutor() as pool:
        for start in range(0, len(pictures), 1000):
            part = pictures[start : start + 1000]
            files, names = [picture.read() for picture in part], [picture.id for picture in part]
            for picture, drawn in zip(part, pool.map(draw, files, repeat(folder), names, chunksize=8)):
                picture.webp, picture.look = drawn
            print(f"{start + len(part)} of {len(pictures)} pictures drawn", flush=True)
    return [picture for picture in pictures if picture.webp]


# --- near-duplicates


def look(webp: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Return a picture's difference hash (256,) and its colours (16, 16, 3)."""
    image = Image.open(io.BytesIO(webp)).convert("RGB")
    grey = np.asarray(image.convert("L").resize((17, 16), Image.BOX), np.int16)
    return (grey[:, 1:] > grey[:, :-1] + 2).ravel(), np.asarray(image.resize((16, 16), Image.BOX))


def look_alikes(pictures: list[Picture], others: list[Picture]) -> Iterator[tuple[int, int, bool]]:
    """Yield the pairs (i, j) that look alike, and whether they look the same."""
    bits, other_bits = (np.array([p.look[0] for p in part], np.float32).reshape(-1, 256) for part in (pictures, others))
    for start in range(0, len(pictures), 256):
        rows = bits[start : start + 256]
        distance = rows.sum(1)[:, None] + other_bits.sum(1) - 2 * rows @ other_bits.T
        for i, j in zip(*np.nonzero(distance <= 10)):
            apart = np.abs(pictures[start + i].look[1] - others[j].look[1].astype(np.int16)).mean()
            if apart <= 6:
                yield start + int(i), int(j), distance[i, j] <= 3 and apart < 2
