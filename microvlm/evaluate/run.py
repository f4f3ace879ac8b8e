"""Score a checkpoint on image-caption data, from the command line."""

import importlib.util
import json
import math
import os
from glob import glob
from pathlib import Path
from types import SimpleNamespace

from ..data.rows import load_rows
from ..data.stream import is_hub_dataset, load_stream, take_rows
from ..files import atomic_file, check_outputs
from ..metrics import normalise, word_f1
from ..model import load
from ..teacher import nearest_neighbours, teacher_features
from .captions import caption_rows, caption_scores
from .card import card_with
from .language import language_scores, teacher_forced
from .memory import counted, memory_scores
from .report import example_tags, html_page, html_section, markdown, plots, print_result
from .retrieval import RETRIEVAL_POOL, retrieval_scores
from .speed import size_scores, speed_scores

GROUPS = ("captions", "language", "retrieval", "memory", "speed", "size")


def open_rows(path: str, limit: int | None = None):
    """Rows of a data set as in `load_rows`; one on the Hub by its id, `owner/name`: the first `limit` rows of its train split.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no rows, no picture or caption column, a format that is not known, or a Hub id without limit.
    """

    if is_hub_dataset(path):
        if limit is None:
            raise ValueError(f"{path} is no file or folder; as a data set of the Hub it needs --limit.")
        rows = take_rows(load_stream(path), limit)
    else:
        rows = load_rows(path, limit=limit)
    if not len(rows):
        raise ValueError(f"{path} has no rows.")
    return rows


def evaluate(model, processor, rows, options, train=None) -> tuple[dict, dict]:
    """Everything asked for on one data set.

    Args:
        rows: of `open_rows`.
        options: of the command line.
        train: rows and features (N, C) for the nearest-neighbour caption, or None.

    Returns:
        The figures, `not_measured` among them: name -> reason; and for the report `captions`, `references`, per caption `word_f1` and
        `loss`, and per size `scopes`.
    """
    groups, missing, more = set(options.metrics), {}, {}
    result: dict = {"pictures": len(rows), "dtype": str(model.dtype).removeprefix("torch.")}
    if "captions" in groups:
        candidates, references = caption_rows(model, processor, rows, options.batch_size)
        sets, shift = {"model": (candidates, references)}, len(references) // 2
        if shift:
            sets["shuffled"] = candidates, references[shift:] + references[:shift]
        else:
            missing["shuffled"] = "one picture: there are no others"
        if train is not None:
            features = teacher_features(rows, processor.image_processor)
            nearest = nearest_neighbours(train[1], features)
            sets["nearest_neighbour"] = [train[0][i]["caption"] for i in nearest], references
        scores, reasons = caption_scores(sets, not options.no_meteor)
        result, missing = result | scores, missing | reasons
        f1 = [word_f1(normalise(c), normalise(r)) for c, r in zip(candidates, references)]
        more |= {"captions": candidates, "references": references, "word_f1": f1}
    if groups & {"language", "retrieval"}:
        align = "retrieval" in groups and getattr(model.model, "alignment", None) is not None
        forced = teacher_forced(model, processor, rows, options.batch_size, align)
        if "language" in groups:
            captions = rows["caption"][:]
            captions = [(c.decode(errors="replace") if isinstance(c, bytes) else c).strip() for c in captions]
            result["language"] = language_scores(forced["loss"], forced["tokens"], captions)
            more["loss"] = (forced["loss"] / forced["tokens"]).tolist()
        if align:
            embeds = (forced[name][:RETRIEVAL_POOL] for name in ("image_embeds", "text_embeds"))
            result["retrieval"], reasons = retrieval_scores(model, *embeds)
            missing |= reasons
        elif "retrieval" in groups:
            missing["retrieval"] = "the checkpoint has no alignment heads"
    if "memory" in groups:
        result["memory"], more["scopes"], reasons = memory_scores(
            model, processor, rows, options.facts, options.queries
        )
        missing |= reasons
    if "speed" in groups:
        result["speed"] = speed_scores(model, processor, rows, options.batch_size)
    if "size" in groups:
        result["size"] = size_scores(model, options.model, options.revision)
    columns = {name: values for name, values in result.items() if isinstance(values, dict)}
    columns |= {f"memory of {counted(entry['facts'])}": entry for entry in result.get("memory", [])}
    for name, values in columns.items():
        for key, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                values[key], missing[f"{name}: {key}"] = None, f"the result is {value}"
    return result | {"not_measured": missing}, more


def check_options(options: SimpleNamespace) -> None:
    """Refuse outputs that cannot be written and options that do not fit, before anything is computed.

    Raises:
        OSError, ValueError, ModuleNotFoundError: what is wrong.
    """
    options.data = list(dict.fromkeys(options.data))
    options.metrics = [*options.metrics, *["memory"] * (options.memory and "memory" not in options.metrics)]
    # an output inside a folder of inputs is an input
    outputs = {name: getattr(options, name) for name in ("json", "markdown", "html", "card")}
    sources = [*options.data, *filter(None, [options.yardstick])]
    inputs = {file for source in sources for file in (source, *glob(source, recursive=True))}
    folders = tuple(os.path.realpath(source) + os.sep for source in sources if os.path.isdir(source))
    existing = [path for path in outputs.values() if path is not None and os.path.exists(path)]
    check_outputs(inputs | {path for path in existing if os.path.realpath(path).startswith(folders)}, **outputs)
    for module, needed in {"matplotlib": options.html, "pycocoevalcap": "captions" in options.metrics}.items():
        if needed and importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)
    if options.yardstick and "captions" not in options.metrics:
        raise ValueError("--yardstick needs the group captions")


def write_report(path: str, text: str) -> None:
    with atomic_file(path, "wb") as file:
        file.write(text.encode())


def run(options: SimpleNamespace) -> None:
    """The command, see above."""
    sets = {path: open_rows(path, options.limit) for path in options.data}
    if options.card:
        nothing = {path: {"pictures": len(rows), "not_measured": {}} for path, rows in sets.items()}
        card_with(options.card, nothing, options.metrics, options.model)
    train = None
    if options.yardstick:
        train = load_rows(options.yardstick, exclude_copyleft=options.yardstick_exclude_copyleft)
        if not len(train):
            raise ValueError(f"{options.yardstick} has no rows.")
    model, processor = load(options.model, options.revision, options.dtype, options.device)
    if not hasattr(model, "default_prompt"):
        raise ValueError(f"{options.model} is a {type(model).__name__}: only checkpoints of MicroVLM can be scored.")
    if train is not None:
        train = train, teacher_features(train, processor.image_processor)
    name = Path(options.model).resolve().name if Path(options.model).exists() else options.model
    results, sections = {}, []
    for path, rows in sets.items():
        results[path], more = evaluate(model, processor, rows, options, train)
        pairs = zip(more.get("captions", []), more.get("references", []))
        for candidate, reference in list(pairs)[: options.show]:
            print(f"  {candidate!r}  <- {reference!r}")
        print_result(path, results[path])
        if options.json:
            write_report(options.json, json.dumps(results, indent=1, allow_nan=False))
        if options.markdown:
            write_report(options.markdown, markdown(results))
        if options.card:
            write_report(options.card, card_with(options.card, results, options.metrics, name))
        if options.html:
            examples = example_tags(model, processor, rows, more, options.examples)
            sections.append(html_section(path, results[path], plots(results[path], more), examples))
            write_report(options.html, html_page(name, sections))


def main(**options) -> None:
    options = SimpleNamespace(**options)
    check_options(options)
    try:
        run(options)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt("interrupted; data sets scored until then are written") from error
