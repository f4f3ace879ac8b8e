"""Print scores as text, markdown and an HTML page."""

import html
import math
import re
from io import BytesIO

import torch
from PIL import Image

from ..data.rows import decode_row
from ..images import data_uri
from ..metrics import normalise, roc
from ..visualize.attention import pooling_attention, word_attention
from ..visualize.figures import overlay
from .captions import CAPTIONERS, NEW_TOKENS
from .memory import counted
from .retrieval import RANKS

CAPTION_LABELS = {
    "exact": "exact match",
    "word_f1": "word F1",
    "cider": "CIDEr",
    "bleu_1": "BLEU-1",
    "bleu_2": "BLEU-2",
    "bleu_3": "BLEU-3",
    "bleu_4": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "meteor": "METEOR",
    "distinct": "distinct",
}
LANGUAGE_LABELS = {
    "lm_loss": "loss, nats a token",
    "perplexity": "perplexity",
    "bits_per_byte": "bits a byte",
    "tokens": "tokens",
}
RETRIEVAL_LABELS = {
    **{
        f"{way}_recall_at_{k}": f"{name}, R@{k}"
        for way, name in (("image_to_text", "picture to text"), ("text_to_image", "text to picture"))
        for k in RANKS
    },
    "alignment_loss": "InfoNCE",
    "chance_loss": "InfoNCE of chance",
    "pairs": "pairs",
}
MEMORY_LABELS = {
    "recall_same": "recall, same picture",
    "recall_view": "recall, augmented view",
    "recall_words": "recall, in words",
    "recall_style": "recall, other style",
    "word_f1": "word F1, augmented view",
    "recall_no_memory": "recall without memory",
    "recall_nearest": "nearest neighbour, augmented view",
    "false_recall": "false recalls, unrelated",
    "unchanged": "unchanged, unrelated",
    "scope_accuracy": "scope accuracy",
    "scope_auroc": "scope AUROC",
    "scope_eer": "scope EER",
    "memory_kl": "memory KL",
    "address_kl": "address KL",
    "forgotten": "recall of the forgotten half",
    "kept": "recall of the kept half",
    "kept_before": "recall of the kept half, before",
    "questions": "questions",
}
SPEED_LABELS = {
    "first_token_seconds": "seconds to the first token",
    "tokens_per_second": "tokens a second",
    "pictures_per_second": "pictures a second",
    "batch_size": "pictures in a batch",
    "device": "device",
    "dtype": "dtype",
    "threads": "threads",
}
SIZE_LABELS = {
    "parameters": "parameters",
    "weights_bytes": "bytes on the disk",
    "bits_per_parameter": "bits a parameter",
}
STYLE = """
:root { color-scheme: light dark; font: 16px/1.45 system-ui, sans-serif; }
body { margin: 0 auto; max-width: 1200px; padding: 1rem; overflow-wrap: anywhere; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #8885; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #8883; text-align: right; white-space: nowrap; }
th { white-space: normal; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 8rem; }
.plots, .examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 1rem; }
figure { margin: 0; border: 1px solid #8885; border-radius: 8px; overflow: hidden; }
figcaption { padding: .5rem .8rem; }
img { display: block; width: 100%; height: auto; background: #fff; }
.pair, .words { display: grid; grid-template-columns: 1fr 1fr; gap: 2px; }
.words { grid-template-columns: repeat(auto-fill, minmax(72px, 1fr)); padding: 0 .8rem .8rem; }
.words div { font-size: .75rem; text-align: center; }
small { opacity: .7; }
.right { color: #2a7; }
"""


def blocks(result: dict) -> list[tuple[str, dict[str, str], dict[str, dict]]]:
    """What of one data set goes into tables: title, metric -> label, and column name -> metric -> value."""
    captioners = {name: result[key] for key, name in CAPTIONERS.items() if key in result}
    memories = {counted(entry["facts"]): entry for entry in result.get("memory", [])}
    single = lambda key: {"": result[key]} if key in result else {}  # noqa: E731
    found = [
        ("Captions", CAPTION_LABELS, captioners),
        ("Language", LANGUAGE_LABELS, single("language")),
        ("Retrieval", RETRIEVAL_LABELS, single("retrieval")),
        ("Memory", MEMORY_LABELS, memories),
        ("Speed", SPEED_LABELS, single("speed")),
        ("Size", SIZE_LABELS, single("size")),
    ]
    return [block for block in found if block[2]]


def format_value(value: float | int | str | None) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else value


