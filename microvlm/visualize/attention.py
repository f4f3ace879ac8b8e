"""Read where a model looks: pooling attention, words, memory."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch

from ..inference import MAX_NEW_TOKENS
from ..model import require


@dataclass
class WordAttention:
    """Where the W words of one caption look; what is missing from 1 went to text.

    Args:
        words: joined from their tokens.
        maps: over the patches, each sums to 1, (W, h, w).
        prefix: on the P prefix tokens, (W, P): means over layers, heads and a word's tokens.
        memory: on the memory's tokens, (W,); 0 where the memory is silent.
    """

    words: list[str]
    maps: torch.Tensor
    prefix: torch.Tensor
    memory: torch.Tensor

    def contrast(self) -> torch.Tensor:
        """Subtract the mean map of the caption's words from each word's map, (W, h, w)."""
        return self.maps - self.maps.mean(0)


@dataclass
class Recall:
    """What one memory answers to one image or question.

    Args:
        items: the stored sentences, N.
        cosines: of the addresses, or for a question in words how much of it an item says, (N,).
        shares: of every item in what was read, (N,).
        probability: that the memory knows the query; it speaks from `threshold` on.
        readout: `memory_readout` of `generate`.
    """

    items: list[str]
    cosines: torch.Tensor
    shares: torch.Tensor
    probability: float
    threshold: float
    speaks: bool
    readout: Any = None


def grid(patches: int, pixel_values: torch.Tensor) -> tuple[int, int]:
    """Compute the rows and columns of square patches in images (B, 3, height, width)."""
    height, width = pixel_values.shape[2:]
    rows = round(math.sqrt(patches * height / width))
    return rows, patches // rows


def encode(model, pixel_values: torch.Tensor):
    """Encode images; returns features and the prefix tokens' maps, (B, P, h, w) float32."""
    pixel_values = pixel_values.to(model.device, model.dtype)
    image = model.get_image_features(pixel_values, return_dict=True, output_attentions=True)
    maps = image.pooling_attentions.float().mean(1)  # (B, P, patches)
    return image, maps.unflatten(-1, grid(maps.shape[-1], pixel_values))


@torch.no_grad()
def pooling_attention(model, pixel_values: torch.Tensor) -> torch.Tensor:
    """Map where each of the adapter's P queries looks, (B, P, h, w): means of the heads that sum to 1."""
    return encode(model, pixel_values)[1]


def eager_copy(model):
    """Copy a model so that its language model returns its attention; the weights and all else are the same objects.

    The model itself stays as it is: another thread may use it meanwhile.
    """
    text, part = model.model.language_model, model.model
    laid_out = [module._matrix for module in text.modules() if hasattr(module, "_matrix")]  # of packed weights
    same = [*text.parameters(), *text.buffers(), *laid_out, *model.children(), *part.children()]
    twin = copy.deepcopy(model, {id(x): x for x in same if x is not text and x is not part})
    twin.model.language_model.set_attn_implementation("eager")
    return twin


@torch.no_grad()
def word_attention(model, processor, pixel_values: torch.Tensor, ids=None, memory=None) -> list[WordAttention]:
    """Map where every word of a caption looks, in one pass over the whole caption.

    A word's map is the attention on the prefix tokens where the word is predicted, times the prefix tokens' own maps.

    Args:
        pixel_values: (B, 3, height, width), of the image processor.
        ids: tokens of B captions after the default prompt; special tokens are left out. Default: generated, greedily.
        memory: speaks by its gate; default: none.
    """
    prompt = model.default_prompt(len(pixel_values))
    image, pooling = encode(model, pixel_values)
    inputs = {"mm_encoder_outputs": {"image": image}, "memory": memory}
    if ids is None:
        ids = model.generate(input_ids=prompt, **inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        ids = ids[:, prompt.shape[1] :].tolist()
    special = {*processor.tokenizer.all_special_ids, model.config.image_token_id}
    captions = [[i for i in caption if i not in special] for caption in ids]
    # prompt and captions as one batch; padding is to the right and nobody attends to it
    padded = prompt.new_zeros(len(captions), max(map(len, captions)))
    for row, caption in zip(padded, captions):
        row[: len(caption)] = torch.tensor(caption, dtype=row.dtype)
    input_ids = torch.cat([prompt, padded[:, :-1]], 1)
    model = eager_copy(model)
    outputs = model(input_ids=input_ids, **inputs, use_cache=False, output_attentions=True, logits_to_keep=1)
    attention = sum(layer.float().mean(1) for layer in outputs.attentions) / len(outputs.attentions)  # (B, T, T + S)
    # from the positions that predict the caption, to the memory (B, L) and to the prefix tokens (B, L, P)
    attention = attention[:, prompt.shape[1] - 1 :]
    to_memory = attention[:, :, input_ids.shape[1] :].sum(-1)
    to_prefix = attention[:, :, : prompt.shape[1]][:, :, prompt[0] == model.config.image_token_id]
    return [
        join_words(split_words(processor.tokenizer, caption), *tensors)
        for caption, *tensors in zip(captions, to_prefix, to_memory, pooling)
    ]


def join_words(words: list[tuple[str, list[int]]], prefix, memory, pooling) -> WordAttention:
    """Average the attention of each word's tokens: on prefix (L, P), memory (L,), by maps `pooling` (P, h, w)."""
    places = [places for _, places in words]
    prefix, memory = (torch.stack([x[p].mean(0) for p in places]) if places else x[:0] for x in (prefix, memory))
    maps = torch.einsum("wp,phv->whv", prefix, pooling)
    maps = maps / maps.sum((1, 2), keepdim=True)
    return WordAttention([word for word, _ in words], maps.cpu(), prefix.cpu(), memory.cpu())


def split_words(tokenizer, ids: list[int]) -> list[tuple[str, list[int]]]:
    """Split a caption's tokens into words, which begin with a space, with the places of their tokens."""
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
    """List what a memory of one row holds, in the order in which `forget` counts."""
    require(memory.num_rows == 1, f"the memory has {memory.num_rows} rows, choose one: memory.select([row]).")
    ids = [ids[ids >= 0].tolist() for ids in memory.token_ids[0][memory.active[0]]]
    return [processor.decode(i, skip_special_tokens=True).strip() for i in ids]


@torch.no_grad()
def recall(model, processor, memory, input_ids: torch.Tensor, image=None) -> Recall:
    """Read a memory of one row with a prompt (1, T), about an image of `get_image_features` or in words."""
    items, part = stored_sentences(memory, processor), model.model
    # what the model reads, and what it takes from each item
    query = part.get_memory_query(input_ids, None, None if image is None else image.last_hidden_state)
    readout = part.read_memory(memory, query)
    read, address = part.memory.read(memory, query)
    # addresses for an image, words for a question
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
        readout=readout,
    )
