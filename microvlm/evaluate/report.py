"""Write scores for the terminal, as Markdown and as an HTML page."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from textwrap import indent

import torch
from PIL import Image

from ..files import one_line
from ..images import data_uri, small_jpeg
from ..metrics import normalise, roc
from ..tables import format_value, markdown_table, page_template, text_table
from ..visualize.attention import pooling_attention, word_attention
from ..visualize.figures import overlay
from .captions import CAPTIONERS, CaptionedRow
from .memory import count_facts
from .retrieval import RANKS

CAPTION_LABELS = {"exact": "exact match", "word_f1": "word F1", "cider": "CIDEr"}
CAPTION_LABELS |= {f"bleu_{n}": f"BLEU-{n}" for n in range(1, 5)} | {"rouge_l": "ROUGE-L", "distinct": "distinct"}
LANGUAGE_LABELS = {"lm_loss": "loss, nats a token", "perplexity": "perplexity", "bits_per_byte": "bits a byte"}
LANGUAGE_LABELS |= {"tokens": "tokens"}
WAYS = {"image_to_text": "picture to text", "text_to_image": "text to picture"}
RETRIEVAL_LABELS = {f"{way}_recall_at_{k}": f"{name}, R@{k}" for way, name in WAYS.items() for k in RANKS}
RETRIEVAL_LABELS |= {"alignment_loss": "InfoNCE", "chance_loss": "InfoNCE of chance", "pairs": "pairs"}
MEMORY_LABELS = {"recall_same": "recall, same picture", "recall_view": "recall, augmented view"}
MEMORY_LABELS |= {"recall_words": "recall, in words", "recall_style": "recall, other style"}
MEMORY_LABELS |= {"word_f1": "word F1, augmented view", "recall_no_memory": "recall without memory"}
MEMORY_LABELS |= {"recall_nearest": "nearest neighbour, augmented view", "false_recall": "false recalls, unrelated"}
MEMORY_LABELS |= {"unchanged": "unchanged, unrelated", "scope_accuracy": "scope accuracy"}
MEMORY_LABELS |= {"scope_auroc": "scope AUROC", "scope_eer": "scope EER"}
MEMORY_LABELS |= {"memory_kl": "memory KL", "address_kl": "address KL", "forgotten": "recall of the forgotten half"}
MEMORY_LABELS |= {"kept": "recall of the kept half", "kept_before": "recall of the kept half, before"}
MEMORY_LABELS |= {"questions": "questions"}
SPEED_LABELS = {"first_token_seconds": "seconds to the first token", "tokens_per_second": "tokens a second"}
SPEED_LABELS |= {"pictures_per_second": "pictures a second", "batch_size": "pictures in a batch"}
SPEED_LABELS |= {name: name for name in ("device", "dtype", "threads")}
SIZE_LABELS = {"parameters": "parameters", "weights_bytes": "bytes on the disk"}
SIZE_LABELS |= {"bits_per_parameter": "bits a parameter"}
LABELS = {"captions": CAPTION_LABELS, "language": LANGUAGE_LABELS, "retrieval": RETRIEVAL_LABELS}
LABELS |= {"memory": MEMORY_LABELS, "speed": SPEED_LABELS, "size": SIZE_LABELS}  # by group, in the order of the tables
CURVES = ("recall_same", "recall_view", "recall_words", "recall_style", "recall_nearest", "recall_no_memory")


def blocks(result: dict) -> list[tuple[str, dict[str, str], dict[str, dict]]]:
    """List the tables of one data set: title, metric -> label, and column name -> metric -> value."""
    columns = {group: {"": result[group]} for group in LABELS if group in result}
    columns["captions"] = {name: result[key] for key, name in CAPTIONERS.items() if key in result}
    columns["memory"] = {count_facts(entry["facts"]): entry for entry in result.get("memory", [])}
    return [(group.capitalize(), labels, columns[group]) for group, labels in LABELS.items() if columns.get(group)]


def markdown(results: dict[str, dict]) -> str:
    """Write a table per group, with a line per data set and column."""
    headers, lines = {}, {}
    for path, result in results.items():
        place = f"`{path}`, {result['pictures']:,} pictures"
        for title, labels, columns in blocks(result):
            names = [{"Captions": "captions of", "Memory": "memory of"}[title]] if any(columns) else []
            headers[title] = ["set", *names, *labels.values()], 1 + len(names)
            for name, values in columns.items():
                cells = [values.get(key) for key in labels]
                lines.setdefault(title, []).append([place, *([name] if names else []), *cells])
    reasons = [[f"`{path}`", *reason] for path, result in results.items() for reason in result["not_measured"].items()]
    if reasons:
        headers["Not measured"], lines["Not measured"] = (["set", "what", "why"], 3), reasons
    tables = {title: markdown_table(header, lines[title], left) for title, (header, left) in headers.items()}
    return "\n".join(f"## {title}\n\n{table}\n" for title, table in tables.items())


def print_result(path: str, result: dict) -> None:
    """Print one data set on the terminal."""
    print(one_line(f"{path} ({result['pictures']} pictures)"))
    for title, labels, columns in blocks(result):
        if title == "Captions":
            rows = [[name, *(values.get(key) for key in labels)] for name, values in columns.items()]
            print(indent(text_table(["captions", *labels.values()], rows), "  "))
        elif title == "Memory":
            rows = [[label, *(values.get(key) for values in columns.values())] for key, label in labels.items()]
            print(indent(text_table(["memory", *columns], rows), "  "))
        else:
            scores = (f"{labels[key]} {format_value(value)}" for key, value in columns[""].items())
            print(f"  {title.lower():<18}" + ", ".join(scores))
    for metric, reason in result["not_measured"].items():
        print(one_line(f"  not measured: {metric}: {reason}"))


@contextmanager
def plot(figures: list[dict[str, str]], title: str) -> Iterator:
    """Give the axis of a figure, whose title and SVG, a data URI, join `figures`."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "microvlm"}):
        figure, data = Figure(figsize=(4.4, 3.3), layout="constrained"), BytesIO()
        axis = figure.subplots()
        yield axis
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
        figure.savefig(data, format="svg", metadata={"Date": None})
    figures.append({"title": title, "uri": data_uri(data.getvalue(), "svg+xml")})


