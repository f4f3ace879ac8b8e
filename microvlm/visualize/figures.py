"""Draw attention and memory of RGB images as images."""

import textwrap
from io import BytesIO

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from ..images import thumbnail
from ..inference import image_query
from .attention import Recall, WordAttention, recall, stored_sentences

CELL, TEXT, GAP = 150, 34, 8  # pixels: side of an image, height of the text below it, space between
NAMES = 24  # that fit along an axis
# from cold to hot, evenly spaced
HEAT = torch.tensor([(0, 0, 60), (50, 0, 150), (190, 30, 120), (250, 120, 20), (255, 240, 80)], dtype=torch.float32)
LESS, MORE = torch.tensor([(30, 110, 255), (255, 90, 0)], dtype=torch.float32)  # of a signed map


def heat(values: torch.Tensor) -> torch.Tensor:
    """Compute colours (..., 3) in [0, 255] of values in [0, 1]."""
    at = values.clamp(0, 1) * (len(HEAT) - 1)
    low = at.floor().long().clamp(max=len(HEAT) - 2)
    return torch.lerp(HEAT[low], HEAT[low + 1], (at - low).unsqueeze(-1))


def overlay(image: Image.Image, map: torch.Tensor) -> Image.Image:
    """Draw a heat map over its image: the hottest patch yellow, the coldest dim grey.

    The map (h, w) is not negative; it is stretched from its least to its greatest value, a flat map is cold.
    """
    low, high = map.aminmax()
    map = (map - low) / (high - low) if high > low else torch.zeros_like(map)
    return paint(image, map, lambda map: heat(0.3 + 0.7 * map))


def overlay_signed(image: Image.Image, map: torch.Tensor, limit: float) -> Image.Image:
    """Draw a signed map (h, w) over its image: orange above 0, blue below, grey at 0.

    Maps with the same `limit`, the absolute value with the full colour, can be compared.
    """
    return paint(image, map / limit if limit else map, lambda map: torch.where(map.unsqueeze(-1) > 0, MORE, LESS))


def paint(image: Image.Image, map: torch.Tensor, colours) -> Image.Image:
    """Lay the colours of a map over a dim grey image: full at 1 and -1, none at 0."""
    # bilinear: a patch is hottest in its middle, and nothing overshoots
    map = F.interpolate(map.float().cpu()[None, None], (image.height, image.width), mode="bilinear")[0, 0]
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
    dim = 0.55 * pixels.float().mean(-1, keepdim=True) + 30
    share = 0.85 * map.abs().clamp(max=1).unsqueeze(-1)
    mixed = (1 - share) * dim + share * colours(map)
    return Image.frombytes("RGB", image.size, mixed.round().clamp(0, 255).byte().numpy().tobytes())


