"""Teaching the memory: episodes, its training run, the threshold, the recall benchmark and microvlm memory, on toy
data."""

import json
import math
import random
import re
import shutil
import threading

import pytest
import torch
import yaml
from conftest import microvlm
from safetensors.torch import load_file
from toy_data import pairs, png, toy_checkpoint, toy_model, toy_processor, use_cache, write_parquet
from transformers import AutoConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

import train_hf
from benchmarks import memory_recall
from microvlm import inference as inference_module
from microvlm.data.episodes import (
    QUESTIONS,
    EpisodeCollator,
    caption_noun,
    make_names,
)
from microvlm.data.rows import load_rows
from microvlm.evaluate.bench import Bench, Lesson, says_name
from microvlm.evaluate.memory import forget_half, mean, measure, negatives, own_words, recalls
from microvlm.metrics import auroc, equal_error_rate
from microvlm.model import load
from microvlm.train import calibrate
from microvlm.train.calibrate import lowest_threshold
from microvlm.train.episodes import EPISODE_INPUTS, Episodes, captioned_rows, memory_losses, split_inputs
from microvlm.train.gradcache import embedded_pairs
from microvlm.train.losses import Distillation, Step

MEMORY = {
    "num_slots": 16,
    "code_size": 32,
    "num_memory_tokens": 24,
    "num_content_slots": 24,
    "max_content_tokens": 40,
    "max_items": 64,
    "key_hidden_size": 32,
    "scope_hidden_size": 16,
}
CONCEPTS = ["square", "circle", "square", "bars", "circle", "circle", "blue", "ground"]


def collator(**kwargs) -> EpisodeCollator:
    torch.manual_seed(0)
    features, captions = torch.randn(2, 8, 17, 24), [row["caption"] for row in pairs()]
    pooled = torch.cat([features[:, :, 0], features[:, :, 1:].mean(2)], -1)
    prompt = toy_model().default_prompt(1)[0].tolist()
    defaults = {"groups": 2, "sizes": (1, 6), "names": 50, "key_pairs": 4, "gray": torch.randn(8, 48)}
    images = {"features": features, "pooled": pooled, "captions": captions, "concepts": CONCEPTS}
    return EpisodeCollator(toy_processor(), prompt, max_tokens=40, **images, **defaults | kwargs)


def batch_rows(order=range(8)) -> list[dict]:
    return [{"feature_row": i, "caption": pairs()[i]["caption"]} for i in order]


def sentence(ids: torch.Tensor) -> list[int]:
    return ids[ids >= 0].tolist()


def test_names_are_different_repeatable_and_a_longer_list_goes_on():
    names = make_names(500)
    assert len(set(names)) == 500 and names == make_names(500) and make_names(900)[:500] == names
    assert all(name.isalpha() and name.istitle() for name in names) and make_names(5, seed=1) != names[:5]


@pytest.mark.parametrize(
    "caption, noun",
    [
        ("A hiking boot.", "hiking boot"),
        ("An anchor.", "anchor"),
        ("The flag of Spain.", "flag of Spain"),
        ("Ax.", "Ax"),
    ],
)
def test_caption_noun(caption, noun):
    assert caption_noun(caption) == noun


