"""Draw attention and memory from the command line."""

import argparse
import os
import sys
from pathlib import Path

from PIL import Image
from safetensors import SafetensorError

from ..images import find_images
from ..model import load, open_image, to_rgb
from .attention import pooling_attention, word_attention
from .figures import contrast_figure, memory_figure, pooling_figure, save_png, word_figure

ROOT = Path(__file__).resolve().parents[2]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["pooling", "words", "memory"])
    parser.add_argument("pictures", nargs="*", metavar="PICTURE", help="pictures, folders, globs or URLs")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the PNG files, made if need be")
    parser.add_argument("--model", default=str(ROOT), metavar="FOLDER_OR_ID", help="default: this repo")
    parser.add_argument("--revision", default="main")
    parser.add_argument("--memory", metavar="FILE", help="of microvlm memory, microvlm app or MemoryState.save")
    parser.add_argument(
        "--contrast", action="store_true", help="words: where each looks more and less than all on average"
    )
    options = parser.parse_intermixed_args(arguments)
    if options.what == "memory" and not options.memory:
        parser.error("memory takes --memory FILE")
    if options.what == "pooling" and options.memory:
        parser.error("pooling does not take --memory: the memory has no part in it")
    if options.contrast and options.what != "words":
        parser.error(f"{options.what} does not take --contrast: it compares words")
    if options.what != "memory" and not options.pictures:
        parser.error(f"{options.what} takes at least one picture")
    paths, missing = find_images(options.pictures)
    for source in missing:
        say(f"no picture at {source}")
    if missing and not paths:
        return 1

    failed = len(missing)
    try:
        os.makedirs(options.out, exist_ok=True)
        model, processor = load(options.model, options.revision)
        memory = model.load_memory(options.memory) if options.memory else None
        names = set()
        for path in paths or [None]:
            try:
                picture = None if path is None else to_rgb(open_image(path))
            except (OSError, ValueError) as error:
                say(str(error))
                failed += 1
                continue
            what = "contrast" if options.contrast else options.what
            name = what if path is None else f"{Path(path).stem}_{what}"
            while name in names:  # of the same name in another folder
                name += "_"
            names.add(name)
            out = os.path.join(options.out, f"{name}.png")
            save_png(draw(what, model, processor, memory, picture), out)
            print(out, flush=True)
    except (OSError, ValueError, SafetensorError) as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    return 1 if failed else 0


def draw(what: str, model, processor, memory, picture: Image.Image | None) -> Image.Image:
    pixel_values = None
    if picture is not None:
        pixel_values = processor.image_processor([picture], return_tensors="pt")["pixel_values"]
    if what == "pooling":
        return pooling_figure(picture, pooling_attention(model, pixel_values)[0])
    if what in ("words", "contrast"):
        found = word_attention(model, processor, pixel_values, memory=memory)[0]
        return word_figure(picture, found) if what == "words" else contrast_figure(picture, found)
    return memory_figure(model, processor, memory, pixel_values, picture)


def say(message: str) -> None:
    print(f"microvlm visualize: {message}", file=sys.stderr)
