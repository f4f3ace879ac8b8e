"""Read where a model looks: pooling attention, words, memory."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass
class WordAttention:
    """Where the words of one caption look: W words, P prefix tokens, h x w patches.

    Args:
        words: the caption in words, joined from their tokens.
        maps: over the patches, each sums to 1, (W, h, w).
        prefix: attention on the prefix tokens, (W, P): means over layers, heads and a word's tokens.
        memory: attention on the memory's tokens, (W,); 0 where the memory is silent. What is missing from 1 went to text.
    """

    words: list[str]
    maps: torch.Tensor
    prefix: torch.Tensor
    memory: torch.Tensor

    def contrast(self) -> torch.Tensor:
        """How much more of its attention a word gives to a patch than the caption's words do on average, (W, h, w): over the patches a map
        sums to 0, and over the words a patch does. A word's sum of what is positive is the share of its attention that lies elsewhere than the mean's.
        """
        return self.maps - self.maps.mean(0)


@dataclass
class Recall:
    """What one memory says to one picture or question.

    Args:
        items: the stored sentences, N.
        cosines: of the query with every item, (N,): of the addresses, or for a question in words how much of it the item says.
        shares: of every item in what was read, (N,).
        probability: ScopeNet's, that the memory knows the query.
        threshold: from which the memory speaks.
        speaks: whether it does.
    """

    items: list[str]
    cosines: torch.Tensor
    shares: torch.Tensor
    probability: float
    threshold: float
    speaks: bool


def check_pixels(model, pixel_values: torch.Tensor) -> torch.Tensor:
    if not isinstance(pixel_values, torch.Tensor) or pixel_values.ndim != 4 or not len(pixel_values):
        shape = tuple(pixel_values.shape) if isinstance(pixel_values, torch.Tensor) else type(pixel_values).__name__
        raise ValueError(f"pixel_values must have the shape (pictures, 3, height, width), got {shape}.")
    return pixel_values.to(model.device, model.dtype)


def grid(patches: int, pixel_values: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of the patches of pictures (B, 3, height, width): patches, or places of a convnet's map, are square."""
    height, width = pixel_values.shape[2:]
    rows = round(math.sqrt(patches * height / width))
    return rows, patches // rows


def _look(model, pixel_values: torch.Tensor):
    """The encoded pictures, and what each prefix token sees of the patches, (B, P, h, w) float32."""
    image = model.get_image_features(pixel_values, return_dict=True, output_attentions=True)
    maps = image.pooling_attentions.float().mean(1)  # (B, P, patches)
    return image, maps.unflatten(-1, grid(maps.shape[-1], pixel_values))


@torch.no_grad()
def pooling_attention(model, pixel_values: torch.Tensor) -> torch.Tensor:
    """Where each of the adapter's P queries looks, (B, P, h, w) float32: the mean of its heads; every map sums to 1.

    Args:
        pixel_values: (B, 3, height, width), of the image processor.

    Raises:
        ValueError: pixel values of another shape.
    """
    return _look(model, check_pixels(model, pixel_values))[1]


@contextmanager
def eager_attention(model) -> Iterator[None]:
    """The language model gives its attention in here; afterwards it runs as before."""
    text = model.model.language_model
    before = text.config._attn_implementation
    text.set_attn_implementation("eager")
    try:
        yield
    finally:
        text.set_attn_implementation(before)


