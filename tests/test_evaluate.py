"""The scores on cases counted by hand, captions in batches, and the command on a tiny checkpoint."""

import base64
import json
import math
import os
from html.parser import HTMLParser
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
import yaml
from conftest import IMAGE_ID, ROOT, microvlm
from datasets import load_dataset
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index
from toy_data import CAPTIONS, pairs, toy_checkpoint, toy_model, toy_processor, use_cache, write_folder, write_parquet

from microvlm.cli import Group
from microvlm.data.collators import CaptionCollator
from microvlm.data.episodes import make_names
from microvlm.data.rows import UnreadableRowError, decode_row, load_rows
from microvlm.evaluate import run as run_module
from microvlm.evaluate.captions import caption_rows, caption_scores
from microvlm.evaluate.card import card_results, card_with
from microvlm.evaluate.language import language_scores, teacher_forced
from microvlm.evaluate.memory import longest_name, memory_scores
from microvlm.evaluate.report import (
    CAPTION_LABELS,
    blocks,
    example_rows,
    html_page,
    markdown,
    page_section,
    print_result,
)
from microvlm.evaluate.retrieval import retrieval_scores
from microvlm.metrics import auroc, cider, equal_error_rate, ngram_scores, normalise, roc, score, word_f1
from microvlm.model import PackedConfig
from microvlm.pack import pack
from microvlm.tables import format_value
from microvlm.teacher import nearest_neighbours


@pytest.fixture
def rows(monkeypatch, tmp_path):
    use_cache(monkeypatch, tmp_path / "cache")
    return load_rows(str(write_parquet(tmp_path / "toy.parquet", pairs())))


@pytest.mark.parametrize(
    "caption,expected",
    [
        ("A red Square.", "red square"),
        ("the cat, an owl and THE dog!", "cat owl and dog"),
        ("T-shirt (blue)", "t shirt blue"),
        ("  two   birds\n", "two birds"),
        ("a theatre another", "theatre another"),
        ("Café №5", "café 5"),
        ("The", ""),
        ("", ""),
    ],
)
def test_normalise(caption, expected):
    assert normalise(caption) == expected


@pytest.mark.parametrize(
    "candidate,reference,expected",
    [
        ("red square", "red square", 1.0),
        ("square red", "red square", 1.0),  # a multiset: order does not count
        ("red", "red square", 2 / 3),  # precision 1, recall 1/2
        ("red red red", "red square", 2 / 5),  # the second and third "red" are wrong
        ("red blue", "red red blue blue", 2 / 3),
        ("red red", "red red", 1.0),
        ("green circle", "red square", 0.0),
        ("", "red square", 0.0),
        ("", "", 0.0),
    ],
)
def test_word_f1(candidate, reference, expected):
    assert word_f1(candidate, reference) == pytest.approx(expected)
    assert word_f1(reference, candidate) == pytest.approx(expected)


def test_cider():
    references = [normalise(c) for c in CAPTIONS]
    identical = cider(references, references)
    assert identical > 3  # 10 for every caption of four words and more, less for shorter ones
    assert cider(["nothing of this"] * 8, references) == 0
    assert cider([""] * 8, references) == 0
    some = cider(references[:4] + ["nothing of this"] * 4, references)
    assert 0 < some < identical
    assert cider(references[1:] + references[:1], references) < some
    four = ["one two three four", "five six seven eight"]
    assert cider(four, four) == pytest.approx(10)


def test_score_of_toy_lists():
    candidates = ["A red square!", "the blue disc", "a red square", "green"]
    references = ["red square", "a blue circle", "a green square", "Green."]
    s = score(candidates, references)
    assert list(s) == ["exact", "word_f1", "cider", "distinct"]
    assert s["exact"] == 2 / 4
    assert s["word_f1"] == pytest.approx((1 + 1 / 2 + 1 / 2 + 1) / 4)
    assert s["distinct"] == 3 / 4
    lower = ["a red square", "the blue disc", "a red square", "green"]  # articles stay
    assert s["cider"] == cider(lower, ["red square", "a blue circle", "a green square", "green"]) > 0


def test_captions_in_batches_are_those_of_single_rows(rows):
    model, processor = toy_model(), toy_processor()
    model.config.default_prompt_ids = [2, IMAGE_ID, *processor.tokenizer("green")["input_ids"], 3]  # said by nobody
    single, references = caption_rows(model, processor, rows, batch_size=1, max_new_tokens=6)
    assert references == CAPTIONS
    lengths = [len(caption) for caption in single]
    assert len(set(single)) > 2 and min(lengths) < max(lengths) / 2  # some end before the others of their batch
    assert not any("green" in caption for caption in single)  # the prompt is cut off
    for size in (3, 8, 16):
        assert caption_rows(model, processor, rows, size, 6) == (single, references)
    inputs = processor.image_processor(
        [decode_row(row, processor.image_processor)[0] for row in rows], return_tensors="pt"
    )
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, model.default_prompt(1).shape[1] :]
    assert [c.strip() for c in processor.batch_decode(out, skip_special_tokens=True)] == single


