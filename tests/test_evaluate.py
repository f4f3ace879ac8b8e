"""The scores on cases counted by hand, captions in batches, and the command on a tiny checkpoint."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import IMAGE_ID, ROOT
from toy_data import CAPTIONS, pairs, toy_checkpoint, toy_model, toy_processor, use_cache, write_parquet

import evaluate_hf
from data_microvlm import UnreadableRowError, load_rows


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
    assert evaluate_hf.normalise(caption) == expected


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
    assert evaluate_hf.word_f1(candidate, reference) == pytest.approx(expected)
    assert evaluate_hf.word_f1(reference, candidate) == pytest.approx(expected)


def test_cider():
    references = [evaluate_hf.normalise(c) for c in CAPTIONS]
    identical = evaluate_hf.cider(references, references)
    assert identical > 3  # 10 for every caption of four words and more, less for shorter ones
    assert evaluate_hf.cider(["nothing of this"] * 8, references) == 0
    assert evaluate_hf.cider([""] * 8, references) == 0
    some = evaluate_hf.cider(references[:4] + ["nothing of this"] * 4, references)
    assert 0 < some < identical
    assert evaluate_hf.cider(references[1:] + references[:1], references) < some
    four = ["one two three four", "five six seven eight"]
    assert evaluate_hf.cider(four, four) == pytest.approx(10)


def test_score_of_toy_lists():
    candidates = ["A red square!", "the blue disc", "a red square", "green"]
    references = ["red square", "a blue circle", "a green square", "Green."]
    s = evaluate_hf.score(candidates, references)
    assert list(s) == ["exact", "word_f1", "cider", "distinct"]
    assert s["exact"] == 2 / 4
    assert s["word_f1"] == pytest.approx((1 + 1 / 2 + 1 / 2 + 1) / 4)
    assert s["distinct"] == 3 / 4
    lower = ["a red square", "the blue disc", "a red square", "green"]  # articles stay
    assert s["cider"] == evaluate_hf.cider(lower, ["red square", "a blue circle", "a green square", "green"]) > 0


def test_captions_in_batches_are_those_of_single_rows(rows):
    model, processor = toy_model(), toy_processor()
    model.config.default_prompt_ids = [2, IMAGE_ID, *processor.tokenizer("green")["input_ids"], 3]  # said by nobody
    single, references = evaluate_hf.caption_rows(model, processor, rows, batch_size=1, max_new_tokens=6)
    assert references == CAPTIONS
    lengths = [len(caption) for caption in single]
    assert len(set(single)) > 2 and min(lengths) < max(lengths) / 2  # some end before the others of their batch
    assert not any("green" in caption for caption in single)  # the prompt is cut off
    for size in (3, 8, 16):
        assert evaluate_hf.caption_rows(model, processor, rows, size, 6) == (single, references)
    inputs = processor.image_processor(
        [evaluate_hf.decode_row(row, processor.image_processor)[0] for row in rows], return_tensors="pt"
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
        evaluate_hf.caption_rows(toy_model(), toy_processor(), rows, 8, 2)


def test_command(tmp_path):
    model, data = toy_checkpoint(tmp_path / "model"), write_parquet(tmp_path / "toy.parquet", pairs())
    json_file = tmp_path / "scores.json"
    command = [sys.executable, str(ROOT / "evaluate_hf.py"), "--model", str(model), "--data", str(data)]
    command += ["--limit", "6", "--batch-size", "4", "--show", "2", "--json", str(json_file)]
    run = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"HF_HOME": str(tmp_path / "home")}
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert [line.split("<- ")[1] for line in lines[:2]] == [repr(c) for c in CAPTIONS[:2]]
    assert lines[2] == f"{data} (6 pictures)"
    assert lines[3].split() == ["exact", "word", "F1", "CIDEr", "distinct"]
    scores = json.loads(json_file.read_text())[str(data)]
    assert scores["pictures"] == 6
    for line, name in zip(lines[4:], ("model", "shuffled"), strict=True):
        assert set(scores[name]) == {"exact", "word_f1", "cider", "distinct"}
        assert line.split() == [name, *(f"{value:.3f}" for value in scores[name].values())]
    assert scores["model"]["distinct"] == scores["shuffled"]["distinct"] > 0
    assert not list(tmp_path.glob("*.tmp"))


def test_nearest_neighbours():
    generator = torch.Generator().manual_seed(0)
    train, queries = torch.randn(9, 5, generator=generator), torch.randn(40, 5, generator=generator)
    a, b = train.double().numpy(), queries.double().numpy()  # against loops in float64
    cosine = lambda x, y: (x @ y) / ((x @ x) * (y @ y)) ** 0.5  # noqa: E731
    expected = [max(range(9), key=lambda i: cosine(q, a[i])) for q in b]
    assert evaluate_hf.nearest_neighbours(train, queries) == expected
    assert (
        evaluate_hf.nearest_neighbours(train * torch.arange(1, 10).view(-1, 1), queries) == expected
    )  # length is nothing


def test_yardstick_copies_the_caption_of_the_closest_picture(monkeypatch, tmp_path):
    """Every picture is closest to itself; without its own row the yardstick has to copy another caption."""
    model = toy_checkpoint(tmp_path / "model")
    data, half = tmp_path / "toy.parquet", tmp_path / "half.parquet"
    write_parquet(data, pairs())
    write_parquet(half, pairs()[:4])
    use_cache(monkeypatch, tmp_path / "cache")
    for train, exact in ((data, 1.0), (half, 0.5)):
        json_file = tmp_path / f"{train.stem}.json"
        command = ["evaluate_hf.py", "--model", str(model), "--data", str(data), "--json", str(json_file)]
        monkeypatch.setattr(sys, "argv", [*command, "--yardstick", str(train)])
        evaluate_hf.main()
        assert json.loads(json_file.read_text())[str(data)]["nearest_neighbour"]["exact"] == exact
