"""Score a checkpoint on picture-caption data: captions, language modelling, retrieval, memory, speed and size.

    python evaluate_hf.py --data data/mini/validation.parquet
    python evaluate_hf.py --data A.parquet B/ --yardstick TRAIN.parquet --json scores.json --markdown scores.md
    python evaluate_hf.py --data A.parquet --memory --html report.html --card runs/nano_memory/README.md

- captions: free greedy captions. They are normalised first: lower case, no punctuation, and for exact match and word F1, means over the
  pictures, no articles; CIDEr, BLEU-1 to 4, ROUGE-L and METEOR are pycocoevalcap's, articles kept as is usual, CIDEr on the set's own
  document frequencies. `distinct` is the share of different captions among all; `shuffled` scores the same captions against the references of
  other pictures: a model that ignores the picture keeps its score. `--yardstick` also scores the nearest-neighbour caption: that of the
  closest training picture in EfficientNet-Lite0 feature space.
- language: loss and perplexity of the references' tokens and their end, given the picture and the reference so far.
- retrieval: recall at 1, 5 and 10 of the alignment heads, pictures to texts and back, and their InfoNCE loss.
- memory (`--memory`): facts taught and asked for as in benchmarks/memory_recall.py, ScopeNet and the KL terms.
- speed: seconds to the first token, tokens and pictures a second, on this machine (`--device`, `--dtype`).
- size: parameters, bytes on the disk.

What cannot be measured is listed with its reason. docs/evaluation.md says more. Files are written after every data set. Exit code: 0; 1,
something could not be read or written; 2, wrong arguments; 130, interrupted.
"""

import argparse
import base64
import html
import importlib.util
import json
import math
import os
import re
import shutil
import sys
import time
from collections import Counter
from functools import cache
from glob import glob
from io import BytesIO
from pathlib import Path
from statistics import median
from tarfile import TarError

import torch
import torch.nn.functional as F
import yaml
from datasets.exceptions import DatasetsError
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from huggingface_hub.utils import yaml_dump
from PIL import Image
from safetensors import SafetensorError
from transformers.utils import cached_file

from caption import DTYPES, check_outputs, load, positive, replacing, usable_device
from data_microvlm import (
    CaptionCollator,
    caption_noun,
    decode_row,
    load_rows,
    make_names,
    row_caption,
    text_ids,
)

ROOT = Path(__file__).resolve().parent
GROUPS = ("captions", "language", "retrieval", "memory", "speed", "size")
DEFAULT_GROUPS = ("captions", "language", "retrieval", "size")
CAPTIONERS = {"model": "model", "shuffled": "model, others' references", "nearest_neighbour": "nearest neighbour"}
RANKS = (1, 5, 10)
RETRIEVAL_POOL = 5000  # pictures, the first ones of a larger set
MEMORY_POOL = 2000  # pictures whose features are held at once
SPEED_PICTURES = 64
NEW_TOKENS = 32

ARTICLES = {"a", "an", "the"}


def normalise(caption: str, articles: bool = False) -> str:
    """Lower case, letters and digits only, without articles or with them."""
    words = re.sub(r"[^\w\s]", " ", caption.lower()).split()
    return " ".join(w for w in words if articles or w not in ARTICLES)


def word_f1(candidate: str, reference: str) -> float:
    """F1 of the two normalised captions' words, as multisets."""
    a, b = candidate.split(), reference.split()
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b)) if common else 0.0


def cider(candidates: list[str], references: list[str]) -> float:
    """CIDEr-D of normalised captions, one reference each; pycocoevalcap's scorer."""
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    scorer = CiderScorer(n=4, sigma=6.0)
    for candidate, reference in zip(candidates, references):
        scorer += (candidate, [reference])
    return float(scorer.compute_score()[0])


def score(candidates: list[str], references: list[str]) -> dict[str, float]:
    """exact, word_f1, cider and the share of distinct captions of raw captions."""
    whole = [[normalise(c, articles=True) for c in captions] for captions in (candidates, references)]
    candidates, references = [normalise(c) for c in candidates], [normalise(r) for r in references]
    n = len(references)
    return {
        "exact": sum(c == r for c, r in zip(candidates, references)) / n,
        "word_f1": sum(map(word_f1, candidates, references)) / n,
        "cider": cider(*whole),
        "distinct": len(set(candidates)) / n,
    }