def test_unreadable_row_ends_the_evaluation_and_is_named(monkeypatch, tmp_path):
    use_cache(monkeypatch, tmp_path / "cache")
    bad = pairs()
    bad[5]["image"]["bytes"] = b"no picture"
    rows = load_rows(str(write_parquet(tmp_path / "bad.parquet", bad)))
    with pytest.raises(UnreadableRowError, match="^row toy-5: picture cannot be read"):
        caption_rows(toy_model(), toy_processor(), rows, 8, 2)


def test_command(tmp_path, monkeypatch, capsys):
    use_cache(monkeypatch, tmp_path / "cache")
    model, data = toy_checkpoint(tmp_path / "model"), write_parquet(tmp_path / "toy.parquet", pairs())
    json_file = tmp_path / "scores.json"
    few = ["--limit", 6, "--batch-size", 4]
    assert microvlm("evaluate", "--model", model, "--data", data, *few, "--json", json_file) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{data} (6 pictures)"
    assert lines[1].split() == ["captions", *" ".join(CAPTION_LABELS.values()).split()]
    entry = json.loads(json_file.read_text())[str(data)]
    assert entry["pictures"] == 6
    for line, (name, label) in zip(
        lines[2:4], (("model", "model"), ("shuffled", "model, others' references")), strict=True
    ):
        values = ["–" if entry[name][key] is None else f"{entry[name][key]:.3f}" for key in CAPTION_LABELS]
        assert set(entry[name]) == set(CAPTION_LABELS) and line.split() == [*label.split(), *values]
    assert entry["model"]["distinct"] == entry["shuffled"]["distinct"] > 0
    assert set(entry) == {"pictures", "dtype", "model", "shuffled", "language", "retrieval", "size", "not_measured"}
    assert [line.split()[0] for line in lines[4:7]] == ["language", "retrieval", "size"]
    assert any(line.startswith("  not measured: recall at 10: ") for line in lines)
    assert os.listdir(tmp_path) and not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_nearest_neighbours():
    generator = torch.Generator().manual_seed(0)
    train, queries = torch.randn(9, 5, generator=generator), torch.randn(40, 5, generator=generator)
    a, b = train.double().numpy(), queries.double().numpy()  # against loops in float64

    def cosine(x, y):
        return (x @ y) / ((x @ x) * (y @ y)) ** 0.5

    expected = [max(range(9), key=lambda i: cosine(q, a[i])) for q in b]
    assert nearest_neighbours(train, queries) == expected
    assert nearest_neighbours(train * torch.arange(1, 10).view(-1, 1), queries) == expected  # length is nothing


def test_yardstick_copies_the_caption_of_the_closest_picture(monkeypatch, tmp_path):
    """Every picture is closest to itself; without its own row the yardstick has to copy another caption."""
    model = toy_checkpoint(tmp_path / "model")
    data, half = tmp_path / "toy.parquet", tmp_path / "half.parquet"
    write_parquet(data, pairs())
    write_parquet(half, pairs()[:4])
    use_cache(monkeypatch, tmp_path / "cache")
    for train, exact in ((data, 1.0), (half, 0.5)):
        json_file = tmp_path / f"{train.stem}.json"
        command = ["--model", str(model), "--data", str(data), "--json", str(json_file)]
        assert main([*command, "--metrics", "captions", "--yardstick", str(train)]) == 0
        assert json.loads(json_file.read_text())[str(data)]["nearest_neighbour"]["exact"] == exact


# ------------------------------------------------------------------------------------------------------ scores
# against references


def test_bleu_and_rouge_by_hand():
    """Two pairs; corpus counts: 6 of 6 words, 3 of 4 pairs of words, 1 of 2 triples; candidates have 6 words,
    references 7."""
    scores = ngram_scores(["A red square!", "blue big disc"], ["a red square on", "big disc blue"])
    brevity = math.exp(1 - 7 / 6)
    precision = (6 / 6, 3 / 4, 1 / 2, 1e-15 / 1e-9)  # no four words in a row: 0 of 0, as pycocoevalcap smooths it
    for n in (1, 2, 3, 4):
        expected = brevity * math.prod(precision[:n]) ** (1 / n)
        assert scores[f"bleu_{n}"] == pytest.approx(expected, rel=1e-6)

    def f(p, r):
        return (1 + 1.2**2) * p * r / (r + 1.2**2 * p)

    assert scores["rouge_l"] == pytest.approx((f(3 / 3, 3 / 4) + f(2 / 3, 2 / 3)) / 2)
    perfect = ngram_scores(["one two three four"], ["One two, three four."])
    assert perfect["rouge_l"] == 1 and perfect["bleu_4"] == pytest.approx(1, abs=1e-4)


def test_captions_that_say_nothing_are_scored():
    scores, missing = caption_scores({"model": (["", ""], ["a cat", "!"])})
    assert scores["model"]["bleu_1"] < 1e-6 and scores["model"]["exact"] == 0.5 and not missing


