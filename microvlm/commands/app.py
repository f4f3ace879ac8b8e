"""Serve a page to try a model on."""

import html
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import gradio as gr
import torch
from fastapi import Depends, HTTPException, Request
from gradio.utils import get_upload_folder, is_in_or_equal
from gradio_client.utils import is_file_obj_with_meta, traverse
from safetensors import SafetensorError

from ..files import ROOT, one_line
from ..images import thumbnail
from ..inference import Query, image_query, question_query, stream, teach
from ..model import load, open_image, require
from ..tables import TEMPLATES, page_template
from ..visualize.attention import Recall, recall, stored_sentences, word_attention
from ..visualize.figures import overlay

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
EXAMPLES = ("swan", "robot", "drum", "grapes", "chipmunk", "saxophone")
TABLE_ROWS, MAP_SIZE = 6, 224
LONGEST, VISITORS = 200, 2  # characters of a sentence or question; visitors who are served at once
GONE = "The file is no longer here: choose it again."
NO_MEMORY = "<p class='quiet'>The memory is empty.</p>"
THEME = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def ask_for(condition, message: str) -> None:
    """Show the visitor a message, as text and without a trace in the log, where something is missing."""
    if not condition:
        raise gr.Error(html.escape(one_line(message), quote=False), duration=8, print_exception=False)


@contextmanager
def error_on_page(folder: str = os.sep * 2) -> Iterator[None]:
    """Show the visitor what bad input raises in here, without the folder of a file."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        ask_for(False, str(error).replace(folder, ""))


def is_upload(path) -> bool:
    return isinstance(path, str) and os.path.isfile(path) and is_in_or_equal(path, get_upload_folder())


@contextmanager
def uploaded(path, missing: str) -> Iterator[dict]:
    """Open an upload, and no other file here, as an image is given; errors in here name it without its folder."""
    ask_for(is_upload(path), missing)
    folder, name = os.path.split(path)
    with error_on_page(folder + os.sep), open(path, "rb") as file:
        yield {"path": name, "bytes": file}


def text_of(value, missing: str) -> str:
    """Strip what a visitor typed; what a browser would not send is told, too."""
    text = value.strip() if isinstance(value, str) else ""
    ask_for(text, missing)
    ask_for(len(text) <= LONGEST, f"This text has {len(text)} characters, at most {LONGEST} are read: shorten it.")
    return text


def uids(memory) -> list[str]:
    """List the items of a memory of one row; as text, since a browser rounds whole numbers beyond 2^53."""
    return [] if memory is None else [str(uid) for uid in memory.uids[0][memory.active[0]].tolist()]


def recall_table(result: Recall | None) -> str:
    """Write what the memory says to a query as HTML; nothing where the model has no memory."""
    if result is None:
        return ""
    if not result.items:
        return NO_MEMORY
    best = result.cosines.argsort(descending=True)[:TABLE_ROWS].tolist()
    rows = [(result.items[n], float(result.cosines[n]), float(result.shares[n])) for n in best]
    return page_template("recall.html.jinja").render(recall=result, rows=rows, more=len(result.items) - TABLE_ROWS)


class Page:
    """The handlers of the page, for one model; the memories are the visitors'."""

    def __init__(self, model, processor):
        self.model, self.processor = model, processor

    def look(self, image: dict | None, memory) -> Iterator[tuple[str, str, list]]:
        """Yield caption, recall table and a heat map per word as they come; after an error all are empty."""
        if image is None:
            yield "", "", []
            return
        try:
            with uploaded(image["path"], GONE) as file, torch.no_grad():
                yield from self._look(open_image(file), memory)
        except gr.Error:
            yield "", "", []
            raise

    def _look(self, image, memory) -> Iterator[tuple[str, str, list]]:
        query, result = image_query(self.model, self.processor, image), None
        if self.model.config.use_memory:
            memory, result = self._recall(query, memory)
        # the caption as it grows
        text, ids = "", []
        for text, ids in stream(self.model, self.processor, query, result and result.readout):  # noqa: B007
            yield text, recall_table(result), []
        # then where each of its words looked
        words = word_attention(self.model, self.processor, query.pixel_values, [ids], memory)[0]
        small, maps = thumbnail(image, MAP_SIZE), []
        for word, heat, share in zip(words.words, words.maps, words.memory):
            label = f"{word} {share:.0%}" if result and result.speaks else word
            maps.append((overlay(small, heat), label))
        yield text, recall_table(result), maps

    def _recall(self, query: Query, memory):
        """Ask the memory; returns it, a new one where the visitor has none, and what it says."""
        memory = self.model.new_memory() if memory is None else memory
        return memory, recall(self.model, self.processor, memory, query.input_ids, query.image)

    def ask(self, question: str, memory) -> Iterator[tuple[str, str]]:
        """Yield the answer to a question as it grows, and the recall table."""
        question = text_of(question, "Type a question first.")
        with error_on_page(), torch.no_grad():
            query = question_query(self.model, self.processor, question)
            _, result = self._recall(query, memory)
            for text, _ in stream(self.model, self.processor, query, result.readout):
                yield text, recall_table(result)

    def teach(self, image: dict | None, sentence: str, memory):
        """Store a sentence under the image; returns the memory and the emptied text box."""
        ask_for(image is not None, "Choose a picture first.")
        sentence = text_of(sentence, "Type a sentence first.")
        with uploaded(image["path"], GONE) as file:
            memory = self.model.new_memory() if memory is None else memory
            taught = teach(self.model, self.processor, file, sentence, memory)
        # a second click, before the text box is empty, stores nothing
        alike = taught.similarity(taught.addresses[:, -1:])[0, 0, :-1] > 0.9999
        again = any(label == sentence and same for label, same in zip(taught.labels[0], alike))
        return (memory if again else taught), ""

    def forget(self, uid: str | None, memory):
        """Forget the item of this uid; returns the memory."""
        ask_for(uid is not None, "Choose what to forget.")
        # not so after a second click, before the list is new
        ask_for(uid in uids(memory), "This is not in the memory any more: nothing was forgotten.")
        with error_on_page():
            return self.model.forget(memory, uids(memory).index(uid))

    def items(self, memory):
        """List what can be forgotten; hides the download and empties the answer, which are of the memory before."""
        names = [] if memory is None else stored_sentences(memory, self.processor)
        choices = [(f"{number}. {name}", uid) for number, (name, uid) in enumerate(zip(names, uids(memory)))]
        label = f"What it was taught ({len(names)})"
        return gr.Dropdown(choices=choices, value=None, label=label), gr.DownloadButton(visible=False), "", ""

    def save(self, memory) -> Iterator[gr.DownloadButton]:
        """Offer a file of the memory to download."""
        ask_for(memory is not None, "There is nothing to save: teach it something first.")
        with error_on_page(), tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "facts.safetensors")
            memory.save(path)
            size = os.path.getsize(path) / 1e6
            yield gr.DownloadButton(f"Download facts.safetensors ({size:.1f} MB)", value=path, visible=True)
            # gradio has its own copy by now

    def load(self, path: str | None):
        """Open the memory of a file, in place of the one there is."""
        with uploaded(path, "Choose a file first."):
            memory = self.model.load_memory(path)
            stored_sentences(memory, self.processor)  # raises for several rows
            return memory


