"""Caption images from the command line."""

import argparse
import base64
import html
import json
import os
import sys
import textwrap
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from typing import IO

from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError
from tqdm import tqdm

from ..files import atomic_file, check_outputs
from ..images import find_images, thumbnail
from ..inference import DTYPES, Caption, caption_images, positive, usable_device
from ..model import load


class Terminal:
    """`path: caption` a line."""

    def add(self, caption: Caption) -> None:
        if caption.error is None:
            tqdm.write(f"{caption.path}: {' '.join(caption.text.split())}", file=sys.stdout)

    def finish(self) -> None:
        sys.stdout.flush()


class JsonLines:
    """`{"path": ..., "caption": ...}` a line, or `{"path": ..., "error": ...}`."""

    def __init__(self, file: IO[str]):
        self.file = file

    def add(self, caption: Caption) -> None:
        result = {"caption": caption.text} if caption.error is None else {"error": caption.error}
        self.file.write(json.dumps({"path": caption.path} | result, ensure_ascii=False) + "\n")

    def finish(self) -> None:
        self.file.flush()


class HtmlPage:
    """One page that needs no other file: pictures as small JPEG data URIs, one column on a phone."""

    HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Captions</title><style>
:root { color-scheme: light dark; font: 16px/1.45 system-ui, sans-serif; }
body { margin: 0 auto; max-width: 1400px; padding: 1rem; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 280px), 1fr)); gap: 1.25rem; }
figure { margin: 0; border: 1px solid #8885; border-radius: 8px; overflow: hidden; }
img { display: block; width: 100%; height: auto; background: #fff; }
figcaption { padding: .6rem .8rem; overflow-wrap: anywhere; }
small { display: block; opacity: .65; }
.error { color: #c33; }
</style></head><body><main>
"""

    def __init__(self, file: IO[str], size: int = 560):
        self.file, self.size = file, size
        file.write(self.HEAD)

    def add(self, caption: Caption) -> None:
        if caption.error is None:
            text, data, picture = html.escape(caption.text), BytesIO(), thumbnail(caption.picture, self.size)
            picture.save(data, "JPEG", quality=85)
            uri = f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
            image = f'<img src="{uri}" width="{picture.width}" height="{picture.height}" alt="{text}">'
        else:
            text, image = f'<span class="error">{html.escape(caption.error)}</span>', ""
        path = f"<small>{html.escape(caption.path)}</small>"
        self.file.write(f"<figure>{image}<figcaption>{text}{path}</figcaption></figure>\n")

    def finish(self) -> None:
        self.file.write("</main></body></html>\n")


class ContactSheet:
    """One PNG with a cell per picture; only the sheet is kept in memory."""

    MAX_PICTURES = 1000
    CELL, TEXT, GAP, COLUMNS = 240, 84, 12, 5  # pixels: side of a picture, height of the text below it, space between

    def __init__(self, file: IO[bytes], count: int):
        if count > self.MAX_PICTURES:
            raise ValueError(f"a contact sheet holds {self.MAX_PICTURES} pictures, {count} were found: use --html.")
        self.file, self.used = file, 0
        columns, rows = min(count, self.COLUMNS), -(-count // self.COLUMNS)
        size = columns * (self.CELL + self.GAP) + self.GAP, rows * (self.CELL + self.TEXT + self.GAP) + self.GAP
        self.sheet = Image.new("RGB", size, "white")
        self.font = ImageFont.load_default(size=13)

    def add(self, caption: Caption) -> None:
        cell = Image.new("RGB", (self.CELL, self.CELL + self.TEXT), "white")
        text, colour = caption.error, "firebrick"
        if caption.error is None:
            text, colour = caption.text, "black"
            picture = thumbnail(caption.picture, self.CELL)
            cell.paste(picture, ((self.CELL - picture.width) // 2, self.CELL - picture.height))
        draw = ImageDraw.Draw(cell)
        lines = textwrap.wrap(text, width=36, max_lines=3, placeholder=" ...")
        draw.multiline_text((0, self.CELL + 6), "\n".join(lines), fill=colour, font=self.font)
        name = self.shortened(" ".join(os.path.basename(caption.path).split()))
        draw.text((0, self.CELL + 62), name, fill="gray", font=self.font)
        row, column = divmod(self.used, self.COLUMNS)
        self.used += 1
        x, y = self.GAP + column * (self.CELL + self.GAP), self.GAP + row * (self.CELL + self.TEXT + self.GAP)
        self.sheet.paste(cell, (x, y))

    def shortened(self, name: str) -> str:
        """As much of a name as a cell is wide, with an ellipsis where some is left out."""
        if self.font.getlength(name) <= self.CELL:
            return name
        while self.font.getlength(f"{name}...") > self.CELL:
            name = name[:-1]
        return f"{name}..."

    def finish(self) -> None:
        self.sheet.save(self.file, "PNG")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    usage, _, rest = __doc__.partition("\n\n    ")
    parser = argparse.ArgumentParser(prog="microvlm caption", description=usage, epilog=rest[rest.index("Exit code") :])
    add = parser.add_argument
    add("sources", nargs="+", metavar="PATH", help="pictures, folders, globs or URLs")
    add("--model", default=Path(__file__).resolve().parent, metavar="FOLDER_OR_ID", help="default: this repo")
    add("--revision", default="main", help="branch, tag or commit of a model on the Hub")
    add("--batch-size", type=positive, default=8, metavar="N", help="pictures at once (default: 8)")
    add("--prompt", metavar="TEXT", help="what to ask about each picture (default: the model's own prompt)")
    add("--max-new-tokens", type=positive, default=32, metavar="N", help="longest caption (default: 32)")
    add("--num-beams", type=positive, default=1, metavar="N", help="beams (default: 1, greedy)")
    add("--json", metavar="FILE", help="write JSON lines; - for the terminal, in place of `path: caption`")
    add("--html", metavar="FILE", help="write one page with pictures and captions")
    add("--png", metavar="FILE", help="write a contact sheet")
    add("--recursive", action="store_true", help="also look into the folders of folders")
    add("--dtype", default="auto", choices=DTYPES, help="default: the checkpoint's")
    add("--device", type=usable_device, help="cpu, cuda, mps (default: the best there is)")
    return parser.parse_intermixed_args(arguments)


def say(message: str) -> None:
    tqdm.write(f"microvlm caption: {message}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    paths, missing = find_images(args.sources, args.recursive)
    for source in missing:
        say(f"no picture at {source}")
    if not paths:
        say("nothing to caption: give pictures, folders (with --recursive for the folders in them) or quoted globs.")
        return 2
    with ExitStack() as stack:
        try:
            named = [
                path for path in paths if path in args.sources
            ]  # what folders hold may be sheets of an earlier run
            check_outputs(named, json=None if args.json == "-" else args.json, html=args.html, png=args.png)
            outputs = []
            if args.json and args.json != "-":
                outputs.append(JsonLines(stack.enter_context(atomic_file(args.json, "w"))))
            if args.html:
                outputs.append(HtmlPage(stack.enter_context(atomic_file(args.html, "w"))))
            if args.png:
                outputs.append(ContactSheet(stack.enter_context(atomic_file(args.png, "wb")), len(paths)))
            model, processor = load(args.model, args.revision, args.dtype, args.device)
            generate_kwargs = {"max_new_tokens": args.max_new_tokens, "num_beams": args.num_beams, "do_sample": False}
            captions = caption_images(model, processor, paths, args.prompt, args.batch_size, **generate_kwargs)
        except (OSError, ValueError, SafetensorError) as error:
            stack.pop_all().__exit__(type(error), error, error.__traceback__)  # leaves no file behind
            say(str(error))
            return 2
        outputs.append(JsonLines(sys.stdout) if args.json == "-" else Terminal())
        done, failed = 0, len(missing)
        try:
            for caption in tqdm(captions, total=len(paths), unit="picture", disable=None):
                if caption.error is not None:
                    failed += 1
                    say(caption.error)
                for output in outputs:
                    output.add(caption)
                done += 1
        except KeyboardInterrupt:
            say(f"interrupted after {done} of {len(paths)} pictures")
        for output in outputs:
            output.finish()
    return 130 if done < len(paths) else 1 if failed else 0
