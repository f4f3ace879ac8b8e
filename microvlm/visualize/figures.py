"""Draw attention and memory as images."""

import os
import textwrap
from io import BytesIO

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from ..files import atomic_file
from ..images import thumbnail
from ..model import DEFAULT_MAX_PIXELS, to_rgb
from .attention import WordAttention, check_pixels, recall, stored_sentences

CELL, TEXT, GAP = 150, 34, 8  # pixels: side of a picture, height of the text below it, space between
NAMES = 24  # as many as fit beside an axis
# from cold to hot, evenly spaced
HEAT = torch.tensor([(0, 0, 60), (50, 0, 150), (190, 30, 120), (250, 120, 20), (255, 240, 80)], dtype=torch.float32)
LESS, MORE = torch.tensor([(30, 110, 255), (255, 90, 0)], dtype=torch.float32)  # of a signed map


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
    with atomic_file(os.fspath(path), "wb") as file:
        (picture if colors is None else picture.quantize(colors)).save(file, "PNG", optimize=True)