@torch.no_grad()
def word_attention(
    model, processor, pixel_values: torch.Tensor, ids: list[list[int]] | None = None, memory=None, max_new_tokens=32
) -> list[WordAttention]:
    """Where every word of a caption looks: the attention from the position that predicts it over the prefix tokens, means over layers,
    heads and the word's tokens, times what these tokens saw of the patches. One pass over the whole caption.

    Args:
        pixel_values: (B, 3, height, width), of the image processor.
        ids: tokens of the captions, behind the default prompt, a list or a row of a tensor per picture; special tokens are left out.
            Default: generated, greedily.
        memory: lets it speak, by its gate; default: none.
        max_new_tokens: of a generated caption.

    Returns:
        One per picture; a caption without words has none.

    Raises:
        ValueError: pixel values of another shape, not one caption per picture, tokens outside the vocabulary, or a memory of another model.
    """
    pixel_values = check_pixels(model, pixel_values)
    B, prompt = len(pixel_values), model.default_prompt(len(pixel_values))
    image, pooling = _look(model, pixel_values)
    inputs = {"mm_encoder_outputs": {"image": image}, "memory": memory}
    if ids is None:
        ids = model.generate(input_ids=prompt, **inputs, max_new_tokens=max_new_tokens, do_sample=False)
        ids = ids[:, prompt.shape[1] :]
    if len(ids) != B:
        raise ValueError(f"{len(ids)} captions for {B} pictures.")
    captions, V = [], model.config.text_config.vocab_size
    special = {*processor.tokenizer.all_special_ids, model.config.image_token_id}
    for caption in ids:
        caption = caption.tolist() if isinstance(caption, torch.Tensor) else list(caption)
        if any(not isinstance(i, int) or not 0 <= i < V for i in caption):
            raise ValueError(f"a caption has tokens outside the vocabulary of {V}.")
        captions.append([i for i in caption if i not in special])

    longest = max(len(caption) for caption in captions)
    padded = prompt.new_zeros(B, longest)
    for row, caption in zip(padded, captions):
        row[: len(caption)] = torch.tensor(caption, dtype=row.dtype)
    input_ids = torch.cat([prompt, padded[:, :-1]], 1)  # padding is to the right, behind all that is asked for
    with eager_attention(model):
        outputs = model(input_ids=input_ids, **inputs, use_cache=False, output_attentions=True, logits_to_keep=1)
    attention = sum(layer.float().mean(1) for layer in outputs.attentions) / len(outputs.attentions)  # (B, T, T + S)
    attention = attention[:, prompt.shape[1] - 1 :]
    of_memory = attention[:, :, input_ids.shape[1] :].sum(-1)
    of_prefix = attention[:, :, : prompt.shape[1]][:, :, prompt[0] == model.config.image_token_id]  # (B, L, P)

    found = []
    for caption, prefix, recalled, maps in zip(captions, of_prefix, of_memory, pooling):
        words = split_words(processor.tokenizer, caption)
        places = [places for _, places in words]
        mean = lambda x: torch.stack([x[p].mean(0) for p in places]) if places else x[:0]  # noqa: B023, E731
        prefix, recalled = mean(prefix), mean(recalled)
        looks = torch.einsum("wp,phv->whv", prefix, maps)
        looks = looks / looks.sum((1, 2), keepdim=True)
        found.append(WordAttention([word for word, _ in words], looks.cpu(), prefix.cpu(), recalled.cpu()))
    return found


def split_words(tokenizer, ids: list[int]) -> list[tuple[str, list[int]]]:
    """The words of a caption's tokens, each with the places of its tokens; a token that begins with a space begins a word."""
    words, before = [], ""
    for place in range(len(ids)):
        text = tokenizer.decode(ids[: place + 1])
        new = text[len(before) :]
        if not words or new[:1].isspace() or before[-1:].isspace():
            words.append([len(before), []])
        words[-1][1].append(place)
        before = text
    ends = [start for start, _ in words[1:]] + [len(before)]
    return [(before[start:end].strip(), places) for (start, places), end in zip(words, ends)]


def stored_sentences(memory, processor) -> list[str]:
    """What a memory of one row holds, in the order in which `forget` counts.

    Raises:
        ValueError: a memory of several rows.
    """
    if memory.num_rows != 1:
        raise ValueError(f"the memory has {memory.num_rows} rows, one is shown at a time: memory.select([row]).")
    ids = [ids[ids >= 0].tolist() for ids in memory.token_ids[0][memory.active[0]]]
    return [processor.decode(i, skip_special_tokens=True).strip() for i in ids]


@torch.no_grad()
def recall(model, processor, memory, input_ids: torch.Tensor, image=None) -> Recall:
    """What a memory of one row says to a prompt.

    Args:
        input_ids: (1, T), with a picture's placeholders or a question in words.
        image: of `get_image_features`; default: no picture.

    Raises:
        ValueError: a memory of another model or of several rows.
    """
    items, part = stored_sentences(memory, processor), model.model
    model._check_memory(memory)
    query = part.get_memory_query(input_ids, None, None if image is None else image.last_hidden_state)
    readout = part.read_memory(memory, query)
    read, address = part.memory.read(memory, query)
    if query.words is None:
        cosines = memory.similarity(address.to(memory.device, memory.mean.dtype))
    else:
        cosines = part.memory.match(memory, query.words.unsqueeze(0), query.weights.unsqueeze(0))
    on = memory.active[0].cpu()
    return Recall(
        items=items,
        cosines=cosines[0, 0].float().cpu()[on],
        shares=read.coefficients[0, 0].float().cpu()[on],
        probability=float(readout.scope_logits.sigmoid()),
        threshold=float(part.scope_threshold(memory, bool(query.by_words))),
        speaks=bool(readout.log_gate > -torch.inf),
    )
