"""Serve a page to try a model on."""

import argparse
import html
import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import gradio as gr
import torch
from safetensors import SafetensorError
from transformers import TextIteratorStreamer

from ..images import thumbnail
from ..inference import add
from ..model import load, open_image
from ..visualize.attention import Recall, recall, stored_sentences, word_attention
from ..visualize.figures import overlay

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
EXAMPLES = ("swan", "robot", "drum", "grapes", "chipmunk", "saxophone")
TABLE_ROWS, MAX_NEW_TOKENS, MAP_SIZE = 6, 32, 224
NO_MEMORY = "<p class='quiet'>The memory is empty.</p>"
CSS = """
.gradio-container { max-width: 46rem !important; margin: auto !important; }
.gradio-container, body { overflow-wrap: anywhere; }
#caption textarea, #answer textarea { font-size: 1.15rem; }
#maps .grid-wrap { height: auto; max-height: none; min-height: 0; }
#maps .grid-container { grid: auto-flow min-content / repeat(auto-fill, minmax(8rem, 1fr)) !important; }
#maps .grid-container .thumbnail-item { display: flex; flex-direction: column; height: auto; aspect-ratio: auto; }
#maps .grid-container img { height: auto; aspect-ratio: 1; }
#maps .caption-label { position: static; width: 100%; max-width: none; white-space: normal; text-align: left; font-size: .85rem; }
.said table { width: 100%; border-collapse: collapse; border: 0 !important; }
.said td, .said th { padding: .2rem .4rem; text-align: left; border: 0 !important; }
.said tr { border: 0 !important; border-bottom: 1px solid var(--border-color-primary) !important; }
.said td + td, .said th + th { text-align: right; white-space: nowrap; }
.said .quiet { opacity: .65; }
.said .speaks td:first-child, .said b { color: var(--primary-600); }
@media (max-width: 30rem) {
    #save, #load { padding-inline: .5rem; }
}
"""
ROOT = Path(__file__).resolve().parents[2]
THEME = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


