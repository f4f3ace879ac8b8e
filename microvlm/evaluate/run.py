"""Score a checkpoint on image-caption data; `options` are those of `microvlm evaluate`."""

import importlib.util
import json
import math
import os
from glob import glob
from pathlib import Path
from types import SimpleNamespace

from ..data.rows import load_rows, row_caption
from ..files import check_outputs, write_text
from ..metrics import normalise, word_f1
from ..model import load, require
from ..teacher import nearest_neighbours, teacher_features
from .captions import caption_scores, captioned_rows
from .card import card_with
from .language import language_scores, teacher_forced
from .memory import count_facts, memory_scores
from .report import example_figures, example_rows, html_page, markdown, page_section, plots, print_result
from .retrieval import RETRIEVAL_POOL, retrieval_scores
from .speed import size_scores, speed_scores


def check(options: SimpleNamespace) -> None:
    """Refuse options that do not go together, outputs that cannot be written, and missing packages."""
    require(not options.yardstick or "captions" in options.metrics, "--yardstick needs the group captions.")
    # no output may take the place of an input
    sources = [*options.data, *filter(None, [options.yardstick])]
    inputs = {file for source in sources for file in (source, *glob(source, recursive=True))}
    outputs = {name: getattr(options, name) for name in ("json", "markdown", "html", "card")}
    folders = tuple(os.path.realpath(source) + os.sep for source in sources if os.path.isdir(source))
    for path in filter(None, outputs.values()):
        if os.path.exists(path) and os.path.realpath(path).startswith(folders):
            inputs.add(path)
    check_outputs(inputs, **outputs)
    for package, needed in {"matplotlib": options.html, "pycocoevalcap": "captions" in options.metrics}.items():
        if needed and importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)


def score_captions(model, processor, rows, options: SimpleNamespace, train=None) -> tuple[dict, dict, dict]:
    """Score greedy captions, the same against others' references, and those of the nearest neighbours.

    Returns:
        Captioner -> scores; details for the report; and what was not measured.
    """
    # caption every image once; a few rows stay for the report
    chosen = set(example_rows(options.examples, len(rows)) if options.html else ())
    captions, references, examples = [], [], {}
    for i, row in enumerate(captioned_rows(model, processor, rows, options.batch_size)):
        captions.append(row.caption)
        references.append(row.reference)
        if i in chosen:
            examples[i] = row
    # captioners to compare with
    sets, missing, shift = {"model": (captions, references)}, {}, len(references) // 2
    if shift:
        sets["shuffled"] = captions, references[shift:] + references[:shift]
    else:
        missing["shuffled"] = "one picture: there are no others"
    if train is not None:
        nearest = nearest_neighbours(train[1], teacher_features(rows, processor.image_processor))
        sets["nearest_neighbour"] = [train[0][i]["caption"] for i in nearest], references
    scores, reasons = caption_scores(sets)
    f1 = [word_f1(normalise(c), normalise(r)) for c, r in zip(captions, references)]
    return scores, {"word_f1": f1, "examples": examples}, missing | reasons


def score_references(model, processor, rows, options: SimpleNamespace) -> tuple[dict, dict, dict]:
    """Score the references, token by token (language) and as pairs with their images (retrieval)."""
    align = "retrieval" in options.metrics and getattr(model.model, "alignment", None) is not None
    forced = teacher_forced(model, processor, rows, options.batch_size, align)
    result, details, missing = {}, {}, {}
    if "language" in options.metrics:
        captions = [row_caption({"caption": caption}) for caption in rows["caption"]]
        result["language"] = language_scores(forced["loss"], forced["tokens"], captions)
        details["loss"] = (forced["loss"] / forced["tokens"]).tolist()
    if align:
        embeds = (forced[name][:RETRIEVAL_POOL] for name in ("image_embeds", "text_embeds"))
        result["retrieval"], missing = retrieval_scores(model, *embeds)
    elif "retrieval" in options.metrics:
        missing["retrieval"] = "the checkpoint has no alignment heads"
    return result, details, missing