def histogram(figures: list[dict], title: str, values: dict[str, list[float]], limit: float, label: str) -> None:
    with plot(figures, title) as axis:
        for name, points in values.items():
            axis.hist(points, bins=20, range=(0, limit), alpha=0.6, label=name or None)
        axis.set(xlabel=label, ylabel="pictures")


def plots(result: dict, details: dict) -> list[dict[str, str]]:
    """Draw the captions' scores, recall over facts, and ScopeNet's curves and probabilities."""
    figures, memories = [], result.get("memory", [])
    # captions and references
    if "word_f1" in details:
        histogram(figures, "Captions", {"": details["word_f1"]}, 1, "word F1")
    if losses := [loss for loss in details.get("loss", []) if math.isfinite(loss)]:
        histogram(figures, "References, given the picture", {"": losses}, max(losses), "loss, nats a token")
    # the memory
    if memories:
        with plot(figures, "Taught names said") as axis:
            for key in CURVES:
                values = [math.nan if entry[key] is None else entry[key] for entry in memories]
                label = MEMORY_LABELS[key].removeprefix("recall, ")
                axis.plot([entry["facts"] for entry in memories], values, marker="o", ms=3, label=label)
            axis.set_xscale("log", base=2)
            axis.set(ylim=(-0.03, 1.03), xlabel="stored facts")
    if scopes := {n: scope for n, scope in details.get("scopes", {}).items() if "unrelated" in scope}:
        with plot(figures, "ScopeNet: unrelated and known let through") as axis:
            for size, scope in scopes.items():
                axis.plot(*roc(scope["known"], scope["unrelated"]), lw=1, label=count_facts(size))
            axis.plot([0, 1], [0, 1], ":", color="grey")
            axis.set(xlabel="unrelated", ylabel="known")
        largest = max(scopes)
        sides = {name: scopes[largest][name].tolist() for name in ("known", "unrelated")}
        histogram(figures, f"ScopeNet with {count_facts(largest)}", sides, 1, "probability that it is known")
    return figures


@torch.inference_mode()
def example_figures(model, processor, examples: dict[int, CaptionedRow], details: dict) -> list[dict]:
    """Draw images with caption, reference, scores, and where the adapter and the words look.

    `examples` go by the place of the row in the data, `details` are those of `evaluate`.
    """
    figures = []
    for i, row in examples.items():
        image = Image.fromarray(row.image.permute(1, 2, 0).numpy())
        pixel_values = processor.image_processor([row.image], return_tensors="pt")["pixel_values"]
        queries = pooling_attention(model, pixel_values)[0].mean(0)
        words = word_attention(model, processor, pixel_values, [row.ids])[0]
        scores = [f"word F1 {details['word_f1'][i]:.2f}"] if "word_f1" in details else []
        scores += [f"loss of the reference {details['loss'][i]:.2f}"] if "loss" in details else []
        # what the page says
        figure = {"row": row, "exact": normalise(row.caption) == normalise(row.reference), "scores": ", ".join(scores)}
        figure |= {"image": small_jpeg(image, 320), "attention": small_jpeg(overlay(image, queries), 320)}
        figure["words"] = [(word, small_jpeg(overlay(image, m), 96)) for word, m in zip(words.words, words.maps)]
        figures.append(figure)
    return figures


def page_section(path: str, result: dict, figures: list[dict], examples: list[dict]) -> dict:
    """Collect what the page says of one data set."""
    tables = []
    for title, labels, columns in blocks(result):
        rows = [[label, *(format_value(v.get(key)) for v in columns.values())] for key, label in labels.items()]
        tables.append({"title": title, "header": ["", *columns] if any(columns) else [], "rows": rows})
    return {"path": path, "result": result, "tables": tables, "plots": figures, "examples": examples}


def html_page(name: str, sections: list[dict]) -> str:
    """Write the report: one page that needs no other file."""
    return page_template("report.html.jinja").render(name=name, sections=sections)


def example_rows(number: int, rows: int) -> list[int]:
    """Choose rows evenly over the data set, the first among them."""
    number = min(number, rows)
    return [round(i * rows / number) for i in range(number)]