@torch.inference_mode()
def caption_rows(model, processor, rows, batch_size: int = 16, max_new_tokens: int = 32) -> tuple[list[str], list[str]]:
    """Greedy captions and reference captions of rows of `load_rows`."""
    candidates, references = [], []
    for start in range(0, len(rows), batch_size):
        pairs = [
            decode_row(row, processor.image_processor)
            for row in rows.select(range(start, min(start + batch_size, len(rows))))
        ]
        pixel_values = processor.image_processor([p for p, _ in pairs], return_tensors="pt")["pixel_values"]
        prompt = model.default_prompt(len(pairs))
        out = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            pixel_values=pixel_values.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
        )
        candidates += processor.batch_decode(out[:, prompt.shape[1] :], skip_special_tokens=True)
        references += [caption for _, caption in pairs]
    return [c.strip() for c in candidates], references


@torch.inference_mode()
def teacher_features(rows, image_processor) -> torch.Tensor:
    """Pooled EfficientNet-Lite0 features (N, 1280) of rows of `load_rows`."""
    from scripts.distill_vision import load_teacher

    teacher = load_teacher()
    out = []
    for start in range(0, len(rows), 32):
        batch = rows.select(range(start, min(start + 32, len(rows))))
        pictures = [decode_row(row, image_processor)[0] for row in batch]
        x = image_processor(pictures, return_tensors="pt")["pixel_values"].to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            out.append(teacher.forward_head(teacher.forward_features(x), pre_logits=True).float())
    return torch.cat(out)


def nearest_neighbours(train: torch.Tensor, queries: torch.Tensor) -> list[int]:
    """For each query (M, C) the index of the closest of (N, C), by cosine."""
    train, queries = (torch.nn.functional.normalize(x, dim=-1) for x in (train, queries))
    return (queries @ train.mT).argmax(1).tolist()


# ------------------------------------------------------------------------------------------------------ more scores of captions


def ngram_scores(candidates: list[str], references: list[str]) -> dict[str, float]:
    """bleu_1 to bleu_4 (of the corpus) and rouge_l (mean, beta 1.2) of raw captions, normalised with articles; one reference each."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.rouge.rouge import Rouge

    said, wanted = ([normalise(c, articles=True) for c in captions] for captions in (candidates, references))
    said, wanted = ({i: [c] for i, c in enumerate(captions)} for captions in (said, wanted))
    bleu, _ = Bleu(4).compute_score(wanted, said, verbose=0)
    out = {f"bleu_{n}": float(value) for n, value in enumerate(bleu, 1)}
    return out | {"rouge_l": float(Rouge().compute_score(wanted, said)[0])}


@cache
def meteor_scorer():
    """pycocoevalcap's METEOR, one Java process."""
    from pycocoevalcap.meteor.meteor import Meteor

    return Meteor()


def meteor(candidates: list[str], references: list[str]) -> float:
    """METEOR 1.5 of raw captions, normalised with articles; one reference each.

    Raises:
        RuntimeError: no Java, or the program fails.
    """
    if shutil.which("java") is None:
        raise RuntimeError("METEOR is a Java program, and there is no java here")
    scorer = meteor_scorer()
    said, wanted = ([normalise(c, articles=True) for c in captions] for captions in (candidates, references))
    said, wanted = ({i: [c] for i, c in enumerate(captions)} for captions in (said, wanted))
    try:
        return float(scorer.compute_score(wanted, said)[0])
    except (ValueError, OSError, KeyboardInterrupt) as error:  # no number came, the pipe is closed, or Ctrl-C
        meteor_scorer.cache_clear()
        if scorer.lock.locked():  # its end would wait for it
            scorer.lock.release()
        scorer.meteor_p.kill()
        scorer.meteor_p.stdin = BytesIO()  # closed again when the scorer goes
        if isinstance(error, KeyboardInterrupt):
            raise
        lines = scorer.meteor_p.stderr.read().decode(errors="replace").strip().splitlines()
        raise RuntimeError(f"METEOR's Java program failed: {lines[-1] if lines else error}") from error