@contextmanager
def told(**names: str) -> Iterator[None]:
    """What goes wrong in here, and is the visitor's to mend, is shown to them; each of `names` stands for a path."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        message = str(error)
        for name, path in names.items():
            shortened = f"{path[:60]}... ({len(path)} characters)"  # by fetch_picture
            message = message.replace(path, name).replace(shortened, name)
        raise gr.Error(html.escape(message, quote=False), duration=8) from error


@contextmanager
def shown(picture: dict) -> Iterator[str]:
    """The path of a picture on the page, from gradio's description of the file; what goes wrong with it in here is told by its name.

    Raises:
        gr.Error: the file is gone, or as `told`.
    """
    path = picture["path"]
    if not path or not os.path.isfile(path):
        raise gr.Error("The picture is no longer here: show it again.")
    with told(**{os.path.basename(path): path}):
        yield path


def uids(memory) -> list[str]:
    """Of the items of a memory of one row, in their order; as text, as a browser rounds whole numbers beyond 2^53."""
    return [] if memory is None else [str(uid) for uid in memory.uids[0][memory.active[0]].tolist()]


def table(said: Recall | None) -> str:
    """What the memory says to a query, as HTML; nothing where the model has none."""
    if said is None:
        return ""
    if not said.items:
        return NO_MEMORY
    verdict = "<b>The memory speaks.</b>" if said.speaks else "The memory is silent."
    lines = [f"<p>{verdict} Probability {said.probability:.2f}, it speaks from {said.threshold:.2f} on.</p>"]
    lines.append("<table><tr><th>stored</th><th>cosine</th><th>share</th></tr>")
    for n in said.cosines.argsort(descending=True)[:TABLE_ROWS].tolist():
        row = f"<td>{html.escape(said.items[n])}</td><td>{said.cosines[n]:.2f}</td><td>{said.shares[n]:.2f}</td>"
        lines.append(f"<tr{' class=speaks' if said.speaks and said.shares[n] > 0.5 else ''}>{row}</tr>")
    if len(said.items) > TABLE_ROWS:
        lines.append(f"<tr><td class='quiet'>and {len(said.items) - TABLE_ROWS} more</td><td></td><td></td></tr>")
    return "".join(lines) + "</table>"


class Page:
    """What the page does, for one model; the memories are the visitors'."""

    def __init__(self, model, processor):
        self.model, self.processor = model, processor

    def _stream(self, input_ids: torch.Tensor, image, memory) -> Iterator[tuple[str, list[int]]]:
        """The answer to a prompt (1, T) as it grows, with its tokens when it is done."""
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        encoded = {} if image is None else {"mm_encoder_outputs": {"image": image}}
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(
                self.model.generate,
                input_ids=input_ids,
                **encoded,
                memory=memory,
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                streamer=streamer,
            )
            future.add_done_callback(lambda _: streamer.end())  # after an error too
            text = ""
            for piece in streamer:
                text += piece
                yield text.strip(), []
            yield text.strip(), future.result()[0, input_ids.shape[1] :].tolist()

    def look(self, picture: dict | None, memory) -> Iterator[tuple[str, str, list]]:
        """Caption, what the memory says and a heat map per word, as they come; nothing of an earlier picture stays after an error."""
        if picture is None:
            yield "", "", []
            return
        try:
            with shown(picture) as path, torch.no_grad():
                picture = open_image(path)
                pixel_values = self.processor.image_processor([picture], return_tensors="pt")["pixel_values"]
                pixel_values = pixel_values.to(self.model.device, self.model.dtype)
                image = self.model.get_image_features(pixel_values, return_dict=True)
                prompt, said = self.model.default_prompt(1), None
                if self.model.config.use_memory:
                    memory = self.model.new_memory() if memory is None else memory
                    said = recall(self.model, self.processor, memory, prompt, image)
                text, ids = "", []
                for text, ids in self._stream(prompt, image, memory):  # noqa: B007
                    yield text, table(said), []
                words = word_attention(self.model, self.processor, pixel_values, [ids], memory)[0]
                small, maps = thumbnail(picture, MAP_SIZE), []
                for word, heat, recalled in zip(words.words, words.maps, words.memory):
                    label = f"{word} {recalled:.0%}" if said and said.speaks else word
                    maps.append((overlay(small, heat), label))
                yield text, table(said), maps
        except gr.Error:
            yield "", "", []
            raise

    def ask(self, question: str, memory) -> Iterator[tuple[str, str]]:
        """Answer to a question in words, and what the memory says to it."""
        if not question.strip():
            raise gr.Error("Type a question first.")
        content = [{"role": "user", "content": [{"type": "text", "text": question.strip()}]}]
        with told(), torch.no_grad():
            how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
            prompt = self.processor.apply_chat_template(content, **how)["input_ids"].to(self.model.device)
            memory = self.model.new_memory() if memory is None else memory
            said = table(recall(self.model, self.processor, memory, prompt))
            for text, _ in self._stream(prompt, None, memory):
                yield text, said

    def teach(self, picture: dict | None, sentence: str, memory):
        """The memory with a sentence about the picture, and the emptied text box."""
        if picture is None:
            raise gr.Error("Choose a picture first.")
        if not sentence.strip():
            raise gr.Error("Type a sentence first.")
        with shown(picture) as path:
            memory = self.model.new_memory() if memory is None else memory
            return add(self.model, self.processor, memory, path, sentence.strip()), ""

    def forget(self, uid: str | None, memory):
        """The memory without the item of this uid."""
        if uid is None:
            raise gr.Error("Choose what to forget.")
        if uid not in uids(memory):  # a second click, before the list is new
            raise gr.Error("This is not in the memory any more: nothing was forgotten.")
        with told():
            return self.model.forget(memory, uids(memory).index(uid))

    def items(self, memory):
        """The list to forget from, and without what was of the memory before: the download, the answer and what was said to it."""
        names = [] if memory is None else stored_sentences(memory, self.processor)
        choices = [(f"{number}. {name}", uid) for number, (name, uid) in enumerate(zip(names, uids(memory)))]
        label = f"What it was taught ({len(names)})"
        return gr.Dropdown(choices=choices, value=None, label=label), gr.DownloadButton(visible=False), "", ""

    def save(self, memory) -> Iterator[gr.DownloadButton]:
        """A file of the memory, to download."""
        if memory is None:
            raise gr.Error("There is nothing to save: teach it something first.")
        with told(), tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "facts.safetensors")
            memory.save(path)
            size = os.path.getsize(path) / 1e6
            yield gr.DownloadButton(f"Download facts.safetensors ({size:.1f} MB)", value=path, visible=True)
            # gradio has its own copy by now

    def load(self, path: str | None):
        """The memory of a file, in place of the one there is."""
        if path is None:
            raise gr.Error("Choose a file first.")
        with told(**{os.path.basename(path): path}):
            memory = self.model.load_memory(path)
            stored_sentences(memory, self.processor)  # of one row
            return memory


