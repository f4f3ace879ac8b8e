"""Write scores for the terminal, as Markdown and as an HTML page."""

import math
from io import BytesIO
from textwrap import indent

import torch
from PIL import Image

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
SIZE_LABELS = {"parameters": "parameters", "weights_bytes": "bytes on the disk"}
SIZE_LABELS |= {"bits_per_parameter": "bits a parameter"}
SINGLE = {"language": LANGUAGE_LABELS, "retrieval": RETRIEVAL_LABELS, "speed": SPEED_LABELS, "size": SIZE_LABELS}
CURVES = ("recall_same", "recall_view", "recall_words", "recall_style", "recall_nearest", "recall_no_memory")


def blocks(result: dict) -> list[tuple[str, dict[str, str], dict[str, dict]]]:
    """List the tables of one data set: title, metric -> label, and column name -> metric -> value."""

    def single(*keys: str) -> dict[str, tuple]:
        return {key.capitalize(): (SINGLE[key], {"": result[key]} if key in result else {}) for key in keys}

    captioners = {name: result[key] for key, name in CAPTIONERS.items() if key in result}
    memories = {count_facts(entry["facts"]): entry for entry in result.get("memory", [])}
    tables = {"Captions": (CAPTION_LABELS, captioners), **single("language", "retrieval")}
    tables |= {"Memory": (MEMORY_LABELS, memories), **single("speed", "size")}
    return [(title, *table) for title, table in tables.items() if table[1]]


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
    print(f"{path} ({result['pictures']} pictures)")
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
        print(f"  not measured: {metric}: {reason}")


def plot(draw, title: str) -> dict[str, str]:
    """Draw a figure with `draw(axis)`; returns its title and its SVG as a data URI."""
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
    return {"title": title, "uri": data_uri(data.getvalue(), "svg+xml")}


def plots(result: dict, details: dict) -> list[dict[str, str]]:
    """Draw the captions' scores, recall over facts, and ScopeNet's curves and probabilities."""
    figures = []

    def histogram(title: str, values: dict[str, list[float]], limit: float, label: str) -> None:
        def draw(axis) -> None:
            for name, points in values.items():
                axis.hist(points, bins=20, range=(0, limit), alpha=0.6, label=name or None)
            axis.set(xlabel=label, ylabel="pictures")

        figures.append(plot(draw, title))

    # captions and references
    if "word_f1" in details:
        histogram("Captions", {"": details["word_f1"]}, 1, "word F1")
    if losses := [loss for loss in details.get("loss", []) if math.isfinite(loss)]:
        histogram("References, given the picture", {"": losses}, max(losses), "loss, nats a token")
    # the memory
    if result.get("memory"):
        figures.append(plot(lambda axis: draw_recall(axis, result["memory"]), "Taught names said"))
    if scopes := {n: scope for n, scope in details.get("scopes", {}).items() if "unrelated" in scope}:
        figures.append(plot(lambda axis: draw_roc(axis, scopes), "ScopeNet: unrelated and known let through"))
        largest = max(scopes)
        sides = {name: scopes[largest][name].tolist() for name in ("known", "unrelated")}
        histogram(f"ScopeNet with {count_facts(largest)}", sides, 1, "probability that it is known")
    return figures


def draw_recall(axis, memory: list[dict]) -> None:
    facts = [entry["facts"] for entry in memory]
    for key in CURVES:
        values = [math.nan if entry[key] is None else entry[key] for entry in memory]
        axis.plot(facts, values, marker="o", ms=3, label=MEMORY_LABELS[key].removeprefix("recall, "))
    axis.set_xscale("log", base=2)
    axis.set(ylim=(-0.03, 1.03), xlabel="stored facts")


def draw_roc(axis, scopes: dict[int, dict]) -> None:
    for size, scope in scopes.items():
        axis.plot(*roc(scope["known"], scope["unrelated"]), lw=1, label=count_facts(size))
    axis.plot([0, 1], [0, 1], ":", color="grey")
    axis.set(xlabel="unrelated", ylabel="known")


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