def evaluate(model, processor, rows, options: SimpleNamespace, train=None) -> tuple[dict, dict]:
    """Score one data set; `train` has rows and features (N, C) for the nearest-neighbour caption.

    Returns:
        The figures, with `not_measured`: name -> reason; and for the report, where measured, per row `word_f1` and
        `loss`, `examples`, and per size `scopes`.
    """
    groups, details, missing = set(options.metrics), {}, {}
    result: dict = {"pictures": len(rows), "dtype": str(model.dtype).removeprefix("torch.")}
    if "captions" in groups:
        scores, details, missing = score_captions(model, processor, rows, options, train)
        result |= scores
    if groups & {"language", "retrieval"}:
        scores, losses, reasons = score_references(model, processor, rows, options)
        result, details, missing = result | scores, details | losses, missing | reasons
    if "memory" in groups:
        memory, details["scopes"], reasons = memory_scores(model, processor, rows, options.facts, options.queries)
        result, missing = result | {"memory": memory}, missing | reasons
    if "speed" in groups:
        result["speed"] = speed_scores(model, processor, rows, options.batch_size)
    if "size" in groups:
        result["size"] = size_scores(model, options.model, options.revision)
    # JSON has no NaN
    columns = {name: values for name, values in result.items() if isinstance(values, dict)}
    columns |= {f"memory of {count_facts(entry['facts'])}": entry for entry in result.get("memory", [])}
    for name, values in columns.items():
        for key, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                values[key], missing[f"{name}: {key}"] = None, f"the result is {value}"
    return result | {"not_measured": missing}, details


def examples_of(model, processor, rows, details: dict, options: SimpleNamespace) -> list[dict]:
    """Draw the examples of the report; their images are captioned here unless they were before."""
    chosen = example_rows(options.examples, len(rows))
    examples = details.get("examples")
    if examples is None:
        examples = dict(zip(chosen, captioned_rows(model, processor, rows.select(chosen), options.batch_size)))
    return example_figures(model, processor, examples, details)


def evaluate_files(options: SimpleNamespace) -> dict[str, dict]:
    """Score a checkpoint on every data set; print and write the scores after each."""
    # the data and the card, before the model
    sets = {path: load_rows(path, limit=options.limit, split="validation") for path in options.data}
    if options.card:
        empty = {path: {"pictures": len(rows), "not_measured": {}} for path, rows in sets.items()}
        card_with(options.card, empty, options.metrics, options.model)
    train = load_rows(options.yardstick) if options.yardstick else None
    model, processor = load(options.model, options.revision, options.dtype, options.device)
    kind = type(model).__name__
    is_ours = hasattr(model, "default_prompt")
    require(is_ours, f"{options.model} is a {kind}: only checkpoints of MicroVLM can be scored.")
    if train is not None:
        train = train, teacher_features(train, processor.image_processor)
    name = Path(options.model).resolve().name if Path(options.model).exists() else options.model
    results, sections = {}, []
    for path, rows in sets.items():
        results[path], details = evaluate(model, processor, rows, options, train)
        print_result(path, results[path])
        # files hold all sets so far, so that a later failure loses nothing
        if options.json:
            write_text(options.json, json.dumps(results, indent=1, allow_nan=False))
        if options.markdown:
            write_text(options.markdown, markdown(results))
        if options.card:
            write_text(options.card, str(card_with(options.card, results, options.metrics, name)))
        if options.html:
            examples = examples_of(model, processor, rows, details, options)
            sections.append(page_section(path, results[path], plots(results[path], details), examples))
            write_text(options.html, html_page(name, sections))
    return results


def main(memory: bool, **options) -> None:
    """Run the command; `memory` adds the group memory."""
    options = SimpleNamespace(**options)
    options.data = list(dict.fromkeys(options.data))
    options.metrics = list(dict.fromkeys([*options.metrics, *["memory"] * memory]))
    check(options)
    try:
        evaluate_files(options)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt("interrupted; data sets scored until then are written") from error