def test_perplexity_is_that_of_a_loop_over_the_tokens(rows):
    model, processor = toy_model(), toy_processor()
    forced = teacher_forced(model, processor, rows, batch_size=3)
    total, tokens = [], []
    prompt, eos = model.default_prompt(1)[0].tolist(), processor.tokenizer.eos_token_id
    for row in rows:
        picture, caption = decode_row(row, processor.image_processor)
        pixel_values = processor.image_processor([picture], return_tensors="pt")["pixel_values"]
        line, answer = list(prompt), [*processor.tokenizer(caption, add_special_tokens=False)["input_ids"], eos]
        nats = 0.0
        for token in answer:  # one pass per token, nothing padded, nothing shifted
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([line]), pixel_values=pixel_values).logits[0, -1].double()
            nats -= float(logits.log_softmax(-1)[token])
            line.append(token)
        total.append(nats)
        tokens.append(len(answer))
    torch.testing.assert_close(forced["loss"], torch.tensor(total, dtype=torch.float64), rtol=1e-4, atol=1e-4)
    assert forced["tokens"].tolist() == tokens
    scores = language_scores(forced["loss"], forced["tokens"], CAPTIONS)
    assert scores["perplexity"] == pytest.approx(math.exp(sum(total) / sum(tokens)), rel=1e-4)
    assert scores["lm_loss"] == pytest.approx(sum(total) / sum(tokens), rel=1e-4)
    length = sum(len(c.encode()) for c in CAPTIONS)
    assert scores["bits_per_byte"] == pytest.approx(sum(total) / math.log(2) / length, rel=1e-4)


def test_alignment_embeddings_are_those_of_training(rows):
    """In batches and padded, they are the forward pass's with labels on the caption."""
    model, processor = toy_model(), toy_processor()
    forced = teacher_forced(model, processor, rows, batch_size=3)
    collator = CaptionCollator(processor, model.default_prompt(1)[0].tolist())
    with torch.no_grad():
        out = model(**collator(list(rows)), return_alignment=True)
    for name in ("image_embeds", "text_embeds"):
        torch.testing.assert_close(forced[name], getattr(out, name), rtol=1e-4, atol=1e-5)
    assert "image_embeds" not in teacher_forced(model, processor, rows.select(range(2)), align=False)


def test_retrieval_against_counting_in_float64():
    g = torch.Generator().manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(12, 6, generator=g), dim=-1) for _ in range(2))
    image = torch.nn.functional.normalize(image + text, dim=-1)
    scores, missing = retrieval_scores(toy_model(), image, text)
    assert not missing and scores["pairs"] == 12
    similarity = (image.double() @ text.double().T).numpy()
    for name, matrix in (("image_to_text", similarity), ("text_to_image", similarity.T)):
        places = [sorted(row, reverse=True).index(row[i]) for i, row in enumerate(matrix)]
        assert 0 < max(places)
        for k in (1, 5, 10):
            assert scores[f"{name}_recall_at_{k}"] == pytest.approx(sum(p < k for p in places) / 12)
    temperature = toy_model().config.alignment_config.temperature
    nats = 0.0
    for matrix in (similarity / temperature, similarity.T / temperature):
        nats += sum(math.log(sum(math.exp(x) for x in row)) - row[i] for i, row in enumerate(matrix)) / 24
    assert scores["alignment_loss"] == pytest.approx(nats, rel=1e-5)
    assert scores["chance_loss"] == pytest.approx(math.log(12))


@pytest.mark.parametrize("number", [1, 2, 5])
def test_retrieval_among_few_pictures_says_what_is_trivial(number):
    unit = torch.nn.functional.normalize(torch.randn(number, 4), dim=-1)
    scores, missing = retrieval_scores(toy_model(), unit, unit)
    for k in (1, 5, 10):
        assert (scores[f"image_to_text_recall_at_{k}"] is None) == (k >= number) == (f"recall at {k}" in missing)
    assert (scores["alignment_loss"] is None) == (number == 1)


def test_scope_curve_holds_auroc_and_equal_error_rate():
    """The area under the report's curve is the benchmark's AUROC, its crossing with the other diagonal the equal
    error rate."""
    known, unrelated = torch.tensor([0.9, 0.8, 0.8, 0.3]), torch.tensor([0.1, 0.3, 0.5, 0.85])
    x, y = roc(known, unrelated)
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1) and x == sorted(x) and y == sorted(y)
    area = sum((b - a) * (c + d) / 2 for a, b, c, d in zip(x, x[1:], y, y[1:]))
    wins = sum((p > n) + 0.5 * (p == n) for p in known.tolist() for n in unrelated.tolist()) / 16
    assert area == pytest.approx(wins) == pytest.approx(auroc(known, unrelated))
    assert min(abs(1 - b - a) for a, b in zip(x, y)) == pytest.approx(0)
    assert [a for a, b in zip(x, y) if abs(1 - b - a) < 1e-6] == [pytest.approx(0.25)]
    assert equal_error_rate(known, unrelated) == pytest.approx(0.25)


# ------------------------------------------------------------------------------------------------------ the command

MEMORY = {"num_slots": 16, "num_content_slots": 8, "max_content_tokens": 48, "num_memory_tokens": 8, "max_items": 32}
KINDS = ["square", "circle", "square", "bar", "circle", "circle", "blue", "square"]