class Sheet:
    """A page of `count` cells in rows: a small image, and a label below it that is cut at the cell's edges."""

    def __init__(self, count: int, columns: int, cell: int = CELL, text: int = TEXT, gap: int = GAP):
        self.columns, self.cell, self.text, self.gap, self.number = min(count, columns), cell, text, gap, 0
        rows, self.font = -(-count // self.columns), ImageFont.load_default(size=13)
        size = self.columns * (cell + gap) + gap, rows * (cell + text + gap) + gap
        self.page = Image.new("RGB", size, "white")

    def add_cell(self, image: Image.Image | None, label: str, colour: str = "black") -> None:
        cell = Image.new("RGB", (self.cell, self.cell + self.text), "white")
        if image is not None:
            small = thumbnail(image, self.cell)
            cell.paste(small, ((self.cell - small.width) // 2, self.cell - small.height))
        draw = ImageDraw.Draw(cell)
        draw.multiline_text((0, self.cell + 2), label, fill=colour, font=self.font, spacing=2)
        # the next free place
        row, column = divmod(self.number, self.columns)
        self.number += 1
        place = column * (self.cell + self.gap), row * (self.cell + self.text + self.gap)
        self.page.paste(cell, (self.gap + place[0], self.gap + place[1]))


def sheet(cells: list[tuple[Image.Image, str]], columns: int) -> Image.Image:
    """Draw images in rows, each with a label of one or two lines below it."""
    page, width = Sheet(len(cells), columns), CELL // 6
    for image, label in cells:
        lines = [line if len(line) <= width else f"{line[: width - 3]}..." for line in label.split("\n")[:2]]
        page.add_cell(image, "\n".join(lines))
    return page.page


def pooling_figure(image: Image.Image, maps: torch.Tensor) -> Image.Image:
    """Draw the image, the mean of all maps and every query's map (P, h, w)."""
    small, mean = thumbnail(image, CELL), maps.mean(0)
    # the mean share of a query's attention that lies elsewhere than the mean's: 0 where all look alike
    apart = (maps - mean).abs().sum((1, 2)).mean() / 2
    cells = [(small, "picture"), (overlay(small, mean), f"mean of {len(maps)}\n{apart:.1%} apart")]
    return sheet(cells + [(overlay(small, m), f"token {i}") for i, m in enumerate(maps)], 9)


def word_figure(image: Image.Image, attention: WordAttention) -> Image.Image:
    """Draw the image and every word's map, labelled with the attention on image and memory."""
    small, cells = thumbnail(image, CELL), []
    for word, m, prefix, memory in zip(attention.words, attention.maps, attention.prefix, attention.memory):
        share = f"picture {float(prefix.sum()):.0%}" + (f", memory {float(memory):.0%}" if memory else "")
        cells.append((overlay(small, m), f"{word}\n{share}"))
    return sheet([(small, "picture"), *cells], 6)


def contrast_figure(image: Image.Image, attention: WordAttention) -> Image.Image:
    """Draw where every word looks more and less than the caption's words on average.

    All maps have one scale; a label says the share of a word's attention that lies elsewhere than the mean's.
    """
    small, maps = thumbnail(image, CELL), attention.contrast()
    limit = float(maps.abs().max()) if len(maps) else 0.0
    shares = maps.clamp(min=0).sum((1, 2)).tolist()
    words = zip(attention.words, maps, shares)
    cells = [(overlay_signed(small, m, limit), f"{word}\n{share:.1%} elsewhere") for word, m, share in words]
    return sheet([(small, "orange: more than the\nmean word, blue: less"), *cells], 6)


def memory_figure(model, processor, memory, image: Image.Image | None = None) -> Image.Image:
    """Draw a memory of one row: slots, addresses, their similarity, and what it answers to an image.

    Of many items every second, third, ... is named.
    """
    from matplotlib.figure import Figure

    items = stored_sentences(memory, processor)
    names = [textwrap.shorten(f"{i} {text}", 30, placeholder="...") for i, text in enumerate(items)]
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    (slots, places), (similarity, query) = figure.subplots(2, 2)
    # what the slots hold
    K, S = memory.mean.shape[1], model.config.memory_config.num_content_slots
    norms = memory.mean[0].view(K, S, -1).norm(dim=-1).float().cpu()
    figure.colorbar(slots.imshow(norms.mT, aspect="auto", cmap="magma", interpolation="nearest"), ax=slots)
    slots.set(title="What the slots hold: length of the mean", xlabel=f"slot (K = {K})", ylabel=f"content slot ({S})")
    # the items
    draw_items(figure, places, similarity, memory.addresses[0][memory.active[0]].float().cpu(), names)
    # the query
    query.set_yticks([])
    query.set(title="No query", xlabel="cosine and share")
    if image is not None:
        asked = image_query(model, processor, image)
        draw_query(query, recall(model, processor, memory, asked.input_ids, asked.image), names, image)
    data = BytesIO()
    figure.savefig(data, format="png", dpi=90)
    return Image.open(data).convert("RGB")


def draw_items(figure, places, similarity, addresses: torch.Tensor, names: list[str]) -> None:
    """Draw the addresses (N, K) of N items, and their cosines, each on its axes."""
    named = range(0, len(names), -(-len(names) // NAMES) or 1)
    for axes in (places, similarity):
        axes.set_yticks(named, [names[i] for i in named], fontsize=8, parse_math=False)
    places.set(title="At which slots the items lie: addresses", xlabel=f"slot (K = {addresses.shape[1]})")
    similarity.set(title="How alike the items are: cosine of addresses", xlabel="item")
    if not names:
        return
    unit, largest = F.normalize(addresses, dim=-1), float(addresses.abs().max())
    for axes, values, limit in ((places, addresses, largest), (similarity, unit @ unit.mT, 1)):
        drawn = axes.imshow(values, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        figure.colorbar(drawn, ax=axes)
    similarity.set_xticks(named)
    similarity.tick_params("x", labelsize=8, labelrotation=90)


def draw_query(axes, answer: Recall, names: list[str], image: Image.Image) -> None:
    """Draw the cosines and shares of the items most like an image, and whether the memory speaks."""
    top = answer.cosines.topk(min(NAMES, len(names))).indices.sort().values
    places = torch.arange(len(top))
    axes.barh(places - 0.2, answer.cosines[top], 0.4, label="cosine with the query")
    axes.barh(places + 0.2, answer.shares[top], 0.4, label="share in what is read")
    axes.set_yticks(places, [names[i] for i in top], fontsize=8, parse_math=False)
    axes.set_ylim(len(top) - 0.4, -0.6)
    axes.set_xlabel(f"cosine and share{'' if len(top) == len(names) else f', {len(top)} most alike'}")
    axes.set_xlim(right=1.5)  # room for the image
    state = "speaks" if answer.speaks else "is silent"
    axes.set_title(f"The memory {state}: probability {answer.probability:.2f}, threshold {answer.threshold:.2f}")
    axes.axvline(0, color="black", linewidth=0.5)
    if names:
        axes.legend(fontsize=8, loc="lower right")
    inset = axes.inset_axes((0.76, 0.6, 0.22, 0.38))
    inset.imshow(thumbnail(image, 150))
    inset.set_axis_off()
