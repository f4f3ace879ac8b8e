"""See where a model looks and what its memory holds.

    python visualize_hf.py pooling examples/swan.png --out pictures      # where each of the prefix tokens looks
    python visualize_hf.py words examples/*.png --out pictures           # where the words of a caption come from
    python visualize_hf.py words examples/*.png --contrast --out pictures    # where each looks more and less than the others
    python visualize_hf.py memory examples/swan.png --memory facts.safetensors --out pictures

A PNG per picture, named after it: swan_pooling.png, swan_words.png, swan_contrast.png, swan_memory.png; `memory` without pictures writes memory.png. With
--memory, `words` lets the memory speak and says how much every word took from it. Files are written under another name and renamed.

Exit code: 0; 1, something could not be read, written or found; 2, wrong arguments; 130, interrupted: what is written stays.
"""

import argparse
import math
import os
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError

from caption import find_pictures, load, replacing, thumbnail
from processing_microvlm import DEFAULT_MAX_PIXELS, open_image, to_rgb

ROOT = Path(__file__).resolve().parent
# from cold to hot, evenly spaced
HEAT = torch.tensor([(0, 0, 60), (50, 0, 150), (190, 30, 120), (250, 120, 20), (255, 240, 80)], dtype=torch.float32)

LESS, MORE = torch.tensor([(30, 110, 255), (255, 90, 0)], dtype=torch.float32)  # of a signed map


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


# ------------------------------------------------------------------------------------------------------------------ attention


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


# --------------------------------------------------------------------------------------------------------------------- memory


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


# -------------------------------------------------------------------------------------------------------------------- pictures


def heat(values: torch.Tensor) -> torch.Tensor:
    """Colours (..., 3) in [0, 255] of values in [0, 1]."""
    at = values.clamp(0, 1) * (len(HEAT) - 1)
    low = at.floor().long().clamp(max=len(HEAT) - 2)
    return torch.lerp(HEAT[low], HEAT[low + 1], (at - low).unsqueeze(-1))


def overlay(picture: Image.Image, map: torch.Tensor, size: tuple[int, int] | None = None) -> Image.Image:
    """A heat map over the picture it belongs to, RGB: the hottest patch is yellow, the coldest a dim grey picture.

    Args:
        map: not negative, (h, w), over the whole picture; stretched from its least to its greatest value, a flat map is cold.
        size: of the result, (width, height) in pixels; default: the picture's.

    Raises:
        ValueError: a map that is not (h, w), is negative or not finite.
    """
    map = _checked(map)
    if (map < 0).any():
        raise ValueError("a map must not be negative: overlay_signed takes such.")
    low, high = map.aminmax()
    map = (map - low) / (high - low) if high > low else torch.zeros_like(map)
    return _paint(picture, map, lambda map: heat(0.3 + 0.7 * map), size)


def overlay_signed(
    picture: Image.Image, map: torch.Tensor, most: float, size: tuple[int, int] | None = None
) -> Image.Image:
    """A signed map over the picture it belongs to, RGB: orange where it is positive, blue where negative, grey where 0.

    Args:
        map: (h, w), over the whole picture.
        most: the value, of either sign, from which the colour is full; several maps with the same one can be compared.
        size: of the result, (width, height) in pixels; default: the picture's.

    Raises:
        ValueError: a map that is not (h, w) or not finite.
    """
    map = _checked(map)
    map = map / most if most else map
    return _paint(picture, map, lambda map: torch.where(map.unsqueeze(-1) > 0, MORE, LESS), size)


def _checked(map: torch.Tensor) -> torch.Tensor:
    """A finite map (h, w), float32 on the CPU."""
    if map.ndim != 2 or not map.numel():
        raise ValueError(f"a map has the shape (h, w), got {tuple(map.shape)}.")
    map = map.detach().float().cpu()
    if not torch.isfinite(map).all():
        raise ValueError("a map must be finite.")
    return map