def caption_scores(
    sets: dict[str, tuple[list[str], list[str]]], with_meteor: bool = True
) -> tuple[dict, dict[str, str]]:
    """All caption scores of several lists of captions, and what was not measured with its reason.

    Args:
        sets: name -> captions and references, both raw.
        with_meteor: METEOR takes seconds to start.
    """
    missing, out = {}, {}
    for name, (candidates, references) in sets.items():
        out[name] = score(candidates, references) | ngram_scores(candidates, references)
        if len(references) == 1:
            out[name]["cider"] = None
    if len(next(iter(sets.values()))[1]) == 1:
        missing["cider"] = "one picture: every word is in every reference, so all weights are 0"
    try:
        if not with_meteor:
            raise RuntimeError("--no-meteor")
        for name, (candidates, references) in sets.items():
            out[name]["meteor"] = meteor(candidates, references)
    except RuntimeError as error:
        missing["meteor"] = str(error)
        for scores in out.values():
            scores["meteor"] = None
    return out, missing


# ------------------------------------------------------------------------------------------------------ language, retrieval


class StrictCollator(CaptionCollator):
    """A collator that skips nothing: a row that cannot be read ends the evaluation."""

    def read(self, row: dict) -> tuple[torch.Tensor, str]:
        return decode_row(row, self.processor.image_processor)


def reference_batches(model, processor, rows, batch_size: int):
    """Batches of rows of `load_rows` on the model's device, each with the tokens of its longest caption, end token included; the captions
    end the lines."""
    collator = StrictCollator(processor, model.default_prompt(1)[0].tolist())
    for start in range(0, len(rows), batch_size):
        batch = collator(list(rows.select(range(start, min(start + batch_size, len(rows))))))
        batch = {name: x.to(model.device) for name, x in batch.items()}
        yield batch, int((batch["labels"] != -100).sum(1).max())


@torch.inference_mode()
def teacher_forced(model, processor, rows, batch_size: int = 16, align: bool = True) -> dict[str, torch.Tensor]:
    """Losses of the reference captions of rows of `load_rows`, each token given the picture and those before it.

    Args:
        align: also embed pictures and captions by the alignment heads.

    Returns:
        `loss` (N,) float64, nats of a caption and its end token, `tokens` (N,), and with `align` unit vectors `image_embeds` and
        `text_embeds` (N, C).
    """
    out = {"loss": [], "tokens": []} | ({"image_embeds": [], "text_embeds": []} if align else {})
    for batch, length in reference_batches(model, processor, rows, batch_size):
        image = {"image": model.get_image_features(batch.pop("pixel_values").to(model.dtype), return_dict=True)}
        if align:
            pairs = model(**batch, mm_encoder_outputs=image, return_alignment="only", use_fusion=False)
            out["image_embeds"].append(pairs.image_embeds.float().cpu())
            out["text_embeds"].append(pairs.text_embeds.float().cpu())
        labels = batch.pop("labels")[:, -length:]
        logits = model(**batch, mm_encoder_outputs=image, logits_to_keep=length + 1).logits[:, :-1].float()
        loss = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
        out["loss"].append(loss.cpu().double().sum(1))
        out["tokens"].append((labels != -100).sum(1).cpu())
    return {name: torch.cat(values) for name, values in out.items()}


def language_scores(losses: torch.Tensor, tokens: torch.Tensor, captions: list[str]) -> dict[str, float]:
    """lm_loss (nats a token), perplexity, bits_per_byte of the captions in UTF-8 and the number of tokens, ends included.

    Args:
        losses: nats of each caption, (N,).
        tokens: of each caption, (N,).
    """
    total, number = losses.double().sum(), int(tokens.sum())
    bits = float(total) / math.log(2) / sum(len(c.encode()) for c in captions)
    loss = total / number
    return {"lm_loss": float(loss), "perplexity": float(loss.exp()), "bits_per_byte": bits, "tokens": number}