def image_input() -> gr.Image:
    """Lay out the image to look at, with examples below it."""
    look = {"label": "Picture", "show_label": False, "height": 260, "elem_id": "picture"}  # it would lie on the picture
    image = gr.Image(type="filepath", image_mode=None, sources=["upload", "clipboard", "webcam"], **look)
    examples = (ROOT / "examples" / f"{name}.png" for name in EXAMPLES)
    examples = [[str(path)] for path in examples if path.is_file()]
    gr.Examples(examples, image, label="Or one of these", cache_examples=False)
    return image


def lay_out(has_memory: bool) -> SimpleNamespace:
    """Place the components of the page, from top to bottom; returns them by name."""
    page, line = SimpleNamespace(), {"interactive": False, "lines": 1, "max_lines": 4}
    about, shares = "Teach it a sentence. Show the picture again.", "In per cent, how much of it came from the memory."
    if not has_memory:
        about, shares = "This checkpoint has no memory: it cannot be taught.", ""
    page.memory = gr.State(None)
    # image and caption
    gr.Markdown(f"# MicroVLM\nDrop a picture. {about}")
    page.image = image_input()
    page.caption = gr.Textbox(label="Caption", elem_id="caption", **line)
    page.recall = gr.HTML(NO_MEMORY, visible=has_memory, elem_id="said", elem_classes="said")
    # teaching and asking
    with gr.Column(visible=has_memory):
        text = {"max_length": LONGEST}
        page.sentence = gr.Textbox(label="Teach it", placeholder="This is Bimo the swan.", elem_id="sentence", **text)
        page.teach = gr.Button("Teach", variant="primary", elem_id="teach")
        page.question = gr.Textbox(label="Ask it", placeholder="Who is the swan?", elem_id="question", **text)
        page.ask = gr.Button("Ask", elem_id="ask")
        page.answer = gr.Textbox(label="Answer", elem_id="answer", **line)
        page.answer_recall = gr.HTML("", elem_id="answer_said", elem_classes="said")
    # heat maps
    gr.Markdown(f"#### Where each word looks\n{shares}")
    gallery = {"show_label": False, "height": "auto", "object_fit": "contain", "interactive": False, "buttons": []}
    page.maps = gr.Gallery(elem_id="maps", **gallery)
    # the memory as a list and as a file
    with gr.Column(visible=has_memory):
        page.items = gr.Dropdown([], label="What it was taught (0)", interactive=True, elem_id="stored")
        page.forget = gr.Button("Forget it", elem_id="forget")
        with gr.Row():
            page.save = gr.Button("Save memory", elem_id="save", min_width=120)
            page.load = gr.UploadButton("Load memory", file_count="single", elem_id="load", min_width=120)
        page.download = gr.DownloadButton("Download", visible=False, elem_id="download")
    return page