def _paint(picture: Image.Image, map: torch.Tensor, colours, size: tuple[int, int] | None) -> Image.Image:
    """A dim grey picture, and over it the colours (height, width, 3) of a map, the stronger the farther from 0, full from 1 and -1."""
    picture = to_rgb(picture, max(DEFAULT_MAX_PIXELS, picture.width * picture.height))
    picture = picture.resize(size, Image.Resampling.BICUBIC) if size else picture
    # bilinear: a patch is hottest in its middle, and nothing overshoots
    map = F.interpolate(map[None, None], (picture.height, picture.width), mode="bilinear")[0, 0]
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(picture.height, picture.width, 3)
    dim = 0.55 * pixels.float().mean(-1, keepdim=True) + 30
    share = 0.85 * map.abs().clamp(max=1).unsqueeze(-1)
    mixed = (1 - share) * dim + share * colours(map)
    return Image.frombytes("RGB", picture.size, mixed.round().clamp(0, 255).byte().numpy().tobytes())


CELL, TEXT, GAP = 150, 34, 8  # pixels: side of a picture, height of the text below it, space between


def sheet(cells: list[tuple[Image.Image, str]], columns: int, cell: int = CELL) -> Image.Image:
    """Pictures in rows, each with a label of one or two lines below it."""
    font, columns = ImageFont.load_default(size=13), min(columns, len(cells))
    rows = -(-len(cells) // columns)
    size = columns * (cell + GAP) + GAP, rows * (cell + TEXT + GAP) + GAP
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    for number, (picture, label) in enumerate(cells):
        row, column = divmod(number, columns)
        x, y = GAP + column * (cell + GAP), GAP + row * (cell + TEXT + GAP)
        small = thumbnail(picture, cell)
        page.paste(small, (x + (cell - small.width) // 2, y + cell - small.height))
        lines = [line if len(line) <= cell // 6 else f"{line[: cell // 6 - 3]}..." for line in label.split("\n")[:2]]
        draw.multiline_text((x, y + cell + 2), "\n".join(lines), fill="black", font=font, spacing=2)
    return page


def pooling_figure(picture: Image.Image, maps: torch.Tensor) -> Image.Image:
    """The picture, the mean of all maps and every query's map (P, h, w), on one sheet. Below the mean, how far the queries are apart: the
    share of its attention that a query puts elsewhere than the mean does, on average; 0 where all look alike.
    """
    small, mean = thumbnail(to_rgb(picture), CELL), maps.mean(0)
    apart = (maps - mean).abs().sum((1, 2)).mean() / 2
    cells = [(small, "picture"), (overlay(small, mean), f"mean of {len(maps)}\n{apart:.1%} apart")]
    return sheet(cells + [(overlay(small, m), f"token {i}") for i, m in enumerate(maps)], 9)


def word_figure(picture: Image.Image, attention: WordAttention) -> Image.Image:
    """The picture and every word's map, on one sheet; below a word, how much attention went to the picture and to the memory."""
    small, cells = thumbnail(to_rgb(picture), CELL), []
    for word, m, prefix, recalled in zip(attention.words, attention.maps, attention.prefix, attention.memory):
        share = f"picture {float(prefix.sum()):.0%}" + (f", memory {float(recalled):.0%}" if recalled else "")
        cells.append((overlay(small, m), f"{word}\n{share}"))
    return sheet([(small, "picture"), *cells], 6)


def contrast_figure(picture: Image.Image, attention: WordAttention) -> Image.Image:
    """The picture, and for every word where it looks more (orange) and less (blue) than the caption's words on average, in one scale for
    the caption; below a word, the share of its attention that lies elsewhere than the mean's.
    """
    small, maps = thumbnail(to_rgb(picture), CELL), attention.contrast()
    most = float(maps.abs().max()) if len(maps) else 0.0
    shares = maps.clamp(min=0).sum((1, 2)).tolist()
    words = zip(attention.words, maps, shares)
    cells = [(overlay_signed(small, m, most), f"{word}\n{share:.1%} elsewhere") for word, m, share in words]
    return sheet([(small, "orange: more than the\nmean word, blue: less"), *cells], 6)


NAMES = 24  # as many as fit beside an axis


def memory_figure(
    model, processor, memory, pixel_values: torch.Tensor | None = None, picture: Image.Image | None = None
) -> Image.Image:
    """A memory of one row: what its K slots hold, at which slots the items lie, how alike the items are; with a query picture (1, 3,
    height, width) also the cosine and the share of the NAMES most alike items, and whether the memory speaks. Of more than NAMES items, every
    second, third, ... is named. Needs matplotlib.

    Args:
        pixel_values: of the query.
        picture: the query, to be shown.

    Raises:
        ValueError: a memory of another model or of several rows, or more than one query.
    """
    from matplotlib.figure import Figure

    items = stored_sentences(memory, processor)
    model._check_memory(memory)
    names = [textwrap.shorten(f"{i} {text}", 30, placeholder="...") for i, text in enumerate(items)]
    addresses = memory.addresses[0][memory.active[0]].float().cpu()  # (N, K)
    K, S = memory.mean.shape[1], model.config.memory_config.num_content_slots
    norms = memory.mean[0].view(K, S, -1).norm(dim=-1).float().cpu()

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    (slots, at), (alike, query) = figure.subplots(2, 2)
    shown = slots.imshow(norms.mT, aspect="auto", cmap="magma", interpolation="nearest")
    slots.set(title="What the slots hold: length of the mean", xlabel=f"slot (K = {K})", ylabel=f"content slot ({S})")
    figure.colorbar(shown, ax=slots)
    named = range(0, len(items), -(-len(items) // NAMES) or 1)
    for axes in (at, alike):
        axes.set_yticks(named, [names[i] for i in named], fontsize=8, parse_math=False)
    query.set_yticks([])
    at.set(title="At which slots the items lie: addresses", xlabel=f"slot (K = {K})")
    alike.set(title="How alike the items are: cosine of addresses", xlabel="item")
    query.set(title="No query", xlabel="cosine and share")
    if items:
        top = float(addresses.abs().max())
        shown = at.imshow(addresses, aspect="auto", cmap="RdBu_r", vmin=-top, vmax=top, interpolation="nearest")
        figure.colorbar(shown, ax=at)
        similarity = F.normalize(addresses, dim=-1) @ F.normalize(addresses, dim=-1).mT
        shown = alike.imshow(similarity, aspect="auto", cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        alike.set_xticks(named)
        alike.tick_params("x", labelsize=8, labelrotation=90)
        figure.colorbar(shown, ax=alike)
    if pixel_values is not None:
        pixel_values = check_pixels(model, pixel_values)
        if len(pixel_values) != 1:
            raise ValueError(f"one picture is shown at a time, got {len(pixel_values)}.")
        image = model.get_image_features(pixel_values, return_dict=True)
        said = recall(model, processor, memory, model.default_prompt(1), image)
        most = said.cosines.topk(min(NAMES, len(items))).indices.sort().values
        places = torch.arange(len(most))
        query.barh(places - 0.2, said.cosines[most], 0.4, label="cosine with the query")
        query.barh(places + 0.2, said.shares[most], 0.4, label="share in what is read")
        query.set_yticks(places, [names[i] for i in most], fontsize=8, parse_math=False)
        query.set_ylim(len(most) - 0.4, -0.6)
        query.set_xlabel(f"cosine and share{'' if len(most) == len(items) else f', {len(most)} most alike'}")
        query.set_xlim(right=1.5)  # room for the picture
        query.set_title(
            f"The memory {'speaks' if said.speaks else 'is silent'}: probability {said.probability:.2f}, "
            f"threshold {said.threshold:.2f}"
        )
        query.axvline(0, color="black", linewidth=0.5)
        if items:
            query.legend(fontsize=8, loc="lower right")
        if picture is not None:
            inset = query.inset_axes((0.76, 0.6, 0.22, 0.38))
            inset.imshow(thumbnail(to_rgb(picture), 150))
            inset.set_axis_off()
    data = BytesIO()
    figure.savefig(data, format="png", dpi=90)
    return Image.open(data).convert("RGB")


def save_png(picture: Image.Image, path: str | os.PathLike, colors: int | None = None) -> None:
    """Write a PNG, under another name first; with so many colours at most, which makes it small."""
    with replacing(os.fspath(path), "wb") as file:
        (picture if colors is None else picture.quantize(colors)).save(file, "PNG", optimize=True)


# ---------------------------------------------------------------------------------------------------------------- command line


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["pooling", "words", "memory"])
    parser.add_argument("pictures", nargs="*", metavar="PICTURE", help="pictures, folders, globs or URLs")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the PNG files, made if need be")
    parser.add_argument("--model", default=str(ROOT), metavar="FOLDER_OR_ID", help="default: this repo")
    parser.add_argument("--revision", default="main")
    parser.add_argument("--memory", metavar="FILE", help="of teach.py, app.py or MemoryState.save")
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
    paths, missing = find_pictures(options.pictures)
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
    print(f"visualize_hf.py: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
