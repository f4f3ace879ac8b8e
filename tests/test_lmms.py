"""The adapter for lmms-eval: from requests to captions with a real model, and a run of the harness itself where it is
installed."""

import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import ROOT
from PIL import Image
from toy_data import CAPTIONS, pairs, png, toy_checkpoint, use_cache, write_parquet

from microvlm.data.rows import load_rows
from microvlm.evaluate.captions import caption_rows
from microvlm.evaluate.language import teacher_forced
from microvlm.lmms_eval.captioner import Captioner
from microvlm.lmms_eval.tasks import utils
from microvlm.metrics import ngram_scores, score

TASKS = ROOT / "microvlm/lmms_eval/tasks"
HARNESS = importlib.util.find_spec("lmms_eval") is not None
needs_harness = pytest.mark.skipif(not HARNESS, reason="lmms-eval is not installed: pip install lmms-eval")


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    return Captioner(str(toy_checkpoint(tmp_path_factory.mktemp("toy") / "model")))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    files = [folder / f"{i}.png" for i in range(8)]
    for i, file in enumerate(files):
        file.write_bytes(png(i))
    return [Image.open(file) for file in files]


@pytest.fixture
def rows(monkeypatch, tmp_path):
    use_cache(monkeypatch, tmp_path / "cache")
    return load_rows(str(write_parquet(tmp_path / "toy.parquet", pairs())))


def test_an_empty_context_gives_the_captions_of_evaluate_hf(captioner, pictures, rows):
    said, _ = caption_rows(captioner.model, captioner.processor, rows)
    assert len(set(said)) > 2
    assert captioner.generate([""] * 8, [[p] for p in pictures]) == said
    options = {"temperature": 0, "top_p": 1.0, "do_sample": False, "until": ["\n\n"], "max_new_tokens": 32}
    assert captioner.generate(["", ""], [[p] for p in pictures[:2]], **options) == said[:2]


def test_transparency_is_white_as_everywhere_else(captioner):
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    white = captioner.inputs([""], [[Image.new("RGB", (8, 8), "white")]])["pixel_values"]
    assert torch.equal(captioner.inputs([""], [[clear]])["pixel_values"], white)
    assert utils.doc_to_visual({"image": clear})[0].getpixel((0, 0)) == (255, 255, 255)


def test_contexts_of_several_lengths_share_a_batch(captioner, pictures):
    contexts, images = ["", "what a red square", "a"], [[pictures[0]], [pictures[1]], [pictures[2], pictures[3]]]
    together = captioner.generate(contexts, images)
    assert together == [captioner.generate([c], [i])[0] for c, i in zip(contexts, images)]
    inputs = captioner.inputs(contexts, images)
    assert len(inputs["pixel_values"]) == 4 and inputs["attention_mask"][:, -1].all()
    assert not inputs["attention_mask"][:, 0].all()  # padded on the left
    placeholders = (inputs["input_ids"] == captioner.model.config.image_token_id).sum(1).tolist()
    assert [n / captioner.model.config.num_prefix_tokens for n in placeholders] == [1, 1, 2]
    assert "pixel_values" not in captioner.inputs(["a question"], [[]])


def test_pictures_stand_where_the_context_says(captioner, pictures):
    def ids(context, n):
        return captioner.inputs([context], [pictures[:n]])["input_ids"][0].tolist()

    assert ids("<image>\na red square", 1) == ids("a red square", 1)
    image = [captioner.model.config.image_token_id] * captioner.model.config.num_prefix_tokens
    one, two = (captioner.processor.tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("a red", "a blue"))
    said = ids("a red<image>a blue <image>", 2)
    assert any(said[i:][: len(one + image + two + image)] == one + image + two + image for i in range(len(said)))
    with pytest.raises(ValueError, match="^a context has 2 <image> for 1 pictures.$"):
        ids("<image> or <image>", 1)