def connect(handlers: Page, page: SimpleNamespace) -> None:
    """Say which handler runs at which event, with which components."""
    shared = {"concurrency_limit": VISITORS, "concurrency_id": "model", "api_visibility": "private"}
    # gradio's preprocessing opens the image and looks for the choice, and words its own errors about them
    raw = {"preprocess": False, **shared}
    look = {"fn": handlers.look, "inputs": [page.image, page.memory], "outputs": [page.caption, page.recall, page.maps]}
    look |= {"show_progress": "minimal", "trigger_mode": "always_last", **raw}  # not skipped while one still runs
    items = {"fn": handlers.items, "inputs": page.memory, "api_visibility": "private"}
    items["outputs"] = [page.items, page.download, page.answer, page.answer_recall]
    page.image.change(**look)
    # after a change of the memory: a new list, and the image again
    teach, taught = [page.teach.click, page.sentence.submit], [page.image, page.sentence, page.memory]
    gr.on(teach, handlers.teach, taught, [page.memory, page.sentence], **raw).success(**items).then(**look)
    change = page.forget.click(handlers.forget, [page.items, page.memory], page.memory, **raw)
    change.success(**items).then(**look)
    page.load.upload(handlers.load, page.load, page.memory, **shared).success(**items).then(**look)
    # what leaves the memory as it is
    question, answer = [page.question, page.memory], [page.answer, page.answer_recall]
    gr.on([page.ask.click, page.question.submit], handlers.ask, question, answer, show_progress="minimal", **shared)
    page.save.click(handlers.save, page.memory, page.download, **shared)


class Blocks(gr.Blocks):
    """A page on which gradio, too, opens uploads alone: by itself it downloads what a visitor names by address."""

    async def preprocess_data(self, block_fn, inputs, *arguments, **options):
        traverse(inputs, lambda file: ask_for(is_upload(file["path"]), GONE), is_file_obj_with_meta)
        return await super().preprocess_data(block_fn, inputs, *arguments, **options)


def refuse_extras(request: Request) -> None:
    """Refuse what gradio would do besides this page: fetch an address for a visitor, run ffmpeg on a file."""
    path = request.scope["path"]
    if any(part in path for part in ("/file=http", "/file/http", "/process_recording")):
        raise HTTPException(403, "This page does not do that.")


def build(model, processor) -> gr.Blocks:
    """Build the page of a model; its `launch` serves it."""
    # every hour, files older than a day go: an image that still lies on the page can be taught
    with Blocks(title="MicroVLM", analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
        connect(Page(model, processor), lay_out(model.config.use_memory))
    return blocks.queue(max_size=100)


def main(model: str, revision: str, port: int, share: bool) -> None:
    opened, processor = load(model, revision)
    kind = opened.config.model_type
    require(kind == "microvlm", f"{model} is a model of type {kind}, not a MicroVLM.")
    blocks = build(opened, processor)
    look = {"theme": THEME, "css_paths": TEMPLATES / "app.css", "footer_links": [], "ssr_mode": False}
    # a run history would act with this machine's own token for the Hub
    look |= {"run_history": False, "enable_monitoring": False, "app_kwargs": {"dependencies": [Depends(refuse_extras)]}}
    blocks.launch(server_port=port, share=share, show_error=True, max_file_size="200mb", **look)