def retrieval_scores(model, image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> tuple[dict, dict[str, str]]:
    """Recall at 1, 5 and 10 both ways and the InfoNCE loss over all R pairs (unit vectors, (R, C)), and what was not measured."""
    from training_microvlm import retrieval_recalls

    R, missing = len(image_embeds), {}
    ranks = [k for k in RANKS if k < R]
    for k in RANKS[len(ranks) :]:
        missing[f"recall at {k}"] = f"among {R} pictures it is always 1"
    recalls = retrieval_recalls(image_embeds, text_embeds, RANKS)
    if not (image_embeds.isfinite().all() and text_embeds.isfinite().all()):
        recalls = dict.fromkeys(recalls, math.nan)  # nothing is nearer than NaN: every recall would be 1
    out = {"pairs": R} | {name: v if int(name.rpartition("_")[2]) in ranks else None for name, v in recalls.items()}
    if R == 1:
        missing["alignment_loss"] = "one pair has no negatives"
        return out | {"alignment_loss": None, "chance_loss": None}, missing
    loss = float(model.contrastive_loss(image_embeds, text_embeds))
    return out | {"alignment_loss": loss, "chance_loss": math.log(R)}, missing


# ------------------------------------------------------------------------------------------------------ memory, speed, size


def benchmark(name: str):
    """A module of `benchmarks/`."""
    if (folder := str(ROOT / "benchmarks")) not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


@cache
def longest_name(tokenizer) -> str:
    """Of the names that facts may have, the one with the most tokens."""
    names = make_names(2 * benchmark("memory_recall").TRAINING_NAMES)
    return max(zip(names, text_ids(tokenizer, [f" {name}" for name in names])), key=lambda pair: len(pair[1]))[0]


def counted(facts: int) -> str:
    return "1 fact" if facts == 1 else f"{facts} facts"


def fact_fits(model, tokenizer, caption: str) -> bool:
    """Whether "This is Bimo the <what the caption names>." can be stored, whatever the name."""
    fact = text_ids(tokenizer, f"This is {longest_name(tokenizer)} the {caption_noun(caption)}.")
    return len(fact) < model.config.memory_config.max_content_tokens  # the end token too


@torch.no_grad()
def memory_scores(model, processor, rows, sizes: list[int], queries: int) -> tuple[list[dict], dict[int, dict], dict]:
    """Figures of `measure` in benchmarks/memory_recall.py for memories of several sizes, and the KL terms.

    Returns:
        A dictionary per size; per size the scope probabilities `known` and `unrelated` they come from; and what was not measured.

    Raises:
        UnreadableRowError: a row without caption or picture; the message names it.
    """
    if getattr(model.model, "memory", None) is None:
        return [], {}, {"memory": "the checkpoint has no memory (config.use_memory is false)"}
    if model.config.default_prompt_ids is None:
        return [], {}, {"memory": "the checkpoint has no default prompt to ask with (config.default_prompt_ids)"}
    recall, missing, out, scopes = benchmark("memory_recall"), {}, [], {}
    if len(rows) > MEMORY_POOL:
        rows = rows.select(range(MEMORY_POOL))
    fits = [i for i, row in enumerate(rows) if fact_fits(model, processor.tokenizer, row_caption(row))]
    if len(fits) < len(rows):
        missing[f"memory of {len(rows) - len(fits)} pictures"] = "their caption is too long for a fact"
        rows = rows.select(fits)
    if "concept" not in rows.column_names:
        rows = rows.add_column("concept", [normalise(caption) for caption in rows["caption"]])
    bench, most = recall.Bench(model, processor, rows), model.config.memory_config.max_items
    for size in dict.fromkeys(sizes):
        if size > min(len(rows), most):
            limit = f"a memory holds {most}" if size > most else f"there are only {len(rows)} pictures"
            missing[f"memory of {counted(size)}"] = limit
            continue
        kept: dict = {}
        try:
            found = recall.measure(bench, size, queries, ("new",), kept)
        except (ValueError, torch.linalg.LinAlgError) as error:  # what it holds is not finite
            missing[f"memory of {counted(size)}"] = str(error)
            continue
        scope, of_facts = found["unrelated"], found["new"]
        entry = {"facts": size, "questions": len(kept["known"]), "memory_kl": float(kept["memory"].kl().mean())}
        ids, features = model.default_prompt(1), bench.views[0][0][:1]
        query = model.model.get_memory_query(ids, None, features)
        entry["address_kl"] = float(model.model.read_memory(kept["memory"].select([0]), query).address_kl)
        entry |= {f"recall_{name}": of_facts.get(name) for name in ("same", "view", "words", "style")}
        entry |= {"word_f1": of_facts["word_f1"], "recall_no_memory": of_facts["no_memory"]}
        entry |= {"recall_nearest": of_facts["view_nearest"]}
        names = {"auroc": "scope_auroc", "eer": "scope_eer", "accuracy": "scope_accuracy"}
        names |= {name: name for name in ("false_recall", "unchanged")}
        entry |= {new: scope.get(old) for old, new in names.items()}
        entry |= {name: (found.get("forget") or {}).get(name) for name in ("forgotten", "kept", "kept_before")}
        if "auroc" not in scope:
            missing[f"scope of {counted(size)}"] = "every picture shares a word of its caption with a stored one"
        if size == 1:
            missing["forgetting of 1 fact"] = "half of one fact is none"
        if entry["recall_style"] is None:
            missing[f"other style, {counted(size)}"] = "no concept has a second picture that is not stored"
        out.append(entry)
        scopes[size] = {name: kept[name] for name in ("known", "unrelated") if name in kept}
    return out, scopes, missing


def speed_scores(model, processor, rows, batch_size: int = 16, repeats: int = 3) -> dict[str, float | int | str]:
    """Seconds to the first token of one picture, tokens a second behind it, and pictures a second in batches with reading and decoding;
    medians of `repeats` after one round that does not count.
    """
    time_generate = benchmark("overhead").time_generate
    rows = rows.select(range(min(SPEED_PICTURES, len(rows))))
    picture = decode_row(rows[0], processor.image_processor)[0]
    prompt = model.default_prompt(1)
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    first, rate, whole = [], [], []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        pixel_values = processor.image_processor([picture], return_tensors="pt")["pixel_values"].to(model.device)
        prepared = time.perf_counter() - start
        seconds, tokens = time_generate(model, NEW_TOKENS, **inputs, pixel_values=pixel_values)
        start = time.perf_counter()
        caption_rows(model, processor, rows, batch_size)
        whole.append(len(rows) / (time.perf_counter() - start))
        first.append(prepared + seconds)
        rate.append(tokens)
    return {
        "first_token_seconds": median(first[1:]),
        "tokens_per_second": median(rate[1:]),
        "pictures_per_second": median(whole[1:]),
        "batch_size": min(batch_size, len(rows)),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def weight_files(name: str, revision: str | None = None) -> list[Path]:
    """The safetensors files of a checkpoint in a folder or of the Hub, already loaded once.

    Raises:
        OSError: there are none.
    """
    options = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    for single in ("model.safetensors", "adapter_model.safetensors"):
        if (file := cached_file(name, single, **options)) is not None:
            return [Path(file)]
    index = cached_file(name, "model.safetensors.index.json", **options)
    if index is None:
        raise OSError(f"{name} has no safetensors files.")
    shards = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
    return [Path(cached_file(name, shard, revision=revision)) for shard in shards]


def size_scores(model, name: str, revision: str | None = None) -> dict[str, float | int]:
    """Parameters, a tied one once and packed ones as many as they stand for; bytes of the weights on the disk; bits a parameter."""
    config = type(model.config).from_dict(model.config.to_dict())
    with torch.device("meta"):
        parameters = sum(p.numel() for p in type(model)(config).parameters())
    stored = sum(file.stat().st_size for file in weight_files(name, revision))
    return {"parameters": parameters, "weights_bytes": stored, "bits_per_parameter": 8 * stored / parameters}


# ------------------------------------------------------------------------------------------------------ one data set


def open_rows(path: str, limit: int | None = None):
    """Rows of a data set as in `load_rows`; one on the Hub by its id, `owner/name`: the first `limit` rows of its train split.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no rows, no picture or caption column, a format that is not known, or a Hub id without limit.
    """
    from stream_microvlm import is_hub_dataset, load_stream, take_rows

    if is_hub_dataset(path):
        if limit is None:
            raise ValueError(f"{path} is no file or folder; as a data set of the Hub it needs --limit.")
        rows = take_rows(load_stream(path), limit)
    else:
        rows = load_rows(path, limit=limit)
    if not len(rows):
        raise ValueError(f"{path} has no rows.")
    return rows


def examples_of(number: int, rows: int) -> list[int]:
    """So many rows, evenly over the data set, the first among them."""
    number = min(number, rows)
    return [round(i * rows / number) for i in range(number)]


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


# ------------------------------------------------------------------------------------------------------ tables


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


def shown(value: float | int | str | None) -> str:
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
                table.append([where, *([name] if named else []), *(shown(values.get(key)) for key in labels)])
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
                    print(f"  {name:<18}" + "".join(f"{shown(result[name][k]):>9}" for k in order))
        elif title == "Memory":
            print(f"  {'memory':<34}" + "".join(f"{name:>11}" for name in columns))
            for key, label in labels.items():
                print(f"    {label:<32}" + "".join(f"{shown(entry.get(key)):>11}" for entry in columns.values()))
        else:
            print(f"  {title.lower():<18}" + ", ".join(f"{labels[k]} {shown(v)}" for k, v in columns[""].items()))
    for what, why in result["not_measured"].items():
        print(f"  not measured: {what}: {why}")


# ------------------------------------------------------------------------------------------------------ the model card

TASK = "image-text-to-text"
CARD_MEMORY = ("recall_same", "recall_view", "recall_words", "scope_accuracy", "scope_auroc", "scope_eer", "memory_kl")
FRONT = re.compile(r"\A(\ufeff?---[ \t]*(\r?\n))(.*?)(^---[ \t]*(?:\r?\n|\Z))", re.DOTALL | re.MULTILINE)
INDEX = re.compile(r"^model-index:.*?(?=^[^\s-]|\Z)", re.DOTALL | re.MULTILINE)


def card_metrics(result: dict) -> dict[str, tuple[str, float, dict[str, int]]]:
    """metric type -> label, value and sample size of what a model card says: captions, language, retrieval and memory of the model itself."""
    found, pictures = {}, {"pictures": result["pictures"]}
    for title, labels, columns in blocks(result):
        if title in ("Language", "Retrieval"):
            found |= {
                key: (labels[key], columns[""][key], pictures) for key in labels if key not in ("tokens", "pairs")
            }
        elif title == "Captions":
            found |= {key: (label, columns["model"][key], pictures) for key, label in labels.items()}
        elif title == "Memory":
            for entry in result["memory"]:
                facts, questions = entry["facts"], {"questions": entry["questions"]}
                found |= {
                    f"memory_{facts}_{k}": (f"{labels[k]}, {counted(facts)}", entry[k], questions) for k in CARD_MEMORY
                }
    return {key: figure for key, figure in found.items() if figure[1] is not None}


def card_group(metric: str) -> str | None:
    """The group that measures a metric of the card; None: it is not of this command."""
    if re.match(r"memory_\d+_", metric):
        return "memory"
    groups = {"captions": CAPTION_LABELS, "language": LANGUAGE_LABELS, "retrieval": RETRIEVAL_LABELS}
    return next((group for group, labels in groups.items() if metric in labels), None)


def split_of(path: str) -> str | None:
    """The split that a file's name says it is."""
    return next((name for name in ("train", "validation", "test") if Path(path).stem.startswith(name)), None)


def unusual(result: dict) -> dict[str, str]:
    """The dtype of a model that was not scored in float32."""
    return {"dtype": result["dtype"]} if result.get("dtype", "float32") != "float32" else {}


def card_results(results: dict[str, dict]) -> list[EvalResult]:
    """Entries of a card's `model-index`; a data set goes by its Hub id or path, of an absolute path by the file's name.

    Raises:
        ValueError: two data sets of one name.
    """
    from hub_microvlm import hub_id, shown as public

    names = {path: hub_id(path) or public(path) for path in results}
    for name, number in Counter(names.values()).items():
        if number > 1:
            raise ValueError(f"{number} data sets would both be called {name} in the card: give relative paths.")
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=names[path],
            dataset_name=names[path],
            dataset_split=split_of(path),
            metric_type=metric,
            metric_name=label,
            metric_value=round(value, 6),
            metric_args=sample | unusual(result),
        )
        for path, result in results.items()
        for metric, (label, value, sample) in card_metrics(result).items()
    ]