class Page(HTMLParser):
    """What a page says, and what it loads."""

    def __init__(self, text: str):
        super().__init__()
        self.words, self.pictures, self.links, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        if tag == "img":
            self.pictures.append(attrs["src"])
        self.links += [attrs[name] for name in ("href", "src") if name in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def command(model, *data, **options) -> list[str]:
    out = ["--model", str(model)]
    for name, value in {"data": list(data), **options}.items():
        for each in value if isinstance(value, list) else [value]:
            out += [f"--{name.replace('_', '-')}", str(each)]
    return out


def main(arguments: list[str]) -> int:
    return microvlm("evaluate", *arguments)


def some(*metrics: str) -> SimpleNamespace:
    """Options of `evaluate` for these groups."""
    return SimpleNamespace(metrics=list(metrics), facts=[1, 4, 16, 64], queries=32, batch_size=16, html=None)


@pytest.fixture(scope="module")
def full_run(tmp_path_factory):
    """Everything, on two sets, by a model with a memory: the folder with scores.json, scores.md, report.html,
    README.md."""
    folder = tmp_path_factory.mktemp("full")
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_cache(monkeypatch, folder / "cache")
        model = toy_checkpoint(folder / "model", use_memory=True, memory_config=MEMORY)
        a = write_parquet(folder / "validation_a.parquet", pairs(concept=KINDS))
        b = write_parquet(folder / "test_b.parquet", pairs(5))
        (folder / "README.md").write_bytes(
            b"---\r\nlicense: mit # mine\r\ntags: [a,  b]\r\n---\r\n# Toy\r\n\r\nText.\r\n"
        )
        files = {"json": "scores.json", "markdown": "scores.md", "html": "report.html", "card": "README.md"}
        options = {name: folder / file for name, file in files.items()}
        arguments = command(model, a, b, metrics=list(Group), facts=[1, 2, 20], queries=2, examples=2, **options)
        assert main(arguments) == 0
    return folder


def test_every_group_is_in_every_output(full_run):
    results = json.loads((full_run / "scores.json").read_text())
    assert [entry["pictures"] for entry in results.values()] == [8, 5]
    page = Page((full_run / "report.html").read_text())
    tables = (full_run / "scores.md").read_text()
    for entry in results.values():
        assert entry["speed"]["tokens_per_second"] > 0 and entry["speed"]["first_token_seconds"] > 0
        assert [memory["facts"] for memory in entry["memory"]] == [1, 2]
        assert "there are only" in entry["not_measured"]["memory of 20 facts"]
        assert "half of one fact" in entry["not_measured"]["forgetting of 1 fact"]
        for memory in entry["memory"]:
            assert 0 <= memory["recall_view"] <= 1 and memory["memory_kl"] > 0
            assert (memory["forgotten"] is None) == (memory["facts"] == 1)
        assert entry["memory"][1]["memory_kl"] > entry["memory"][0]["memory_kl"]
        for title, labels, columns in blocks(entry):
            assert f"## {title}\n" in tables and title in page.words
            for values in columns.values():
                for key, label in labels.items():
                    assert label in page.words and label in tables
                    assert format_value(values.get(key)) in page.words and format_value(values.get(key)) in tables


def test_the_report_needs_no_other_file_and_shows_captions_beside_references(full_run):
    text = (full_run / "report.html").read_text()
    page = Page(text)
    assert not page.open and 'name="viewport"' in text
    assert page.links and all(link.startswith("data:image/") for link in page.links)
    plots = [base64.b64decode(p.split(",")[1]) for p in page.pictures if p.startswith("data:image/svg+xml")]
    assert len(plots) == 10  # of each set: captions, losses, recall, ROC, probabilities
    for plot in plots:
        assert ElementTree.fromstring(plot).tag.endswith("svg")
    assert {CAPTIONS[0], CAPTIONS[4], CAPTIONS[2]} <= set(page.words)  # evenly over 8, and over 5
    assert page.words.count("Examples") == 2


def test_the_table_of_markdown_is_a_table(full_run):
    for part in (full_run / "scores.md").read_text().split("## ")[1:]:
        lines = [line for line in part.splitlines() if line.startswith("|")]
        assert len({line.count("|") - line.count("\\|") for line in lines}) == 1 and len(lines) > 2


def test_the_card_gets_a_model_index_and_keeps_the_rest(full_run):
    raw = (full_run / "README.md").read_bytes()
    assert raw.startswith(b"---\r\nlicense: mit\r\ntags:\r\n- a\r\n- b\r\nmodel-index:\r\n")
    assert raw.endswith(b"---\r\n# Toy\r\n\r\nText.\r\n")
    assert raw.count(b"\n") == raw.count(b"\r\n")
    card = ModelCard.load(full_run / "README.md")
    assert card.data.model_name == "Toy" and card.data.license == "mit"
    results = json.loads((full_run / "scores.json").read_text())
    for path, entry in results.items():
        name = os.path.basename(path)
        found = {r.metric_type: r for r in card.data.eval_results if r.dataset_name == name}
        assert found["exact"].metric_value == round(entry["model"]["exact"], 6)
        assert found["perplexity"].metric_value == pytest.approx(entry["language"]["perplexity"], abs=1e-6)
        assert found["memory_2_recall_view"].metric_value == round(entry["memory"][1]["recall_view"], 6)
        assert found["exact"].metric_args == {"pictures": entry["pictures"]}
        assert found["memory_2_recall_view"].metric_args == {"questions": entry["memory"][1]["questions"]}
        assert found["memory_1_memory_kl"].metric_name.endswith(", 1 fact")
        assert found["exact"].dataset_split == ("validation" if name.startswith("validation") else "test")
        assert "text_to_image_recall_at_10" not in found  # not measured: not zero


def sample(**values) -> dict:
    entry = {
        "pictures": 4,
        "not_measured": {},
        "language": {"lm_loss": 1.0, "perplexity": math.e, "bits_per_byte": 2.0, "tokens": 9},
    }
    return {"data/validation.parquet": entry | values}


def updated(card, results: dict, groups: list[str]) -> str:
    return str(card_with(str(card), results, groups, "x"))


def test_a_second_run_replaces(tmp_path):
    card, captions = tmp_path / "README.md", dict.fromkeys(CAPTION_LABELS, 0.5)
    card.write_text("# Bird\n\n---\n\nA rule above.\n")
    first = updated(card, sample(model=captions), ["captions", "language"])
    assert first.endswith("---\n# Bird\n\n---\n\nA rule above.\n")
    card.write_text(first)
    assert updated(card, sample(model=captions), ["captions", "language"]) == first
    worse = sample(model=captions | {"exact": 0.25, "rouge_l": None})
    card.write_text(updated(card, worse, ["captions", "language"]))
    values = {r.metric_type: r.metric_value for r in ModelCard.load(card).data.eval_results}
    assert len(values) == len(ModelCard.load(card).data.eval_results) == 11
    assert values["exact"] == 0.25 and "rouge_l" not in values  # what is no longer measured goes
    card.write_text(updated(card, sample(), ["language"]))
    kept = {r.metric_type for r in ModelCard.load(card).data.eval_results}
    assert {"exact", "cider", "perplexity"} <= kept  # another group's figures stay


def test_a_comment_in_the_metadata_is_no_heading(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("---\n# For reference, see the spec\nlicense: mit\n---\n\n# Bird\n")
    captions = dict.fromkeys(CAPTION_LABELS, 0.5)
    card.write_text(updated(card, sample(model=captions), ["captions"]))
    assert ModelCard.load(card).data.to_dict()["model-index"][0]["name"] == "Bird"


def test_broken_files_are_said(tmp_path, capsys):
    (tmp_path / "broken.tar").write_bytes(b"no archive at all")
    assert main(["--data", str(tmp_path / "broken.tar"), "--model", str(ROOT)]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("microvlm: ")


def test_other_results_of_a_card_stay(tmp_path):
    card = tmp_path / "README.md"
    other = EvalResult("image-text-to-text", "flickr", "Flickr", "exact", 0.9)
    own = EvalResult(
        "image-text-to-text",
        "data/validation.parquet",
        "data/validation.parquet",
        "speed_of_light",
        3.0,
        dataset_split="validation",
    )
    index = yaml.safe_dump({"model-index": eval_results_to_model_index("Named", [other, own])})
    card.write_text(f"---\nlicense: mit\n{index}# a comment\nlanguage: en\n---\n# Heading\n")
    text = updated(card, sample(), ["language"])
    assert text.startswith("---\nlicense: mit\nlanguage: en\nmodel-index:\n") and text.endswith("---\n# Heading\n")
    card.write_text(text)
    data = ModelCard.load(card).data
    assert data.model_name == "Named"
    assert {(r.dataset_type, r.metric_type) for r in data.eval_results} >= {
        ("flickr", "exact"),
        (own.dataset_type, "speed_of_light"),
    }
    assert len(data.eval_results) == 5


@pytest.mark.parametrize(
    "text,message",
    [
        ("---\na: [1\n---\n", "cannot be read: while parsing"),
        ("---\n- a\n---\n", "should be a dict"),
        ("---\nmodel-index:\n- nothing: 1\n---\n", "Invalid `model_index`"),
    ],
)
def test_a_card_that_cannot_be_read_is_refused(tmp_path, text, message):
    card = tmp_path / "README.md"
    card.write_text(text)
    with pytest.raises(ValueError, match=f"^the metadata of {card} .*{message}"):
        updated(card, sample(), ["language"])
    assert card.read_text() == text


def test_two_sets_of_one_name_are_refused():
    results = {"/a/x.parquet": sample()["data/validation.parquet"], "/b/x.parquet": sample()["data/validation.parquet"]}
    with pytest.raises(ValueError, match="2 data sets would both be called x.parquet"):
        card_results(results)


def test_without_memory_and_alignment_the_reason_is_said(monkeypatch, tmp_path, capsys):
    use_cache(monkeypatch, tmp_path / "cache")
    model, processor = toy_model(), toy_processor()
    model.model.alignment = None
    rows = load_rows(str(write_parquet(tmp_path / "toy.parquet", pairs(3))))
    result, _ = run_module.evaluate(model, processor, rows, some("retrieval", "memory", "language"))
    assert "no memory" in result["not_measured"]["memory"] and not result["memory"]
    assert "no alignment heads" in result["not_measured"]["retrieval"] and "retrieval" not in result
    assert result["language"]["perplexity"] > 1
    print_result("toy", result)
    assert "not measured: memory: the checkpoint has no memory" in capsys.readouterr().out
    assert "no alignment heads" in markdown({"toy": result})
    assert "no alignment heads" in html_page("toy", [page_section("toy", result, [], [])])


def test_captions_too_long_for_a_fact_are_left_out_and_counted(monkeypatch, tmp_path):
    use_cache(monkeypatch, tmp_path / "cache")
    model, processor = toy_model(use_memory=True, memory_config=MEMORY), toy_processor()
    rows = pairs(6)
    rows[1]["caption"] = "a " + "very " * 40 + "long red square"
    rows = load_rows(str(write_parquet(tmp_path / "toy.parquet", rows)))
    found, scopes, missing = memory_scores(model, processor, rows, [1, 6], 2)
    assert [memory["facts"] for memory in found] == [1] and 1 in scopes
    assert "too long" in missing["memory of 1 pictures"] and "only 5 pictures" in missing["memory of 6 facts"]
    name = longest_name(processor.tokenizer)
    names = make_names(8000)
    assert max(len(processor.tokenizer(f" {n}")["input_ids"]) for n in names[::97]) <= len(
        processor.tokenizer(f" {name}")["input_ids"]
    )


def test_one_picture_is_enough(monkeypatch, tmp_path):
    use_cache(monkeypatch, tmp_path / "cache")
    model, data = toy_checkpoint(tmp_path / "model"), write_parquet(tmp_path / "one.parquet", pairs(1))
    files = {name: tmp_path / f"out.{name}" for name in ("json", "markdown", "html")}
    assert main(command(model, data, **files)) == 0
    entry = json.loads(files["json"].read_text())[str(data)]
    assert {"cider", "shuffled", "recall at 1", "alignment_loss"} <= set(entry["not_measured"])
    assert entry["model"]["cider"] is None and "shuffled" not in entry and entry["language"]["tokens"] > 1
    assert Page(files["html"].read_text()).words


def test_a_packed_checkpoint_is_scored(monkeypatch, tmp_path):

    use_cache(monkeypatch, tmp_path / "cache")
    model, data = toy_model("bitnet"), write_parquet(tmp_path / "toy.parquet", pairs())
    parameters = sum(p.numel() for p in model.parameters())
    modules = {r"model\.language_model\.layers\.\d+\..*_proj": {"format": "ternary", "group_size": "row"}}
    pack(model, PackedConfig(modules))
    model.save_pretrained(tmp_path / "model")
    toy_processor().save_pretrained(tmp_path / "model")
    scores, report = tmp_path / "scores.json", tmp_path / "report.html"
    assert main(command(tmp_path / "model", data, json=scores, html=report, examples=1)) == 0
    entry = json.loads(scores.read_text())[str(data)]
    assert entry["size"]["parameters"] == parameters
    assert entry["size"]["weights_bytes"] == (tmp_path / "model/model.safetensors").stat().st_size
    assert entry["size"]["bits_per_parameter"] < 32 and entry["language"]["perplexity"] > 1


def test_another_dtype(monkeypatch, tmp_path, full_run):
    use_cache(monkeypatch, tmp_path / "cache")
    model = toy_checkpoint(tmp_path / "model", use_memory=True, memory_config=MEMORY)
    data, scores = write_parquet(tmp_path / "toy.parquet", pairs(concept=KINDS)), tmp_path / "scores.json"
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: mit\n---\n")
    files = {"json": scores, "card": card, "html": tmp_path / "report.html"}
    options = {"facts": [1, 2], "queries": 2, "examples": 1, **files}
    arguments = command(model, data, metrics=list(Group), dtype="bfloat16", device="cpu", **options)
    assert main(arguments) == 0
    entry = json.loads(scores.read_text())[str(data)]
    assert (entry["speed"]["dtype"], entry["speed"]["device"]) == ("bfloat16", "cpu")
    assert [m["facts"] for m in entry["memory"]] == [1, 2] and entry["dtype"] == "bfloat16"
    metrics = yaml.safe_load(card.read_text().split("---")[1])["model-index"][0]["results"][0]["metrics"]
    assert {m["args"]["dtype"] for m in metrics} == {"bfloat16"}
    in_float32 = json.loads((full_run / "scores.json").read_text())
    other = next(value for name, value in in_float32.items() if name.endswith("validation_a.parquet"))
    assert other["dtype"] == other["speed"]["dtype"] == "float32"
    assert "dtype" not in (full_run / "README.md").read_text()
    close = entry["language"]["lm_loss"] - other["language"]["lm_loss"]  # the same model and pictures
    assert 0 < abs(close) < 0.05


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--metrics", "taste"], "'taste' is not one of"),
        (["--limit", "0"], "Invalid value for '--limit'"),
        (["--facts", "-1"], "Invalid value for '--facts'"),
        (["--device", "toaster"], "Invalid value for '--device': cannot use 'toaster': "),
        (["--device", "meta"], "Invalid value for '--device': cannot use 'meta': "),
        (["--device", "cuda:99"], "Invalid value for '--device': cannot use 'cuda:99': "),
        (["--dtype", "int3"], "'int3' is not one of"),
    ],
)
def test_wrong_use_is_said_at_once(arguments, message, capsys):
    assert main(["--data", "x.parquet", *arguments]) == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--html", "nowhere/report.html"], "there is no folder"),
        (["--metrics", "size", "--yardstick", "x.parquet"], "--yardstick needs the group captions"),
        (["--json", str(ROOT)], f"cannot write {ROOT}: it is not a regular file."),
        (["--card", "n" * 250], "File name too long."),
        (["--json", "x.out", "--card", "./x.out"], "--json and --card are the same file, ./x.out."),
        (["--data", "d.parquet", "--json", "./d.parquet"], "--json would be written over the input ./d.parquet."),
    ],
)
def test_outputs_are_checked_first(arguments, message, capsys):
    assert main(["--data", "x.parquet", *arguments]) == 1 and message in capsys.readouterr().err