def build(model, processor) -> gr.Blocks:
    """The page of a model; `launch` shows it."""
    page, one = Page(model, processor), {"concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private"}
    about, shares = "Teach it a sentence. Show the picture again.", "In per cent, how much of it came from the memory."
    teachable = model.config.use_memory
    if not teachable:
        about, shares = "This checkpoint has no memory: it cannot be taught.", ""
    # every hour, what is older than a day: a picture that is still shown can be taught
    with gr.Blocks(title="MicroVLM", analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
        memory = gr.State(None)
        gr.Markdown(f"# MicroVLM\nDrop a picture. {about}")
        picture = gr.Image(
            type="filepath",
            image_mode=None,
            label="Picture",
            show_label=False,  # it would lie on the picture
            height=260,
            sources=["upload", "clipboard", "webcam"],
            elem_id="picture",
        )
        examples = [[str(ROOT / "examples" / f"{name}.png")] for name in EXAMPLES]
        gr.Examples(
            [e for e in examples if os.path.isfile(e[0])], picture, label="Or one of these", cache_examples=False
        )
        caption = gr.Textbox(label="Caption", interactive=False, lines=1, max_lines=4, elem_id="caption")
        said = gr.HTML(NO_MEMORY, visible=teachable, elem_id="said", elem_classes="said")
        with gr.Column(visible=teachable):
            sentence = gr.Textbox(
                label="Teach it", placeholder="This is Bimo the swan.", max_length=200, elem_id="sentence"
            )
            write = gr.Button("Teach", variant="primary", elem_id="teach")
            question = gr.Textbox(label="Ask it", placeholder="Who is the swan?", max_length=200, elem_id="question")
            put = gr.Button("Ask", elem_id="ask")
            answer = gr.Textbox(label="Answer", interactive=False, lines=1, max_lines=4, elem_id="answer")
            answer_said = gr.HTML("", elem_id="answer_said", elem_classes="said")
        gr.Markdown(f"#### Where each word looks\n{shares}")
        maps = gr.Gallery(
            show_label=False,
            height="auto",
            object_fit="contain",
            interactive=False,
            buttons=[],
            elem_id="maps",
        )
        with gr.Column(visible=teachable):
            stored = gr.Dropdown([], label="What it was taught (0)", interactive=True, elem_id="stored")
            drop = gr.Button("Forget it", elem_id="forget")
            with gr.Row():
                keep = gr.Button("Save memory", elem_id="save", min_width=120)
                take = gr.UploadButton("Load memory", file_count="single", elem_id="load", min_width=120)
            download = gr.DownloadButton("Download", visible=False, elem_id="download")

        # gradio's preprocessing opens the picture and looks for the choice, and says in its own words what is wrong with them
        raw = {"preprocess": False, **one}
        seen = {"fn": page.look, "inputs": [picture, memory], "outputs": [caption, said, maps], **raw}
        seen["show_progress"] = "minimal"
        listed = {"fn": page.items, "inputs": memory, "outputs": [stored, download, answer, answer_said]}
        listed["api_visibility"] = "private"
        picture.change(**seen)
        for event in (write.click, sentence.submit):
            done = event(page.teach, [picture, sentence, memory], [memory, sentence], **raw)
            done.success(**listed).then(**seen)
        for event in (put.click, question.submit):
            event(page.ask, [question, memory], [answer, answer_said], show_progress="minimal", **one)
        done = drop.click(page.forget, [stored, memory], memory, **raw)
        done.success(**listed).then(**seen)
        take.upload(page.load, take, memory, **one).success(**listed).then(**seen)
        keep.click(page.save, memory, download, **one)
    return blocks


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT), metavar="FOLDER_OR_ID", help="default: this repo")
    parser.add_argument("--revision", default="main")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--share", action="store_true", help="a public address, through gradio's server")
    options = parser.parse_args(arguments)
    looks = {"theme": THEME, "css": CSS, "footer_links": [], "ssr_mode": False}
    try:
        model, processor = load(options.model, options.revision)
        if model.config.model_type != "microvlm":
            raise ValueError(f"{options.model} is a model of type {model.config.model_type}, not a MicroVLM.")
        blocks = build(model, processor)
        blocks.launch(server_port=options.port, share=options.share, show_error=True, max_file_size="200mb", **looks)
    except (OSError, ValueError, SafetensorError) as error:
        print(f"microvlm app: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
