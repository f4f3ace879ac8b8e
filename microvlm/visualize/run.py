"""Draw attention and memory of images into PNG files."""

import os
from functools import partial
from pathlib import Path

from PIL import Image

from ..files import atomic_file, one_line
from ..images import find_images, warn
from ..model import load, open_image
from .attention import pooling_attention, word_attention
from .figures import contrast_figure, memory_figure, pooling_figure, word_figure


def words(contrast: bool, **options) -> int:
    return save_figures("contrast" if contrast else "words", **options)


def save_figures(what: str, images: list[str], out: str, model: str, revision: str, memory: str | None = None) -> int:
    """Write one PNG per image; returns 1 where an image could not be read."""
    paths, missing = find_images(images)
    for source in missing:
        warn(f"no image at {source}")
    if missing and not paths:
        return 1
    failed, names = len(missing), set()
    os.makedirs(out, exist_ok=True)
    network, processor = load(model, revision)
    state = network.load_memory(memory) if memory else None
    for path in paths or [None]:
        try:
            image = None if path is None else open_image(path)
        except (OSError, ValueError, MemoryError) as error:
            warn(str(error) or f"{path} needs more memory than there is.")
            failed += 1
            continue
        # a name of its own, also for images of one name in two folders
        name = what if path is None else f"{Path(path).stem}_{what}"
        while name in names:
            name += "_"
        names.add(name)
        file = os.path.join(out, f"{name}.png")
        figure = draw(what, network, processor, state, image)
        with atomic_file(file, "wb") as png:
            figure.save(png, "PNG", optimize=True)
        print(one_line(file), flush=True)
    return 1 if failed else 0


pooling, memory = (partial(save_figures, what) for what in ("pooling", "memory"))


def draw(what: str, model, processor, memory, image: Image.Image | None) -> Image.Image:
    """Draw the figure `what` of one image, or of the memory alone."""
    if what == "memory":
        return memory_figure(model, processor, memory, image)
    pixels = processor.image_processor([image], return_tensors="pt")["pixel_values"]
    if what == "pooling":
        return pooling_figure(image, pooling_attention(model, pixels)[0])
    attention = word_attention(model, processor, pixels, memory=memory)[0]
    return word_figure(image, attention) if what == "words" else contrast_figure(image, attention)