def markdown(results: dict[str, dict]) -> str:
    """A table per group, a line per data set (and captioner, or number of facts), and what was not measured."""
    tables: dict[str, list[list[str]]] = {}
    for path, result in results.items():
        for title, labels, columns in blocks(result):
            named = any(columns)
            head = ["set", *([{"Captions": "captions of", "Memory": "memory of"}[title]] if named else [])]
            table = tables.setdefault(title, [[*head, *labels.values()], ["---"] * len(head) + ["---:"] * len(labels)])
            where = f"`{path}`, {result['pictures']:,} pictures"
            for name, values in columns.items():
                table.append([where, *([name] if named else []), *(format_value(values.get(key)) for key in labels)])
    reasons = [[f"`{p}`", what, why] for p, r in results.items() for what, why in r["not_measured"].items()]
    if reasons:
        tables["Not measured"] = [["set", "what", "why"], ["---"] * 3, *reasons]
    cell = lambda text: text.replace("|", "\\|")  # noqa: E731
    return "\n".join(
        f"## {title}\n\n" + "".join(f"| {' | '.join(map(cell, line))} |\n" for line in table)
        for title, table in tables.items()
    )


def print_result(path: str, result: dict) -> None:
    """One data set on the terminal."""
    print(f"{path} ({result['pictures']} pictures)")
    for title, labels, columns in blocks(result):
        if title == "Captions":
            order = ["exact", "word_f1", "cider", "distinct", *(k for k in labels if re.match("bleu|rouge|meteor", k))]
            print(f"  {'':<18}" + "".join(f"{labels[k].replace(' match', ''):>9}" for k in order))
            for name in CAPTIONERS:
                if name in result:
                    print(f"  {name:<18}" + "".join(f"{format_value(result[name][k]):>9}" for k in order))
        elif title == "Memory":
            print(f"  {'memory':<34}" + "".join(f"{name:>11}" for name in columns))
            for key, label in labels.items():
                print(f"    {label:<32}" + "".join(f"{format_value(entry.get(key)):>11}" for entry in columns.values()))
        else:
            print(
                f"  {title.lower():<18}" + ", ".join(f"{labels[k]} {format_value(v)}" for k, v in columns[""].items())
            )
    for what, why in result["not_measured"].items():
        print(f"  not measured: {what}: {why}")


def image_tag(picture: Image.Image, alt: str, size: int) -> str:
    """An `img` of a picture in a square of `size` pixels at most."""
    small, data = picture.convert("RGB"), BytesIO()
    small.thumbnail((size, size))
    small.save(data, "JPEG", quality=85)
    shape = f'width="{small.width}" height="{small.height}"'
    return f'<img src="{data_uri(data.getvalue(), "jpeg")}" {shape} alt="{html.escape(alt)}">'


