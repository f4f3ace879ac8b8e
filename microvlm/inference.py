"""Caption images, store facts and ask for them: what every front end calls."""

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from PIL import Image

from .model import DEFAULT_MAX_PIXELS, open_image

DTYPES = ("auto", "float32", "bfloat16", "float16")


def usable_device(text: str) -> str:
    try:
        torch.zeros(1, device=text).tolist()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise argparse.ArgumentTypeError(f"cannot use {text!r}: {reason}") from error
    return text


@dataclass
class Caption:
    """What became of one picture: either `text` and `picture` (RGB), or `error`."""

    path: str
    text: str | None = None
    error: str | None = None
    picture: Image.Image | None = None


def caption_images(
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
    return _caption_images(model, processor, paths, text, batch_size, generate_kwargs)


def _caption_images(model, processor, paths, text, batch_size, generate_kwargs) -> Iterator[Caption]:
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


def add(model, processor, memory, picture: str, sentence: str):
    """`memory` with the sentence under the picture's address."""
    text = processor.image_token + sentence
    inputs = processor(images=[open_image(picture)], text=[text], return_tensors="pt")
    return model.write_memory(memory, **inputs.to(model.device, model.dtype), labels=[sentence])


@torch.inference_mode()
def ask(model, processor, memory, what: list[str]) -> list[tuple[str, float | None]]:
    """Caption of every picture or answer to every question, with its scope probability."""
    answers = []
    for words in what:
        prompt, image, scope = model.default_prompt(1), None, None
        if words.endswith("?"):
            content = [{"type": "text", "text": words}]
            asked = [{"role": "user", "content": content}]
            how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
            prompt = processor.apply_chat_template(asked, **how)["input_ids"].to(model.device)
        else:
            pixel_values = processor.image_processor([open_image(words)], return_tensors="pt")["pixel_values"]
            # encoded once, for scope and caption
            image = model.get_image_features(pixel_values.to(model.device, model.dtype), return_dict=True)
        if memory is not None:
            features = None if image is None else image.last_hidden_state
            query = model.model.get_memory_query(prompt, None, features)
            scope = float(model.model.read_memory(memory, query).scope_logits.sigmoid())
        encoded = {} if image is None else {"mm_encoder_outputs": {"image": image}}
        ids = model.generate(input_ids=prompt, **encoded, memory=memory, max_new_tokens=32, do_sample=False)
        answers.append((processor.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True).strip(), scope))
    return answers


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)