def read_card(path: str) -> tuple[str, dict]:
    """Text of a model card with its own line ends, and its metadata.

    Raises:
        OSError: it cannot be read.
        ValueError: its metadata is not a YAML mapping.
    """
    text = Path(path).read_bytes().decode("utf-8")
    front = FRONT.match(text)
    try:
        data = yaml.safe_load(front[3]) if front else {}
    except yaml.YAMLError as error:
        raise ValueError(f"the metadata of {path} is not YAML: {' '.join(str(error).split())}") from error
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise ValueError(f"the metadata of {path} is not a mapping.")
    return text, data


def card_with(path: str, results: dict[str, dict], groups, name: str) -> str:
    """The text of a model card with these results in its `model-index`, all else as it was.

    Earlier figures of the same data set go when their group is among `groups`; other data sets and metrics stay.

    Args:
        name: of the model, where the card has no `model-index` and no heading.

    Raises:
        OSError, ValueError: a card that cannot be read, or whose `model-index` cannot be.
    """
    text, data = read_card(path)
    new = card_results(results)
    if heading := re.search(r"^# (.+?)\s*$", FRONT.sub("", text), re.MULTILINE):  # the metadata may have comments
        name = heading[1]
    kept = []
    if data.get("model-index"):
        try:
            name, kept = model_index_to_eval_results(data["model-index"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the model-index of {path} is not of the Hub's form: {error!r}") from error
    measured = {(r.dataset_type, r.dataset_split) for r in new}
    kept = [
        r
        for r in kept
        if (r.task_type, r.dataset_type, r.dataset_split) not in {(TASK, *pair) for pair in measured}
        or card_group(r.metric_type) not in groups
    ]
    index = {"model-index": eval_results_to_model_index(name, [*kept, *new])}
    if front := FRONT.match(text):
        line_end, old = front[2], front[3]
        block = yaml_dump(index, sort_keys=False, line_break=line_end)
        place = INDEX.search(old)
        new_front = old[: place.start()] + block + old[place.end() :] if place else old + block
        try:
            good = yaml.safe_load(new_front) == data | index
        except yaml.YAMLError:
            good = False
        if not good:
            raise ValueError(f"a model-index cannot be written into the metadata of {path}: use YAML in block style.")
        return text[: front.start(3)] + new_front + text[front.end(3) :]
    return f"---\n{yaml_dump(index, sort_keys=False)}---\n{text}"


# ------------------------------------------------------------------------------------------------------ the report

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


def data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def picture_tag(picture: Image.Image, alt: str, size: int) -> str:
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


def roc(known: torch.Tensor, unrelated: torch.Tensor) -> tuple[list[float], list[float]]:
    """Share of unrelated and of known pictures let through at every threshold, from (0, 0) to (1, 1)."""
    at = torch.cat([known, unrelated]).unique().flip(0)
    share = lambda x: [0.0, *(float((x >= t).double().mean()) for t in at)]  # noqa: E731
    return share(unrelated), share(known)


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
    import visualize_hf

    found = []
    for i in examples_of(number, len(rows)):
        pixels, reference = decode_row(rows[i], processor.image_processor)
        picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        pixel_values = processor.image_processor([pixels], return_tensors="pt")["pixel_values"]
        mean_map = visualize_hf.pooling_attention(model, pixel_values)[0].mean(0)
        attention = visualize_hf.word_attention(model, processor, pixel_values, max_new_tokens=NEW_TOKENS)[0]
        text, facts = " ".join(attention.words), []
        if "captions" in more:
            text, right = more["captions"][i], more["word_f1"][i]
            facts.append(f"word F1 {right:.2f}")
        if "loss" in more:
            facts.append(f"loss of the reference {more['loss'][i]:.2f}")
        same = ' class="right"' if normalise(text) == normalise(reference) else ""
        sheets = picture_tag(picture, text, 320) + picture_tag(
            visualize_hf.overlay(picture, mean_map), "attention", 320
        )
        words = "".join(
            f"<div>{picture_tag(visualize_hf.overlay(picture, m), word, 96)}{html.escape(word)}</div>"
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
            + "".join(f"<td>{html.escape(c)}</td>" for c in (label, *(shown(v.get(key)) for v in columns.values())))
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


# ------------------------------------------------------------------------------------------------------ command line


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line, checked.

    Raises:
        SystemExit: 2, they are wrong: said before anything is computed.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=str(ROOT), help="checkpoint folder or Hub id")
    add("--revision", help="revision on the Hub")
    sources = "parquet file, webdataset tar, folder of pictures, or a data set's Hub id with --limit; each is scored"
    add("--data", nargs="+", required=True, help=sources)
    add("--metrics", nargs="+", choices=GROUPS, default=list(DEFAULT_GROUPS), help="default: %(default)s")
    add("--memory", action="store_true", help="also the group memory")
    add("--facts", type=positive, nargs="+", default=[1, 4, 16, 64], help="sizes of memories (default: %(default)s)")
    add("--queries", type=positive, default=32, help="questions of each sort per memory size (default: %(default)s)")
    add("--batch-size", type=positive, default=16)
    add("--device", type=usable_device, default="cpu", help="cpu, cuda, mps (default: %(default)s)")
    what = "of weights that are not packed; auto: the checkpoint's (default: %(default)s)"
    add("--dtype", default="float32", choices=DTYPES, help=what)
    add("--limit", type=positive, help="only the first so many rows")
    add("--show", type=not_negative, default=0, help="print so many captions beside their references")
    add("--no-meteor", action="store_true", help="leave METEOR out: its Java program takes seconds to start")
    add("--yardstick", metavar="TRAIN", help="training data for the nearest-neighbour caption")
    add("--yardstick-exclude-copyleft", action="store_true")
    add("--json", metavar="FILE", help="write the scores")
    add("--markdown", metavar="FILE", help="write the tables")
    add("--html", metavar="FILE", help="write a report with plots and pictures, one file")
    add("--examples", type=positive, default=12, help="pictures in the report, per data set (default: %(default)s)")
    add("--card", metavar="README.md", help="write the scores into this model card's metadata")
    options = parser.parse_args(arguments)
    options.data = list(dict.fromkeys(options.data))
    options.metrics += ["memory"] if options.memory and "memory" not in options.metrics else []
    outputs = {name: getattr(options, name) for name in ("json", "markdown", "html", "card")}
    sources = [*options.data, *filter(None, [options.yardstick])]
    inputs = {file for source in sources for file in (source, *glob(source, recursive=True))}
    folders = [os.path.realpath(source) + os.sep for source in sources if os.path.isdir(source)]
    inputs |= {
        p
        for p in filter(None, outputs.values())
        if os.path.exists(p) and os.path.realpath(p).startswith(tuple(folders))
    }
    try:
        check_outputs(inputs, **outputs)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    needs = {"matplotlib": options.html, "pycocoevalcap": "captions" in options.metrics}
    for module, needed in needs.items():
        if needed and importlib.util.find_spec(module) is None:
            parser.error(f"{'--html' if module == 'matplotlib' else 'captions'} needs {module}: pip install '.[eval]'")
    if options.yardstick and "captions" not in options.metrics:
        parser.error("--yardstick needs the group captions")
    return options


def not_negative(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, got {text!r}")
    return int(text)


def write_text(path: str, text: str) -> None:
    with replacing(path, "wb") as file:
        file.write(text.encode())


def run(options: argparse.Namespace) -> None:
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
            write_text(options.json, json.dumps(results, indent=1, allow_nan=False))
        if options.markdown:
            write_text(options.markdown, markdown(results))
        if options.card:
            write_text(options.card, card_with(options.card, results, options.metrics, name))
        if options.html:
            examples = example_tags(model, processor, rows, more, options.examples)
            sections.append(html_section(path, results[path], plots(results[path], more), examples))
            write_text(options.html, html_page(name, sections))


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        run(options)
    except (OSError, ValueError, SafetensorError, TarError, DatasetsError) as error:
        print(f"evaluate_hf.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("evaluate_hf.py: interrupted; data sets scored until then are written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