def test_an_answer_ends_before_a_stop_string(captioner, pictures):
    whole = captioner.generate([""], [[pictures[0]]])[0]
    stop = whole[len(whole) // 2]
    assert captioner.generate([""], [[pictures[0]]], until=stop) == [whole.split(stop)[0].strip()]


def test_what_cannot_be_asked_is_refused(captioner, pictures):
    with pytest.raises(ValueError, match="one picture, got 2"):
        captioner.generate([""], [pictures[:2]])
    with pytest.raises(ValueError, match="does not take: beans"):
        captioner.generate([""], [[pictures[0]]], beans=3)


def test_likelihoods_are_the_losses_of_evaluate_hf(captioner, pictures, rows):
    loss = teacher_forced(captioner.model, captioner.processor, rows, align=False)["loss"]
    found = [captioner.loglikelihood("", c, [p]) for c, p in zip(CAPTIONS, pictures)]
    torch.testing.assert_close(-torch.tensor([x for x, _ in found]).double(), loss, rtol=1e-4, atol=1e-4)
    assert not any(greedy for _, greedy in found)  # a random model


def test_its_own_short_answer_is_the_greedy_one(captioner, pictures):
    bias = captioner.model.lm_head.weight.new_zeros(captioner.model.config.text_config.vocab_size)
    bias[captioner.processor.tokenizer.eos_token_id] = 1e4  # it wants to stop
    hook = captioner.model.lm_head.register_forward_hook(lambda module, args, out: out + bias)
    try:
        assert captioner.loglikelihood("", "", [pictures[0]]) == (pytest.approx(0, abs=1e-4), True)
        assert captioner.loglikelihood("", "a red square", [pictures[0]])[1] is False
    finally:
        hook.remove()


def test_the_task_scores_as_evaluate_hf(rows):
    said = ["a red square", "blue circle", "green", "", "a large circle", "a circle", "blue.", "square"]
    documents = [{"caption": caption} for caption in CAPTIONS]
    results = [utils.process_results(d, [s]) for d, s in zip(documents, said)]
    expected = score(said, CAPTIONS) | ngram_scores(said, CAPTIONS)
    for name in results[0]:
        assert getattr(utils, name)([r[name] for r in results]) == expected[name] > 0
    assert utils.process_results(documents[0], [])["exact"] == ("", CAPTIONS[0])


def test_the_task_file_names_functions_that_are_there():
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)
    task = yaml.load((TASKS / "microvlm_mini.yaml").read_text(), Loader)
    called = [task[k] for k in ("doc_to_visual", "doc_to_text", "doc_to_target", "process_results")]
    called += [metric["aggregation"] for metric in task["metric_list"]]
    assert all(callable(getattr(utils, name.removeprefix("utils."))) for name in called)
    assert {m["metric"] for m in task["metric_list"]} == set(utils.process_results({"caption": "a"}, ["a"]))
    assert all((ROOT / file).is_file() for file in task["dataset_kwargs"]["data_files"].values())
    picture = Image.new("RGBA", (4, 4))
    assert [p.mode for p in utils.doc_to_visual({"image": picture})] == ["RGB"] and not utils.doc_to_text({})


@needs_harness
def test_the_model_class_keeps_the_order_of_requests(captioner, pictures):
    from microvlm.lmms_eval.models.microvlm import MicroVLM

    model = MicroVLM.__new__(MicroVLM)
    super(MicroVLM, model).__init__()
    model.captioner, model.batch_size_per_gpu = captioner, 2
    model.task_dict = {"task": {"test": [{"image": p} for p in pictures]}}
    short, long = {"max_new_tokens": 2}, {"max_new_tokens": 9}
    kinds = [short, long, long, short, long, short, short]
    requests = [
        SimpleNamespace(args=("", dict(k), utils.doc_to_visual, i, "task", "test")) for i, k in enumerate(kinds)
    ]
    expected = [captioner.generate([""], [[pictures[i]]], **k)[0] for i, k in enumerate(kinds)]
    assert model.generate_until(requests) == expected and len(set(expected)) > 2
    asked = [SimpleNamespace(args=("", CAPTIONS[i], utils.doc_to_visual, i, "task", "test")) for i in (3, 1)]
    assert model.loglikelihood(asked) == [captioner.loglikelihood("", CAPTIONS[i], [pictures[i]]) for i in (3, 1)]


@pytest.mark.slow
@needs_harness
def test_the_harness_gives_the_scores_of_evaluate_hf(tmp_path):
    model = toy_checkpoint(tmp_path / "model")
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "LMMS_EVAL_PLUGINS": "microvlm.lmms_eval"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", "lmms_eval", "--model", "microvlm", "--model_args", f"pretrained={model}"]
    command += ["--tasks", "microvlm_mini", "--include_path", str(TASKS), "--limit", "20", "--batch_size", "8"]
    command += ["--output_path", str(tmp_path / "out")]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    (file,) = (tmp_path / "out").rglob("*results.json")
    found = json.loads(file.read_text())["results"]["microvlm_mini"]
    scores = tmp_path / "scores.json"
    data = "data/mini/validation.parquet"
    command = [
        sys.executable,
        "-m",
        "microvlm",
        "evaluate",
        "--model",
        str(model),
        "--data",
        data,
        "--limit",
        "20",
    ]
    command += ["--metrics", "captions", "--json", str(scores)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    expected = json.loads(scores.read_text())[data]["model"]
    for name in ("exact", "word_f1", "cider", "distinct", "bleu_4", "rouge_l"):
        assert found[f"{name},none"] == pytest.approx(expected[name], rel=1e-9)