def test_data_that_is_not_there_is_said_before_a_model_is_loaded(monkeypatch, tmp_path, capsys):
    use_cache(monkeypatch, tmp_path / "cache")
    toy = str(write_parquet(tmp_path / "toy.parquet", pairs()))
    card, image = tmp_path / "card.md", tmp_path / "image.bmp"
    card.write_text("---\na: [\n---\n")
    image.touch()
    for arguments, message in (
        (["--data", "nowhere.parquet"], "nowhere.parquet does not exist"),
        (["--data", "owner/name.parquet"], "owner/name.parquet does not exist"),
        (["--data", "owner/name"], "needs --limit"),
        (["--data", "owner/name.v2"], "needs --limit"),
        (["--data", str(image)], "expected files of one format of .parquet"),
        (["--data", toy, "--data", "nowhere.tar"], "nowhere.tar does not exist"),
        (["--data", toy, "--yardstick", "nowhere.parquet"], "nowhere.parquet does not exist"),
        (["--data", toy, "--card", str(card)], f"the metadata of {card} cannot be read"),
        (["--data", toy, "--card", str(tmp_path / "none.md")], "none.md"),
    ):
        capsys.readouterr()
        assert main(["--model", str(tmp_path / "no model"), *arguments]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("microvlm: ") and message in error


def test_an_unreadable_row_ends_the_command(monkeypatch, tmp_path, capsys):
    use_cache(monkeypatch, tmp_path / "cache")
    bad = pairs()
    bad[5]["image"]["bytes"] = b"no picture"
    data = write_parquet(tmp_path / "bad.parquet", bad)
    model = toy_checkpoint(tmp_path / "model")
    assert main(command(model, data, metrics="language", json=tmp_path / "s.json")) == 1
    assert "row toy-5: picture cannot be read" in capsys.readouterr().err and not (tmp_path / "s.json").exists()


def test_no_input_is_written_over(tmp_path, capsys):
    (tmp_path / "rows").mkdir()
    data = write_parquet(tmp_path / "rows" / "v.parquet", pairs())
    for arguments in (
        ["--yardstick", str(data), "--data", "x.parquet"],
        ["--data", str(tmp_path / "rows" / "*.parquet")],
        ["--data", str(tmp_path / "rows")],
    ):
        assert main([*arguments, "--json", str(data)]) == 1
        assert f"--json would be written over the input {data}." in capsys.readouterr().err


@pytest.mark.parametrize("caption", [None, " "])
def test_memory_names_a_row_without_caption(monkeypatch, tmp_path, capsys, caption):
    use_cache(monkeypatch, tmp_path / "cache")
    bad = pairs()
    bad[5]["caption"] = caption
    data = write_parquet(tmp_path / "bad.parquet", bad)
    model = toy_checkpoint(tmp_path / "model", use_memory=True, memory_config=MEMORY)
    assert main(command(model, data, metrics="memory")) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "microvlm: row toy-5 has no caption."


def test_a_data_set_of_the_hub_may_have_a_dot_in_its_name(monkeypatch, tmp_path):
    use_cache(monkeypatch, tmp_path / "cache")
    data, asked, original = write_parquet(tmp_path / "toy.parquet", pairs()), [], load_dataset

    def from_file(name, **options):
        asked.append(name)
        return original("parquet", data_files=str(data), **options)

    monkeypatch.setattr("microvlm.data.stream.load_dataset", from_file)
    assert load_rows("owner/name.v2", limit=3)["caption"][:] == CAPTIONS[:3] and asked == ["owner/name.v2"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    write_folder(tmp_path / "owner/name.v2", pairs(2))
    assert len(load_rows("owner/name.v2")) == 2 and len(asked) == 1  # a folder of that name
    for name in ("owner/gone.csv", "owner/gone.parquet"):
        with pytest.raises((ValueError, FileNotFoundError), match=name):
            load_rows(name, limit=3)


# ------------------------------------------------------------------------------------------------------ ended in the
# middle


@pytest.mark.parametrize("how", ["bad row", "interrupt"])
def test_what_was_measured_is_written_when_a_later_set_fails(monkeypatch, tmp_path, capsys, how):
    use_cache(monkeypatch, tmp_path / "cache")
    bad, evaluate = pairs(5), run_module.evaluate
    bad[3]["image"]["bytes"] = b"no picture"
    good, bad = write_parquet(tmp_path / "good.parquet", pairs()), write_parquet(tmp_path / "bad.parquet", bad)

    def interrupted(model, processor, rows, *arguments):
        if len(rows) == 5:
            raise KeyboardInterrupt
        return evaluate(model, processor, rows, *arguments)

    if how == "interrupt":
        monkeypatch.setattr("microvlm.evaluate.run.evaluate", interrupted)
    files = {name: tmp_path / f"out.{name}" for name in ("json", "markdown", "html", "card")}
    files["card"].write_text("# Toy\n")
    arguments = command(toy_checkpoint(tmp_path / "model"), good, bad, metrics="language", examples=1, **files)
    code, message = {
        "bad row": (1, "row toy-3: picture cannot be read"),
        "interrupt": (130, "interrupted; data sets scored until then are written"),
    }[how]
    assert main(arguments) == code
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"microvlm: {message}")
    entry = json.loads(files["json"].read_text())
    assert list(entry) == [str(good)]
    perplexity = entry[str(good)]["language"]["perplexity"]
    assert format_value(perplexity) in files["markdown"].read_text()
    assert format_value(perplexity) in Page(files["html"].read_text()).words
    (value,) = [
        r.metric_value for r in ModelCard.load(files["card"]).data.eval_results if r.metric_type == "perplexity"
    ]
    assert value == pytest.approx(perplexity)


# ------------------------------------------------------------------------------------------------------ no number
# came out


def test_a_result_that_is_not_finite_is_none_with_its_reason(monkeypatch, tmp_path):
    use_cache(monkeypatch, tmp_path / "cache")
    model = toy_model(use_memory=True, memory_config=MEMORY)
    model.model.language_model.embed_tokens.weight.data.fill_(math.nan)
    model.save_pretrained(tmp_path / "model")
    toy_processor().save_pretrained(tmp_path / "model")
    data = write_parquet(tmp_path / "toy.parquet", pairs(concept=KINDS))
    files = {name: tmp_path / f"out.{name}" for name in ("json", "markdown", "html", "card")}
    files["card"].write_text("# Toy\n")
    groups = ["captions", "language", "retrieval", "memory"]
    options = {"metrics": groups, "facts": [2], "queries": 2, "examples": 1}
    assert main(command(tmp_path / "model", data, **options, **files)) == 0

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    entry = json.loads(files["json"].read_text(), parse_constant=refuse)[str(data)]
    for group, metric in (
        ("language", "lm_loss"),
        ("language", "perplexity"),
        ("retrieval", "alignment_loss"),
        ("retrieval", "image_to_text_recall_at_1"),  # nothing is nearer than NaN
    ):
        assert entry[group][metric] is None
        assert entry["not_measured"][f"{group}: {metric}"] == "the result is nan"
    assert "not finite" in entry["not_measured"]["memory of 2 facts"] and entry["memory"] == []
    assert entry["model"]["exact"] == 0 and entry["language"]["tokens"] > 0
    for name in ("markdown", "html"):
        assert "language: perplexity" in files[name].read_text()
    metrics = {r.metric_type for r in ModelCard.load(files["card"]).data.eval_results}
    assert "exact" in metrics and "perplexity" not in metrics and "alignment_loss" not in metrics


def test_infinite_figures_of_a_memory_are_none_too(monkeypatch, rows):
    found = [{"facts": 2, "memory_kl": math.inf, "questions": 2}]
    monkeypatch.setattr("microvlm.evaluate.run.memory_scores", lambda *arguments: (found, {}, {}))
    result, _ = run_module.evaluate(toy_model(), toy_processor(), rows, some("memory"))
    assert result["memory"] == [{"facts": 2, "memory_kl": None, "questions": 2}]
    assert result["not_measured"] == {"memory of 2 facts: memory_kl": "the result is inf"}


@pytest.mark.parametrize("nats, perplexity", [(2.0, math.exp(2)), (1e4, math.inf), (math.inf, math.inf)])
def test_perplexity_of_large_losses(nats, perplexity):
    scores = language_scores(torch.tensor([3 * nats]), torch.tensor([3]), ["a b"])
    assert scores["lm_loss"] == nats and scores["perplexity"] == pytest.approx(perplexity)


def test_examples_lie_evenly():
    assert example_rows(4, 8) == [0, 2, 4, 6] and example_rows(9, 3) == [0, 1, 2]
    assert len(set(example_rows(12, 1369))) == 12
