"""Caption images, store facts, answer questions: what every front end calls."""

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import TextIteratorStreamer

from .model import PIXEL_LIMIT, MemoryState, open_image, require

MAX_NEW_TOKENS, MAX_SECONDS = 32, 60


@dataclass
class Caption:
    """The result for one image: either `text` and `image` (RGB), or `error`."""

    path: str
    text: str | None = None
    error: str | None = None
    image: Image.Image | None = None


@dataclass
class Answer:
    """The answer to one image or question, and the probability that the memory knows it."""

    text: str
    scope: float | None = None


@dataclass
class Query:
    """A prompt: its tokens (1, T), and for an image its pixels (1, 3, H, W) and features of `get_image_features`."""

    input_ids: torch.Tensor
    pixel_values: torch.Tensor | None = None
    image: Any = None

    def inputs(self) -> dict[str, Any]:
        """Give what `generate` takes; the image is not encoded again."""
        encoded = {} if self.image is None else {"mm_encoder_outputs": {"image": self.image}}
        return {"input_ids": self.input_ids} | encoded


def chat_inputs(processor, text: str, images: Iterable[Image.Image | None] = (None,), chat_template=None):
    """Tokenize a user's text in the chat template once for each image, which stands before it."""
    pictures = ([] if image is None else [{"type": "image", "image": image}] for image in images)
    contents = ([*picture, {"type": "text", "text": text}] for picture in pictures)
    return processor.apply_chat_template(
        [[{"role": "user", "content": content}] for content in contents],
        chat_template=chat_template,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )


@torch.no_grad()
def image_query(model, processor, image: Image.Image) -> Query:
    """Encode an image with the model's own prompt."""
    pixel_values = processor.image_processor([image], return_tensors="pt")["pixel_values"]
    pixel_values = pixel_values.to(model.device, model.dtype)
    return Query(model.default_prompt(1), pixel_values, model.get_image_features(pixel_values, return_dict=True))


def question_query(model, processor, question: str) -> Query:
    """Encode a question in words."""
    return Query(chat_inputs(processor, question)["input_ids"].to(model.device))


def caption(
    model, processor, paths: Iterable[str], prompt: str | None = None, batch_size: int = 8, **generate_kwargs
) -> Iterator[Caption]:
    """Caption images in batches; no more than one batch is in memory.

    Args:
        model: any image-text-to-text model; without `prompt` one that has a `default_prompt`.
        paths: paths or URLs, opened when their batch comes.
        prompt: what to ask about every image, through the chat template; default: the model's own prompt.
        generate_kwargs: for `generate`, such as `max_new_tokens` and `num_beams`.

    Returns:
        One `Caption` per path in their order, with an `error` where an image cannot be opened.
    """
    kind, has_prompt = type(model).__name__, prompt is not None or hasattr(model, "default_prompt")
    require(has_prompt, f"{kind} has no default prompt: give one (--prompt 'Describe the picture.').")
    if prompt is not None:
        chat_inputs(processor, prompt)  # what the template refuses: a generator would check too late
    return _caption(model, processor, paths, prompt, batch_size, generate_kwargs)


def _caption(model, processor, paths, text, batch_size, generate_kwargs) -> Iterator[Caption]:
    pixel_limit = getattr(processor.image_processor, "pixel_limit", PIXEL_LIMIT)
    # collect readable images until a batch is full; what cannot be opened keeps its place
    batch, images = [], 0
    for path in paths:
        try:
            batch.append(Caption(path, image=open_image(path, pixel_limit)))
            images += 1
        except (OSError, ValueError, MemoryError) as error:
            batch.append(Caption(path, error=str(error) or f"{path} needs more memory than there is."))
        if images == batch_size:
            yield from _caption_batch(model, processor, batch, text, generate_kwargs)
            batch, images = [], 0
    yield from _caption_batch(model, processor, batch, text, generate_kwargs)


def _caption_batch(model, processor, batch: list[Caption], text, generate_kwargs) -> list[Caption]:
    readable = [result for result in batch if result.error is None]
    if not readable:
        return batch
    # the prompt: the model's own, or the same text for every image
    if text is None:
        inputs = processor.image_processor([result.image for result in readable], return_tensors="pt")
        start = model.default_prompt(1).shape[1]
    else:
        inputs = chat_inputs(processor, text, [result.image for result in readable])
        start = inputs["input_ids"].shape[1]
    # the new tokens as text
    output = model.generate(**inputs.to(model.device, model.dtype), **generate_kwargs)
    for result, words in zip(readable, processor.batch_decode(output[:, start:], skip_special_tokens=True)):
        result.text = words.strip()
    return batch


def teach(model, processor, image: str, sentence: str, memory: MemoryState | None = None) -> MemoryState:
    """Store a sentence under an image (a path or URL); returns the new memory."""
    plain = processor.image_token + "{{ messages[0].content[1].text }}"  # a template without turns
    inputs = chat_inputs(processor, sentence, [open_image(image)], chat_template=plain)
    return model.write_memory(memory, **inputs.to(model.device, model.dtype), labels=[sentence])


@torch.inference_mode()
def ask(model, processor, what: str, memory: MemoryState | None = None) -> Answer:
    """Answer a question, which ends in a question mark, or caption the image at a path or URL."""
    # a question in words, or an image with the model's own prompt
    is_question = what.endswith("?")
    query = question_query(model, processor, what) if is_question else image_query(model, processor, open_image(what))
    readout, scope = {}, None
    if memory is not None:
        # read once, for the scope and for the answer
        readout = {"memory_readout": model.ask_memory(memory, "auto", query.input_ids, None, query.image, kl=False)}
        scope = float(readout["memory_readout"].scope_logits.sigmoid())
    ids = model.generate(**query.inputs(), **readout, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    text = processor.decode(ids[0, query.input_ids.shape[1] :], skip_special_tokens=True)
    return Answer(text.strip(), scope)


def stream(model, processor, query: Query, readout=None) -> Iterator[tuple[str, list[int]]]:
    """Yield an answer as it grows, and with the last piece its tokens; `readout` is what a memory adds to it."""
    closed = threading.Event()
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    options = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False, "streamer": streamer, "max_time": MAX_SECONDS}
    options["stopping_criteria"] = [lambda *_: closed.is_set()]
    # generate in a thread, read its pieces here
    with ThreadPoolExecutor(1) as pool, ExitStack() as stack:
        stack.callback(closed.set)  # also when nobody reads on
        future = pool.submit(model.generate, **query.inputs(), memory_readout=readout, **options)
        future.add_done_callback(lambda _: streamer.end())  # after an error too
        text = ""
        for piece in streamer:
            text += piece
            yield text.strip(), []
        yield text.strip(), future.result()[0, query.input_ids.shape[1] :].tolist()
