"""Caption pictures from the command line.

    python caption.py photo.jpg holiday/ 'scans/*.png'        # path: caption
    python caption.py holiday/ --html page.html               # a page to look at
    python caption.py holiday/ --json - | jq .caption         # JSON lines
    python caption.py photo.jpg --prompt 'What colour is it?' # through the chat template

Pictures are decoded batch by batch, so a folder may be of any length. What cannot be read is named on stderr and
skipped. Files are written under another name and renamed when they are complete.

Exit code: 0, all captioned; 1, something could not be read or found; 2, nothing to do or wrong arguments; 130,
interrupted (what was captioned until then is written).
"""

import argparse
import base64
import glob
import html
import json
import os
import re
import sys
import tempfile
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO

import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

from processing_microvlm import DEFAULT_MAX_PIXELS, open_image

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm", ".pgm", ".jp2", ".ico"}
URL_SCHEMES = ("http://", "https://", "file://")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class Caption:
    """What became of one picture: either `text` and `picture` (RGB), or `error`."""

    path: str
    text: str | None = None
    error: str | None = None
    picture: Image.Image | None = None


def find_pictures(sources: Iterable[str], recursive: bool = False) -> tuple[list[str], list[str]]:
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


def caption_pictures(
    model, processor, paths: Iterable[str], prompt: str | None = None, batch_size: int = 8, **generate_kwargs
) -> Iterator[Caption]:
    """Caption pictures in batches; no more than one batch is in memory.

    Args:
        model: any image-text-to-text model; without `prompt` one that has a `default_prompt`, as MicroVLM.
        processor: its processor.
        paths: paths or URLs, opened when their batch comes.
        prompt: what to ask about every picture, through the chat template; default: the model's own prompt.
        batch_size: pictures per `generate`.
        generate_kwargs: for `generate`, such as `max_new_tokens` and `num_beams`.

    Returns:
        an iterator with one `Caption` per path in their order; a picture that cannot be opened gives one with `error`.

    Raises:
        ValueError: no prompt, neither given nor in the model; or a prompt and no chat template.
    """
    text = None
    if prompt is not None:
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    elif not hasattr(model, "default_prompt"):
        raise ValueError(f"{type(model).__name__} has no default prompt: give one (--prompt 'Describe the picture.').")
    return _caption_pictures(model, processor, paths, text, batch_size, generate_kwargs)


def _caption_pictures(model, processor, paths, text, batch_size, generate_kwargs) -> Iterator[Caption]:
    max_pixels = getattr(processor.image_processor, "max_pixels", DEFAULT_MAX_PIXELS)
    batch, pictures = [], []
    for path in paths:
        try:
            pictures.append(open_image(path, max_pixels))
            batch.append(Caption(path, picture=pictures[-1]))
        except (OSError, ValueError) as error:
            batch.append(Caption(path, error=str(error)))
        if len(pictures) == batch_size:
            yield from _caption_batch(model, processor, batch, text, generate_kwargs)
            batch, pictures = [], []
    yield from _caption_batch(model, processor, batch, text, generate_kwargs)


def _caption_batch(model, processor, batch, text, generate_kwargs) -> list[Caption]:
    good = [caption for caption in batch if caption.error is None]
    if not good:
        return batch
    if text is None:
        inputs = processor.image_processor([caption.picture for caption in good], return_tensors="pt")
        start = model.default_prompt(1).shape[1]
    else:
        images, texts = [[caption.picture] for caption in good], [text] * len(good)
        inputs = processor(images=images, text=texts, padding=True, padding_side="left", return_tensors="pt")
        start = inputs["input_ids"].shape[1]
    output = model.generate(**inputs.to(model.device, model.dtype), **generate_kwargs)
    for caption, text in zip(good, processor.batch_decode(output[:, start:], skip_special_tokens=True)):
        caption.text = text.strip()
    return batch


def thumbnail(picture: Image.Image, size: int) -> Image.Image:
    small = picture.copy()
    small.thumbnail((size, size))
    return small


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


def _temporary(path: str | os.PathLike) -> tuple[int, str]:
    """Handle and name of a new file beside `path`.

    Raises:
        OSError: `path` cannot be written.
    """
    folder, name = os.path.split(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise OSError(f"cannot write {path}: there is no folder {folder}.")
    if not os.path.basename(path) or (os.path.exists(path) and not os.path.isfile(path)):
        raise OSError(f"cannot write {path}: it is not a regular file.")
    try:
        return tempfile.mkstemp(prefix=f".{name}.", dir=folder)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}.") from error


def check_outputs(inputs: Iterable[str], **outputs: str | None) -> None:
    """Refuse, before any work, what could not be written after it.

    Args:
        inputs: paths that are read.
        outputs: option -> path, or None.

    Raises:
        OSError: a path that cannot be written.
        ValueError: two options with one path, or one with the path of an input.
    """
    options, read = {}, {os.path.realpath(path) for path in inputs}
    for option, path in outputs.items():
        if path is None:
            continue
        handle, temporary = _temporary(path)
        os.close(handle)
        os.unlink(temporary)
        if os.path.realpath(path) in read:
            raise ValueError(f"--{option} would be written over the input {path}.")
        if (other := options.setdefault(os.path.realpath(path), option)) != option:
            raise ValueError(f"--{other} and --{option} are the same file, {path}.")


@contextmanager
def replacing(path: str, mode: str) -> Iterator[IO]:
    """Open a new file that takes the place of `path` when all went well, and disappears when not."""
    encoding = {} if "b" in mode else {"encoding": "utf-8", "errors": "backslashreplace"}
    handle, temporary = _temporary(path)
    try:
        with os.fdopen(handle, mode, **encoding) as file:
            yield file
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's files are private
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load(name: str | os.PathLike, revision: str = "main", dtype: str = "auto", device: str | None = None):
    """Model and processor of a checkpoint, in a folder or on the Hub."""
    kwargs = {"revision": revision, "trust_remote_code": True}
    processor = AutoProcessor.from_pretrained(name, **kwargs)
    device = device or ("cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu")
    model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, device_map=device, **kwargs)
    return model.eval(), processor


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    usage, _, rest = __doc__.partition("\n\n    ")
    parser = argparse.ArgumentParser(prog="caption.py", description=usage, epilog=rest[rest.index("Exit code") :])
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


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def usable_device(text: str) -> str:
    try:
        torch.zeros(1, device=text).tolist()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise argparse.ArgumentTypeError(f"cannot use {text!r}: {reason}") from error
    return text


def say(message: str) -> None:
    tqdm.write(f"caption.py: {message}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    paths, missing = find_pictures(args.sources, args.recursive)
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
                outputs.append(JsonLines(stack.enter_context(replacing(args.json, "w"))))
            if args.html:
                outputs.append(HtmlPage(stack.enter_context(replacing(args.html, "w"))))
            if args.png:
                outputs.append(ContactSheet(stack.enter_context(replacing(args.png, "wb")), len(paths)))
            model, processor = load(args.model, args.revision, args.dtype, args.device)
            generate_kwargs = {"max_new_tokens": args.max_new_tokens, "num_beams": args.num_beams, "do_sample": False}
            captions = caption_pictures(model, processor, paths, args.prompt, args.batch_size, **generate_kwargs)
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


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