@pytest.mark.parametrize("epoch", range(6))
def test_episode_answers_what_it_stores(epoch):
    collate = collator()
    collate.set_epoch(epoch)
    batch = collate(batch_rows())
    eos = collate.processor.tokenizer.eos_token_id
    captions = [[*collate.story.tokens(c), eos] for c in collate.captions]
    stored = [
        [sentence(t) for t, on in zip(*group) if on] for group in zip(batch["support_tokens"], batch["support_active"])
    ]
    for row in range(8):
        answer = batch["labels"][row][batch["labels"][row] != -100].tolist()
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
        if not answer:  # an unknown question
            assert not batch["known"][row] and 4 not in ids and (batch["target_tokens"][row] == -1).all()
            continue
        assert ids[-len(answer) :] == answer
        if batch["known"][row]:
            assert answer in stored[row // 4] and answer == sentence(batch["target_tokens"][row])
        else:
            assert answer in captions and (batch["target_tokens"][row] == -1).all()
            concept = CONCEPTS[captions.index(answer)]
            for fact in stored[row // 4]:  # nothing of its concept is stored
                text = collate.processor.decode(fact)
                nouns = {caption_noun(c) for c, k in zip(collate.captions, CONCEPTS) if k == concept}
                assert not any(f"the {noun}." in text for noun in nouns)
    pictures = (batch["input_ids"] == 4).sum(1).sum() // 5
    assert len(batch["vision_features"]) == pictures
    assert all(fact[-1] == eos and len(fact) <= 40 for group in stored for fact in group)
    assert max(map(len, stored)) <= 6 and min(map(len, stored)) >= 1


def test_supports_carry_the_key_features_of_their_picture():
    collate = collator(shares={"view": 1.0, "style": 0.0, "text": 0.0, "new": 0.0, "unknown": 0.0}, sizes=(4, 4))
    batch = collate(batch_rows())
    assert batch["known"].all() and len(batch["vision_features"]) == 8
    pooled = torch.cat([batch["vision_features"][:, 0], batch["vision_features"][:, 1:].mean(1)], -1)
    for row in range(8):  # a view query shows one of the views of the picture under which its answer is stored
        group = row // 4
        facts = [sentence(t) for t in batch["support_tokens"][group]]
        place = facts.index(sentence(batch["target_tokens"][row]))
        views = collate.pooled
        at = [
            (views - key).abs().sum(-1).lt(1e-5).nonzero()[0, 1].item()
            for key in (batch["support_features"][group, place, 0], pooled[row])
        ]
        assert at[0] == at[1] and batch["support_features"][group, place, 1].equal(collate.gray[at[0]])


def test_key_pairs_are_views_of_the_same_concept_and_the_grey_copy():
    collate = collator()
    first, second, gray = collate(batch_rows())["key_features"]
    rows = [
        [int((collate.pooled - key).abs().sum(-1).lt(1e-5).nonzero()[0, 1]) for key in keys] for keys in (first, second)
    ]
    assert gray.equal(collate.gray[rows[0]]) and len(set(CONCEPTS[i] for i in rows[0])) == 4
    assert [CONCEPTS[i] for i in rows[0]] == [CONCEPTS[i] for i in rows[1]]
    without = collator(gray=None)(batch_rows())
    assert without["key_features"].shape == (2, 4, 48) and without["support_features"].shape[2] == 1


def test_facts_borrow_nouns_and_words_made_of_tokens():
    collate = collator()
    facts = [collate.processor.decode(collate.story.fact(0, random.Random(i))[0][:-1]) for i in range(400)]
    own = sum(caption_noun(collate.captions[0]) in fact for fact in facts)
    assert 120 < own < 220 and len(set(facts)) > 300
    words = {word.strip(".,") for fact in facts for word in fact.split()}
    assert len(words - {w for c in collate.captions for w in c.split()} - set(collate.story.vocabulary)) > 120
    assert all(start.isalpha() for start in collate.story.starts) and all(
        end.isalpha() for end in collate.story.endings
    )


def test_facts_are_any_text():
    """Where there are sentences, facts are these, also in capitals, and tokens of all kinds, each with its end."""
    story = collator(texts=["the red fox is tall", "a blue cat"]).story
    facts = [story.text(random.Random(i)) for i in range(400)]
    for text in ("a blue cat", "A BLUE CAT"):
        assert any(fact.tokens[:-1] == story.tokens(text) for fact in facts)
    assert len({token for fact in facts for token in fact.tokens}) == len(story.any_token) + 1
    for fact in facts:
        assert 1 < len(fact.tokens) <= 40 and fact.tokens[-1] == story.tokenizer.eos_token_id
        assert story.tokenizer.decode(fact.tokens[:-1]) == fact.text


def test_other_styles_show_another_picture_of_the_concept():
    collate = collator(
        shares={"view": 0.0, "style": 1.0, "text": 0.0, "new": 0.0, "unknown": 0.0}, sizes=(1, 1), groups=8
    )
    batch = collate(batch_rows([1]) * 8)
    shown = {int((collate.features - f).abs().sum((-1, -2)).lt(1e-5).nonzero()[0, 1]) for f in batch["vision_features"]}
    assert shown <= {4, 5} and batch["known"].all()


def with_nouns(collate: EpisodeCollator) -> dict[tuple[int, ...], str]:
    """The noun of every fact that `collate` makes from now on."""
    nouns, make = {}, collate.story.fact

    def fact(row, draw):
        sentence = make(row, draw)
        nouns[tuple(sentence.tokens)] = sentence.noun
        return sentence

    collate.story.fact = fact
    return nouns


def prompt_of(batch, row: int) -> list[int]:
    answer = int((batch["labels"][row] != -100).sum())
    ids = batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
    return ids[: len(ids) - answer]


def questions_about(collate: EpisodeCollator, noun: str) -> list[list[int]]:
    user, assistant = collate.prompt_ids[0], collate.prompt_ids[-1]
    return [[user, *collate.story.tokens(form.format(noun=noun)), assistant] for form in QUESTIONS]


def test_questions_have_no_picture_and_name_the_noun_of_their_fact():
    collate = collator(shares={"view": 0.0, "style": 0.0, "text": 1.0, "new": 0.0, "unknown": 0.0})
    nouns = with_nouns(collate)
    for epoch in range(5):
        collate.set_epoch(epoch)
        batch = collate(batch_rows())
        assert not (batch["input_ids"] == 4).any() and not len(batch["vision_features"]) and batch["known"].all()
        for row in range(8):
            noun = nouns[tuple(sentence(batch["target_tokens"][row]))]
            assert prompt_of(batch, row) in questions_about(collate, noun)


def test_unknown_questions_are_about_nothing_that_is_stored():
    collate = collator(shares={"view": 0.4, "style": 0.0, "text": 0.0, "new": 0.0, "unknown": 0.6}, sizes=(1, 2))
    nouns, found = with_nouns(collate), 0
    for epoch in range(10):
        collate.set_epoch(epoch)
        batch = collate(batch_rows())
        questions = ~batch["known"] & ~(batch["input_ids"] == 4).any(1)
        found += int(questions.sum())
        for row in torch.nonzero(questions).flatten().tolist():
            assert (batch["labels"][row] == -100).all()
            prompt = prompt_of(batch, row)
            asked = {noun for noun in nouns.values() if prompt in questions_about(collate, noun)}
            assert asked
            group = zip(batch["support_tokens"][row // 4], batch["support_active"][row // 4])
            stored = [nouns[tuple(sentence(tokens))].lower() for tokens, on in group if on]
            assert not {noun.lower() for noun in asked} & set(stored)
    assert found > 10


def test_shares_are_checked():
    with pytest.raises(ValueError) as error:
        collator(shares={"view": 1.0})
    assert str(error.value) == "shares must be of view, style, text, new, unknown, got view."


def test_episodes_repeat_for_the_same_epoch_and_rows_only():
    collate = collator()
    first, again = collate(batch_rows()), collate(batch_rows())
    assert all(torch.equal(first[name], again[name]) for name in first)
    collate.set_epoch(1)
    other = collate(batch_rows())
    assert other["support_tokens"].shape != first["support_tokens"].shape or not torch.equal(
        other["support_tokens"], first["support_tokens"]
    )


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A recipe that teaches the memory of the toy checkpoint."""
    use_cache(monkeypatch, tmp_path / "cache")
    return {
        "model": str(toy_checkpoint(tmp_path / "start")),
        "config": {"use_memory": True} | {f"memory_config.{name}": value for name, value in MEMORY.items()},
        "trainable": ["adapter", "language_model", "memory", "scope"],
        "optimizer": "muon",
        "loss_weights": dict(lm=1.0, memory_kl=0.02, address_kl=0.005, reconstruction=0.5, scope=0.2, key=0.3),
        "data": {
            "train": str(write_parquet(tmp_path / "train.parquet", pairs(concept=CONCEPTS))),
            "vision_cache": {"views": 2, "folder": str(tmp_path / "features")},
            "augmentation": {"degrees": 5, "shift": 0.05, "scale": 0.05, "color": 0.1},
            "episodes": {"groups": 2, "sizes": [1, 6], "names": 50, "key_pairs": 4},
        },
        "training": {
            "output_dir": str(tmp_path / "out"),
            "use_cpu": True,
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 1.0e-3,
            "logging_steps": 1,
            "save_steps": 2,
            "disable_tqdm": True,
        },
    }


def write_recipe(folder, recipe) -> str:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return str(folder / "recipe.yaml")


def test_a_run_teaches_every_part_and_resumes(run, tmp_path):
    train_hf.main([write_recipe(tmp_path, run)])
    trained = load_file(tmp_path / "out" / "model.safetensors")
    half = load_file(tmp_path / "out" / "checkpoint-2" / "model.safetensors")
    moved = {name for name in trained if not torch.equal(trained[name], half[name])}
    for part in ("memory.reference", "memory.address_log_variance", "memory.key_encoder.image_fc1.weight",
                 "memory.content_encoder.position_bias", "memory_projection.up.weight",
                 "scope.out.weight", "language_model.layers.0.self_attn.q_proj.weight"):  # fmt: skip
        assert f"model.{part}" in moved, part
    assert not any("vision_tower" in name for name in moved)
    lines = [line for line in json.loads((tmp_path / "out" / "log.json").read_text()) if "lm_loss" in line]
    for line in lines:
        weighted = sum(weight * line[f"{name}_loss"] for name, weight in run["loss_weights"].items())
        assert line["loss"] == pytest.approx(weighted, rel=1e-3)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["use_memory"] and config["memory_config"]["num_slots"] == 16
    (tmp_path / "out" / "model.safetensors").unlink()
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    train_hf.main([write_recipe(tmp_path, run), "--resume"])
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(again[name], trained[name]) for name in trained)


@pytest.mark.parametrize(
    "name, message",
    [
        ("memory_config.slots", "config: the model has no 'memory_config.slots'."),
        ("memori", "config: the model has no 'memori'."),
    ],
)
def test_unknown_config_values_are_refused(run, tmp_path, name, message):
    run["config"] = {name: 1}
    with pytest.raises(ValueError) as error:
        train_hf.main([write_recipe(tmp_path, run)])
    assert str(error.value) == message


def test_episodes_need_kept_features(run, tmp_path):
    del run["data"]["vision_cache"]
    with pytest.raises(ValueError) as error:
        train_hf.main([write_recipe(tmp_path, run)])
    assert str(error.value) == "data.episodes needs data.vision_cache, or a size: episodes of images as they come."


def test_memory_losses_against_their_definition():
    model = toy_model(use_memory=True, memory_config=MEMORY).train()
    model.model.memory.eval()  # no draws: the reference below has none
    batch = collator(shares={"view": 0.5, "style": 0.0, "text": 0.0, "new": 0.5, "unknown": 0.0})(batch_rows())
    names = (*EPISODE_INPUTS, "input_ids", "attention_mask", "vision_features")
    readout, losses = memory_losses(model, Episodes(**{name: batch[name] for name in names}))
    memory, known = model.model.memory, batch["known"]
    p = readout.scope_logits.double().sigmoid()
    positive, negative = -p[known].log().mean(), -(1 - p[~known]).log().mean()
    assert losses["scope"].item() == pytest.approx((0.5 * positive + 0.5 * negative).item(), rel=1e-4)
    targets = model.encode_contents(batch["target_tokens"][known]).double()
    read = readout.content.flatten(1)[known].double()
    cosine = (read * targets).sum(1) / read.norm(dim=1) / targets.norm(dim=1)
    assert losses["reconstruction"].item() == pytest.approx((1 - cosine).mean().item(), abs=1e-5)
    first, second, gray = memory.key_encoder(batch["key_features"])
    first = torch.nn.functional.normalize(first + 0.5 * gray, dim=-1)
    keys = memory.address(torch.stack([first, second])).double()

    def info_nce(a, b):
        scores = a @ b.T / model.config.alignment_config.temperature
        return -(scores.log_softmax(0).diagonal().mean() + scores.log_softmax(1).diagonal().mean()) / 2

    assert losses["key"].item() == pytest.approx(info_nce(keys[0], keys[1]).item(), rel=1e-4)
    soft = torch.nn.functional.logsigmoid(readout.scope_logits)
    hard = torch.where(known, 0.0, -math.inf)
    assert ((readout.log_gate == soft) | (readout.log_gate == hard)).all()
    assert not readout.log_gate.requires_grad and readout.scope_logits.requires_grad  # words do not train the gate


def test_captions_align_and_facts_do_not():
    """The pairs of images and texts are those of the rows that say their caption, as if the others were not there."""
    model = toy_model(use_memory=True, memory_config=MEMORY)
    batch = collator(shares={"view": 0.4, "style": 0.0, "text": 0.2, "new": 0.4, "unknown": 0.0})(batch_rows())
    inputs, episodes = split_inputs(model, batch)
    pairs = embedded_pairs(model(**inputs, return_alignment=True), captioned_rows(model, inputs, episodes))
    shown = (inputs["input_ids"] == model.config.image_token_id).any(1)
    alone, features = shown & ~episodes.known, inputs.pop("mm_encoder_outputs")["image"].last_hidden_state
    assert 0 < len(pairs) == int(alone.sum()) < int(shown.sum())
    rows = {name: value[alone] for name, value in inputs.items()}
    rows["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(last_hidden_state=features[alone[shown]])}
    torch.testing.assert_close(pairs, embedded_pairs(model(**rows, return_alignment=True)))


@torch.no_grad()
def test_captions_are_distilled_and_facts_are_not():
    """The divergence is that of the rows that say their caption, in float64; the teacher has no memory."""
    model, teacher = (toy_model(use_memory=True, memory_config=MEMORY).eval() for _ in range(2))
    batch = collator(shares={"view": 0.4, "style": 0.0, "text": 0.2, "new": 0.4, "unknown": 0.0})(batch_rows())
    inputs, episodes = split_inputs(model, batch)
    captioned, shown = captioned_rows(model, inputs, episodes), (inputs["input_ids"] == model.config.image_token_id)
    step = Step(model, inputs, {}, None, captioned=captioned, outputs=model(**inputs))
    got = Distillation("distill", 1.0, teacher, 1.0)(step)
    rows = shown.any(1) & ~episodes.known
    on = inputs["labels"][:, 1:][rows] != -100
    assert 0 < int(on.sum()) < int((inputs["labels"][:, 1:] != -100).sum())
    unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
    log_p, log_q = (m(**unlabelled).logits[rows, :-1][on].double().log_softmax(-1) for m in (teacher, model))
    assert got.item() == pytest.approx((log_p.exp() * (log_p - log_q)).sum(-1).mean().item(), rel=1e-4)


def test_scores_of_the_benchmark():
    assert says_name("Bimo", "this is bimo the cat") and not says_name("Bim", "This is Bimo.")
    assert own_words("This is Bimo the pen-guin.") == "bimo pen guin"
    p, n = torch.tensor([0.9, 0.8, 0.3]), torch.tensor([0.1, 0.3, 0.5, 0.2])
    pairs_right = sum(float(a > b) + 0.5 * float(a == b) for a in p for b in n) / 12
    assert auroc(p, n) == pytest.approx(pairs_right)
    assert equal_error_rate(p, n) == pytest.approx((1 / 3 + 1 / 4) / 2)
    assert equal_error_rate(torch.tensor([0.9]), torch.tensor([0.1])) == 0


@pytest.mark.parametrize("highest", [0.4, 0.9])
def test_the_threshold_lets_no_more_through_than_it_may(highest):
    negative = torch.linspace(0, highest, 100)
    threshold = lowest_threshold(negative, 0.05)
    assert (negative >= threshold).float().mean() <= 0.05 < (negative >= threshold - 0.02 * highest).float().mean()
    assert threshold == round(threshold, 4) and 0 < lowest_threshold(torch.zeros(5), 0.5) < 0.01
    assert lowest_threshold(torch.ones(5), 0.0) < 1
    assert lowest_threshold(torch.full((5,), 0.9), 1.0) == 1e-4  # all may pass


def test_thresholds_of_a_checkpoint(tmp_path, monkeypatch, capsys):
    """All may pass, no unrelated picture, or no look-alike."""
    toy_model(use_memory=True, memory_config=MEMORY).save_pretrained(tmp_path / "model")
    toy_processor().save_pretrained(tmp_path / "model")
    things = ["cat", "cat house", "dog", "dog cart", "bell", "bell tower", "hat", "hat box"]  # two share a word
    rows = pairs(concept=things, caption=[f"A {thing}." for thing in things])
    data = str(write_parquet(tmp_path / "rows.parquet", rows))
    found = []
    before = load_file(tmp_path / "model/model.safetensors")
    for shares in ("11", "01", "10"):
        passing = dict(zip(("false_alarms", "look_alikes"), map(float, shares)))
        calibrate.main(str(tmp_path / "model"), tmp_path / shares, data, only="scope", **passing)
        found.append(json.loads((tmp_path / shares / "config.json").read_text())["memory_config"]["scope_threshold"])
        after = load_file(tmp_path / shares / "model.safetensors")
        assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| 1 |", "| 4 |"))][:2]
        for column, share in zip((-2, -1), shares):  # what of the unrelated and of the look-alikes passes
            on = {line.strip("| ").split(" | ")[column] for line in lines}
            assert on == {"0.000"} if share == "0" else "0" in shares or on == {"1.000"}
    assert found[0] == [[1, 1e-4], [4, 1e-4]] and found[1] != found[0] != found[2]


@pytest.mark.parametrize("slots, images", [(2, 8), (4, 8), (4, 3)])
def test_thresholds_of_a_small_memory(tmp_path, monkeypatch, slots, images):
    """A size that the data cannot fill is measured on the filler."""
    toy_model(use_memory=True, memory_config=MEMORY | {"num_slots": slots}).save_pretrained(tmp_path / "model")
    toy_processor().save_pretrained(tmp_path / "model")
    things = ["cat", "dog", "bell", "hat", "cart", "house", "tower", "box"]
    rows = pairs(concept=things, caption=[f"A {thing}." for thing in things])
    filler = str(write_parquet(tmp_path / "filler.parquet", rows))
    data = str(write_parquet(tmp_path / "rows.parquet", rows[:images]))
    calibrate.main(str(tmp_path / "model"), tmp_path / "out", data, filler)
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert [size for size, _ in config.memory_config.scope_threshold] == [1, slots]
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "out"))
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        "model.language_model.norm.weight"
    }

    monkeypatch.setattr("microvlm.train.calibrate.lowest_threshold", lambda *_: -1.0)
    with pytest.raises(ValueError, match="scope_threshold"):
        calibrate.main(str(tmp_path / "model"), tmp_path / "refused", data)
    assert not (tmp_path / "refused").exists()


def test_the_benchmark_runs_and_counts(tmp_path):
    model = toy_model(use_memory=True, memory_config=MEMORY)
    rows = load_rows(str(write_parquet(tmp_path / "rows.parquet", pairs(concept=CONCEPTS))))
    bench = Bench(model, toy_processor(), rows)
    result = measure(bench, 2, 4)
    assert result["facts"] == 2 and {"seen", "new", "unrelated", "lookalike", "forget", "bytes"} <= set(result)
    for kind in ("seen", "new"):
        assert all(0 <= share <= 1 for share in result[kind].values())
    memory = bench.teach([[0, 3], [1, 6]], [["one.", "two."], ["three.", "four."]])
    assert memory.labels == [["one.", "two."], ["three.", "four."]]
    assert not {name for kind in bench.names.values() for name in kind} & {"Red", "Blue", "This", "The"}
    mute = bench.answers
    bench.answers = lambda view, indices, *args, **kwargs: ["This is Kesora." for _ in indices]  # whatever is asked
    lesson = Lesson([[0, 3]], [["Kesora", "Bimo"]], [["a", "b"]], bench.teach([[0, 3]], [["a", "b"]]), [(0, 0)])
    half = forget_half(bench, lesson, 4)
    assert half == {"forget": {"forgotten": 1.0, "kept": 0.0, "kept_before": 0.0}}
    bench.plain = dict.fromkeys(range(8), "This is Kesora.")
    lesson = Lesson([[0]], [["Kesora"]], [["a"]], bench.teach([[0]], [["a"]]), [(0, 0)])
    said = negatives(bench, lesson, 4, {})["unrelated"]
    assert (said["false_recall"], said["unchanged"]) == (1.0, 1.0) and said["pictures"] > 0
    # asked in words who the cat is, the name of either cat is right
    bench.captions = [*["A cat."] * 2, *["A dog."] * 6]
    images, places = [[0, 1, 2]], [(0, 0), (0, 1), (0, 2)]
    lesson = Lesson(
        images, [["Bimo", "Kesora", "Rask"]], [["a", "b", "c"]], bench.teach(images, [["a", "b", "c"]]), places
    )
    recall = recalls(bench, lesson)
    assert recall["words"] == pytest.approx(2 / 3) and recall["same"] == pytest.approx(1 / 3)
    bench.answers = mute
    report = memory_recall.report([mean([result, result])], {"write": 1.0})
    assert "| 2 | seen |" in report and "Milliseconds" in report
    draws = [{"facts": 1, "seen": {"view": 0.5}}, {"facts": 1, "seen": {"view": 1.0, "style": 0.25}, "in_prompt": None}]
    assert mean(draws) == {"facts": 1, "seen": {"view": 0.75, "style": 0.25}, "in_prompt": None}


def test_names_are_scored_as_personalisation_does():
    """9 of 10 images of the subject get its name, and 1 of 10 others."""
    assert memory_recall.name_scores(0.9, 0.1) == pytest.approx([0.9, 0.9, 0.9, 9 / 10, 0.9])
    # 6 right, 2 wrong of 10 and 10
    assert memory_recall.name_scores(0.6, 0.2) == pytest.approx([0.6, 0.8, 0.7, 6 / 8, 2 * 6 / (2 * 6 + 4 + 2)])
    assert memory_recall.name_scores(0.0, 0.0) == [0, 1, 0.5, 0, 0]


@pytest.fixture
def shop(tmp_path):
    """A checkpoint with a memory and two pictures."""
    folder = toy_checkpoint(tmp_path / "model", use_memory=True, memory_config=MEMORY)
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    return lambda command, *words: microvlm("memory", command, *words, "--model", folder)


def test_teach_adds_lists_asks_and_forgets(shop, tmp_path, capsys):
    file = tmp_path / "facts.safetensors"
    assert shop("add", file, tmp_path / "0.png", "a red square") == 0
    assert shop("add", file, tmp_path / "1.png", "a blue circle") == 0
    assert shop("list", file) == 0
    out = capsys.readouterr().out
    assert "0. 'a red square'" in out and "1. 'a blue circle'" in out and "memory: 2 items of at most 64" in out
    assert shop("ask", file, tmp_path / "0.png", tmp_path / "1.png") == 0
    assert capsys.readouterr().out.count("(memory ") == 2
    assert shop("ask", file, tmp_path / "0.png", "Who is the red square?") == 0
    out = capsys.readouterr().out
    assert out.count("(memory ") == 2 and "Who is the red square?: " in out
    assert shop("forget", file, "a red square") == 0 and shop("forget", file, "0") == 0
    assert "memory: 0 items" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (("forget", "{file}", "7"), "item 7 is not in the memory, which holds 1."),
        (("add", "{file}", "{missing}", "a square"), "missing.png"),
        (("list", "{missing}"), "No such file or directory: {missing}"),
        (("list", "{picture}"), "is refused: it is not a whole safetensors file"),
        (("ask", "{rows}", "{picture}"), "rows.safetensors holds 2 memories; here it is one."),
        (("add", "{rows}", "{picture}", "a square"), "rows.safetensors holds 2 memories; here it is one."),
        (("add", "{missing}/f", "{picture}", "a square"), "missing.png."),
    ],
)
def test_teach_names_what_is_wrong_and_keeps_the_file(shop, tmp_path, capsys, words, message):
    file = tmp_path / "facts.safetensors"
    assert shop("add", file, tmp_path / "0.png", "a red square") == 0
    before = file.read_bytes()
    names = {"file": file, "missing": tmp_path / "missing.png", "picture": tmp_path / "0.png"}
    names["rows"] = tmp_path / "rows.safetensors"
    load(tmp_path / "model")[0].new_memory(2).save(names["rows"])
    assert shop(*(w.format(**names) for w in words)) == 1
    assert message.format(**names) in capsys.readouterr().err and file.read_bytes() == before


def test_a_file_by_two_names_has_one_lock(shop, tmp_path, capsys):
    file, link = tmp_path / "facts.safetensors", tmp_path / "link.safetensors"
    assert shop("forget", file, "0") == 1 and not list(tmp_path.glob("*.lock"))
    assert shop("add", file, tmp_path / "0.png", "a red square") == 0
    link.symlink_to(file)
    assert shop("add", link, tmp_path / "1.png", "a blue circle") == 0
    assert [path.name for path in tmp_path.glob("*.lock")] == ["facts.safetensors.lock"]
    assert shop("list", file) == 0 and "memory: 2 items" in capsys.readouterr().out


def test_two_who_teach_at_once_both_teach(shop, tmp_path, monkeypatch):
    """The second loads what the first has saved, however long the first takes in between."""
    file, teach = tmp_path / "facts.safetensors", inference_module.teach
    inside, second = threading.Event(), []

    def slow(*arguments):
        if not second:
            second.append(threading.Thread(target=shop, args=("add", file, tmp_path / "1.png", "a blue circle")))
            second[0].start()
            assert not inside.wait(1)
        else:
            inside.set()
        return teach(*arguments)

    monkeypatch.setattr("microvlm.commands.memory.teach", slow)
    assert shop("add", file, tmp_path / "0.png", "a red square") == 0
    second[0].join()
    assert load(tmp_path / "model")[0].load_memory(file).labels == [["a red square", "a blue circle"]]


@pytest.mark.parametrize(
    "words", [("facts.safetensors",), ("list",), ("forget", "facts.safetensors"), ("add", "f", "p"), ("ask", "f")]
)
def test_teach_with_wrong_arguments(words):
    assert microvlm("memory", *words) == 2


def test_the_demo_teaches_and_forgets(capsys):
    """On the shipped model; three facts, one of them any text, a question, and one fact less."""
    assert microvlm("demo") == 0
    before, after, forgotten = (
        [line.partition(": ") for line in part.splitlines()]
        for part in re.split(r"\n\n(?:Taught|Forgot)[^\0]*?Asked:\n", capsys.readouterr().out)
    )
    swan, robot, locker, drum, question = ((path, text) for path, _, text in after)
    assert swan[1].startswith("This is Bimo the swan.  (memory ") and swan[0].endswith("swan.png")
    assert robot[1].startswith("This is Mirel the robot.  (memory ") and drum[1].startswith(before[4][2])
    assert locker[1].startswith("Locker 4047 opens with the code 19-B.  (memory ")
    assert question[0] == "Who is the robot?" and question[1].startswith("This is Mirel the robot.")
    assert "Bimo" not in forgotten[0][2] and [line[2] for line in forgotten[1:3]] == [robot[1], locker[1]]
