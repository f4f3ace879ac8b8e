"""Caption images: to the terminal, as JSON lines, as an HTML page, as a contact sheet."""

import json
import os
import sys
import textwrap
from contextlib import ExitStack
from types import SimpleNamespace
from typing import IO

from tqdm import tqdm

from ..files import atomic_file, check_outputs, one_line
from ..images import find_images, small_jpeg, warn
from ..inference import Caption, caption
from ..model import load, require
from ..tables import page_template
from ..visualize.figures import Sheet


class Terminal:
    """`path: caption` a line."""

    def add(self, result: Caption) -> None:
        if result.error is None:
            tqdm.write(one_line(f"{result.path}: {' '.join(result.text.split())}"), file=sys.stdout)

    def finish(self) -> None:
        sys.stdout.flush()


class JsonLines:
    """`{"path": ..., "caption": ...}` a line, or `{"path": ..., "error": ...}`."""

    def __init__(self, file: IO[str]):
        self.file = file

    def add(self, result: Caption) -> None:
        outcome = {"caption": result.text} if result.error is None else {"error": result.error}
        self.file.write(one_line(json.dumps({"path": result.path} | outcome, ensure_ascii=False)) + "\n")

    def finish(self) -> None:
        self.file.flush()


class HtmlPage:
    """One page that needs no other file: images as small JPEG data URIs, one column on a phone."""

    def __init__(self, file: IO[str], size: int = 560):
        self.page = page_template("captions.html.jinja").module
        self.file, self.size = file, size
        file.write(self.page.head())

    def add(self, result: Caption) -> None:
        picture = small_jpeg(result.image, self.size) if result.error is None else None
        self.file.write(self.page.figure(result, picture))

    def finish(self) -> None:
        self.file.write(self.page.foot())


class ContactSheet(Sheet):
    """One PNG with a cell per image; only the sheet is in memory."""

    MAX_IMAGES = 1000

    def __init__(self, file: IO[bytes], count: int):
        message = f"a contact sheet holds {self.MAX_IMAGES} images, {count} were found: use --html."
        require(count <= self.MAX_IMAGES, message)
        super().__init__(count, columns=5, cell=240, text=84, gap=12)
        self.file = file

    def add(self, result: Caption) -> None:
        """Fill the next cell: the image, its caption in three lines, the file's name below them."""
        text, colour = (result.text, "black") if result.error is None else (result.error, "firebrick")
        lines = textwrap.wrap(text, width=36, max_lines=3, placeholder=" ...")
        lines += [""] * (3 - len(lines)) + [" ".join(os.path.basename(result.path).split())]
        self.add_cell(result.image, "\n".join(lines), colour)

    def finish(self) -> None:
        self.page.save(self.file, "PNG")


def open_sinks(stack: ExitStack, options: SimpleNamespace, count: int) -> list:
    """Open the outputs; files appear when the stack closes without an error."""
    sinks = [JsonLines(sys.stdout) if options.json == "-" else Terminal()]
    if options.json not in (None, "-"):
        sinks.append(JsonLines(stack.enter_context(atomic_file(options.json, "w"))))
    if options.html is not None:
        sinks.append(HtmlPage(stack.enter_context(atomic_file(options.html, "w"))))
    if options.png is not None:
        sinks.append(ContactSheet(stack.enter_context(atomic_file(options.png, "wb")), count))
    return sinks


def main(sources: list[str], **options) -> int:
    """Caption images; returns 1 where one of them could not be read."""
    options = SimpleNamespace(**options)
    # find the images
    paths, missing = find_images(sources, options.recursive)
    for source in missing:
        warn(f"no image at {source}")
    require(paths, "nothing to caption: give images, folders (--recursive: and theirs) or quoted globs.")
    # only what was named outright is an input: a folder may hold the sheet of an earlier run
    json_file = None if options.json == "-" else options.json
    check_outputs([p for p in paths if p in sources], json=json_file, html=options.html, png=options.png)

    with ExitStack() as stack:
        # open the outputs before the model: what cannot be written is said at once
        sinks = open_sinks(stack, options, len(paths))
        model, processor = load(options.model, options.revision, options.dtype, options.device)
        generate = {"max_new_tokens": options.max_new_tokens, "num_beams": options.num_beams, "do_sample": False}
        results = caption(model, processor, paths, options.prompt, options.batch_size, **generate)
        # caption; after an interrupt the outputs hold what is done
        done, failed, interrupted = 0, len(missing), False
        try:
            for result in tqdm(results, total=len(paths), unit="image", disable=None):
                if result.error is not None:
                    failed += 1
                    warn(result.error)
                for sink in sinks:
                    sink.add(result)
                done += 1
        except KeyboardInterrupt:
            interrupted = True
        for sink in sinks:
            sink.finish()
    if interrupted:
        raise KeyboardInterrupt(f"interrupted after {done} of {len(paths)} images")
    return 1 if failed else 0