def plot_tag(draw, title: str) -> str:
    """A figure with the SVG that `draw(axis)` makes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "microvlm"}):
        figure, data = Figure(figsize=(4.4, 3.3), layout="constrained"), BytesIO()
        axis = figure.subplots()
        draw(axis)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
        figure.savefig(data, format="svg", metadata={"Date": None})
    return f'<figure><img src="{data_uri(data.getvalue(), "svg+xml")}" alt="{html.escape(title)}"></figure>'


def plots(result: dict, more: dict) -> list[str]:
    """Distributions of the captions' scores, recall over facts, ScopeNet's curves and probabilities."""
    found = []
    if "word_f1" in more:
        found.append(plot_tag(lambda axis: histogram(axis, {"": more["word_f1"]}, (0, 1), "word F1"), "Captions"))
    if losses := [loss for loss in more.get("loss", []) if math.isfinite(loss)]:
        draw = lambda axis: histogram(axis, {"": losses}, (0, max(losses)), "loss, nats a token")  # noqa: E731
        found.append(plot_tag(draw, "References, given the picture"))
    if result.get("memory"):
        found.append(plot_tag(lambda axis: draw_recall(axis, result["memory"]), "Taught names said"))
    scopes = {n: scope for n, scope in more.get("scopes", {}).items() if "unrelated" in scope}
    if scopes:
        found.append(plot_tag(lambda axis: draw_roc(axis, scopes), "ScopeNet: unrelated and known let through"))
        most = max(scopes)
        sides = {name: scopes[most][name].tolist() for name in ("known", "unrelated")}
        title = f"ScopeNet with {counted(most)}"
        found.append(plot_tag(lambda axis: histogram(axis, sides, (0, 1), "probability that it is known"), title))
    return found


def histogram(axis, values: dict[str, list[float]], span: tuple[float, float], label: str) -> None:
    for name, points in values.items():
        axis.hist(points, bins=20, range=span, alpha=0.6, label=name or None)
    axis.set_xlabel(label)
    axis.set_ylabel("pictures")


def draw_recall(axis, memory: list[dict]) -> None:
    facts = [entry["facts"] for entry in memory]
    for key in ("recall_same", "recall_view", "recall_words", "recall_style", "recall_nearest", "recall_no_memory"):
        values = [math.nan if entry[key] is None else entry[key] for entry in memory]
        axis.plot(facts, values, marker="o", ms=3, label=MEMORY_LABELS[key].removeprefix("recall, "))
    axis.set_xscale("log", base=2)
    axis.set_ylim(-0.03, 1.03)
    axis.set_xlabel("stored facts")


def draw_roc(axis, scopes: dict[int, dict]) -> None:
    for size, scope in scopes.items():
        axis.plot(*roc(scope["known"], scope["unrelated"]), lw=1, label=counted(size))
    axis.plot([0, 1], [0, 1], ":", color="grey")
    axis.set_xlabel("unrelated")
    axis.set_ylabel("known")


@torch.inference_mode()
def example_tags(model, processor, rows, more: dict, number: int) -> list[str]:
    """Figures of pictures with caption, reference, scores, and where the adapter and the words of the caption look."""

    found = []
    for i in examples_of(number, len(rows)):
        pixels, reference = decode_row(rows[i], processor.image_processor)
        picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        pixel_values = processor.image_processor([pixels], return_tensors="pt")["pixel_values"]
        mean_map = pooling_attention(model, pixel_values)[0].mean(0)
        attention = word_attention(model, processor, pixel_values, max_new_tokens=NEW_TOKENS)[0]
        text, facts = " ".join(attention.words), []
        if "captions" in more:
            text, right = more["captions"][i], more["word_f1"][i]
            facts.append(f"word F1 {right:.2f}")
        if "loss" in more:
            facts.append(f"loss of the reference {more['loss'][i]:.2f}")
        same = ' class="right"' if normalise(text) == normalise(reference) else ""
        sheets = image_tag(picture, text, 320) + image_tag(overlay(picture, mean_map), "attention", 320)
        words = "".join(
            f"<div>{image_tag(overlay(picture, m), word, 96)}{html.escape(word)}</div>"
            for word, m in zip(attention.words, attention.maps)
        )
        found.append(
            f'<figure><div class="pair">{sheets}</div><figcaption><b{same}>{html.escape(text)}</b><br>'
            f"{html.escape(reference)}<br><small>{', '.join(facts)}</small></figcaption>"
            f'<div class="words">{words}</div></figure>'
        )
    return found


def html_section(path: str, result: dict, plot_tags: list[str], examples: list[str]) -> str:
    """One data set of the report."""
    parts = [f"<h2>{html.escape(path)}</h2><p>{result['pictures']:,} pictures</p>"]
    for title, labels, columns in blocks(result):
        lines = [
            "<tr>"
            + "".join(
                f"<td>{html.escape(c)}</td>" for c in (label, *(format_value(v.get(key)) for v in columns.values()))
            )
            for key, label in labels.items()
        ]
        head = "".join(f"<th>{html.escape(name)}</th>" for name in ("", *columns)) if any(columns) else ""
        parts.append(
            f'<h3>{title}</h3><div class="wide"><table><tr>{head}</tr>{"</tr>".join(lines)}</tr></table></div>'
        )
    if result["not_measured"]:
        reasons = (f"<li>{html.escape(what)}: {html.escape(why)}</li>" for what, why in result["not_measured"].items())
        parts.append(f"<h3>Not measured</h3><ul>{''.join(reasons)}</ul>")
    if plot_tags:
        parts.append(f'<h3>Plots</h3><div class="plots">{"".join(plot_tags)}</div>')
    if examples:
        parts.append(
            "<h3>Examples</h3><p>Evenly over the data set, not chosen: picture; where the adapter's queries look, their mean; caption "
            f'in bold (green: exact match) over reference; where each word looks.</p><div class="examples">{"".join(examples)}</div>'
        )
    return "\n".join(parts)


def html_page(name: str, sections: list[str]) -> str:
    """The report: one page that needs no other file."""
    title = f"Evaluation of {html.escape(name)}"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1>
{chr(10).join(sections)}
</body></html>
"""


def examples_of(number: int, rows: int) -> list[int]:
    """So many rows, evenly over the data set, the first among them."""
    number = min(number, rows)
    return [round(i * rows / number) for i in range(number)]
