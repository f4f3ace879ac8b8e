"""The speed benchmark runs on tiny models and counts what it says it counts; nothing here asserts a time."""

import math
import sys
import tempfile
from collections import Counter

import pytest
import torch
import transformers
from conftest import ROOT

from benchmarks import speed
from benchmarks.models import SHAPES, v_config
from benchmarks.speed import Result, choose, in_groups, main, measure_group, parse, speed_table
from benchmarks.subjects import CATALOGUE, LLAMA_CPP, LlamaCpp, Scratch, has_llama_cpp

needs_llama_cpp = pytest.mark.skipif(not has_llama_cpp(), reason="llama-cpp-python is not installed")


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """The benchmark sets threads and progress bars for its whole process, which here is that of all tests."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(transformers.utils.logging, "disable_progress_bar", lambda: None)
    yield
    torch.set_num_threads(threads)


def by_hand(text) -> int:
    """Numbers that a decoding step of a Qwen2 with a tied head reads: matrices, biases, norms, the head."""
    D, F, L, V = text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.vocab_size
    kv = D // text.num_attention_heads * text.num_key_value_heads
    layer = 2 * D * D + 2 * D * kv + 3 * D * F + (D + 2 * kv) + 2 * D
    return L * layer + D + V * D


def test_the_small_command_measures_each_in_its_own_process(tmp_path, capsys, monkeypatch):
    main(["--small", "--write-v", str(tmp_path / "packed")])
    assert "V with random weights" in capsys.readouterr().out
    names = ["ours", "V NF4", "GIT-base"]
    plots, measured, measure = tmp_path / "plots", [], speed.measure
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "runs"))
    monkeypatch.setattr(speed, "measure", lambda *args: measured.append(measure(*args)) or measured[0])
    command = ["--small", "--rounds", "2", "--tokens", "32", "--only", *names, "--plot", str(plots)]
    main([*command, "--checkpoint", f"ours={tmp_path / 'packed'}"])
    printed, (results, _) = capsys.readouterr().out, measured[0]
    assert list(results) == names
    for name, result in results.items():
        assert printed.count(f"| {name} |") == 1
        assert len(result.turns) == 2
        for turn in result.turns:
            assert 0 < turn["first"] < turn["caption"] and math.isfinite(turn["rate"]) and turn["rate"] > 0
        assert result.opened["disk"] > 0 and result.opened["load"] > 0
        if sys.platform == "linux":
            assert result.peak > 0
    assert results["V NF4"].opened["disk"] < results["ours"].opened["disk"]
    assert sorted(path.name for path in plots.iterdir()) == ["speed_disk.png"]
    assert not list((tmp_path / "runs").iterdir())  # scratch weights are gone


@pytest.mark.parametrize(
    "name,positions",
    [("SmolVLM-256M x1", 2 + 1 + 16), ("SmolVLM-256M x17", 17 * 3 + 16), ("BLIP-base", 1), ("ViT-GPT2", 1)],
)
def test_peers_take_an_image_and_never_stop_early(name, positions, tmp_path):
    subject = CATALOGUE[name](name, Scratch(tmp_path, True))
    subject.load()
    assert subject.positions == positions and subject.disk_bytes() > 0
    assert subject.model.dtype == torch.bfloat16
    times = subject.emit(40)
    assert len(times) == 40 and 0 < times[0] and times == sorted(times)


def test_full_sizes_are_those_of_the_documents():
    text = v_config().text_config
    assert (text.vocab_size, text.num_hidden_layers, text.intermediate_size) == (151936, 24, 4864)
    assert text.hidden_size == 896 and text.hidden_size // text.num_attention_heads == 64
    assert text.num_key_value_heads == 2
    assert by_hand(text) == 494_032_768  # Qwen2.5-0.5B's published number


@pytest.mark.parametrize(
    "name,millions", [("SmolVLM-256M", 256), ("BLIP-base", 224), ("GIT-base", 177), ("ViT-GPT2", 239)]
)
def test_peers_have_the_published_number_of_parameters(name, millions):
    """BLIP's is given as 247 million with its tied head counted twice."""
    shape = SHAPES[name]
    with torch.device("meta"):
        model = getattr(transformers, shape.model)(shape.config(False))
    model.tie_weights()
    assert model.num_parameters() / 1e6 == pytest.approx(millions, abs=1)


def count_types(kind: str) -> dict[str, int]:
    """By hand, bytes of the tiny V's language model: all matrices in BF16, or in blocks of 32."""
    text = v_config(True).text_config
    vectors = text.num_hidden_layers * (3 * text.hidden_size + 2 * 2 * text.hidden_size // 4) + text.hidden_size
    matrices, tied = by_hand(text) - vectors, text.vocab_size * text.hidden_size
    counts = {
        "BF16": {"BF16": 2 * matrices},
        # 64 columns: rows of no 256, so layers fall back to blocks of 32 in 18 bytes, the head to 34 bytes
        "TQ2_0": {"Q4_0": (matrices - tied) * 18 // 32, "Q8_0": tied * 34 // 32},
        "Q4_0+head": {"Q4_0": matrices * 18 // 32},
    }
    return counts[kind] | {"F32": 4 * vectors}


def type_bytes(path) -> dict[str, int]:
    import gguf

    result = Counter()
    for tensor in gguf.GGUFReader(path).tensors:
        result[tensor.tensor_type.name] += int(tensor.n_bytes)
    return result


def test_the_gguf_holds_the_language_model(tmp_path):
    pytest.importorskip("gguf")
    subject = LlamaCpp("", Scratch(tmp_path, True).gguf("BF16"), 21)
    assert type_bytes(subject.path) == count_types("BF16")


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["BF16", "TQ2_0", "Q4_0+head"])
def test_llama_cpp_runs_and_stores_what_the_name_says(kind, tmp_path):
    name = f"llama.cpp V {kind}"
    subject = CATALOGUE[name](name, Scratch(tmp_path, True))
    opened = subject.open(32)
    assert opened["positions"] == 5 + 16 and not opened["sees"]
    assert len(subject.emit(4)) == 4
    subject.close()
    assert type_bytes(subject.path) == count_types(kind)


def test_without_llama_cpp_its_rows_are_left_out_and_named(monkeypatch):
    options = parse(["--only", "V bf16", "llama.cpp V BF16"])
    monkeypatch.setattr(speed, "has_llama_cpp", lambda: False)
    assert choose(options) == (["V bf16"], ["llama.cpp V BF16"])
    assert len(LLAMA_CPP) == 6 and set(LLAMA_CPP) < set(CATALOGUE)


class FakeWorker:
    """Notes all calls, in one log of all workers."""

    log, broken = [], None

    def __init__(self, subject):
        self.name = subject

    def ask(self, method, *args):
        self.log.append((self.name, method))
        if self.broken == (self.name, method):
            raise RuntimeError("broken")
        return {"open": {}, "turn": {"rate": 1.0}, "close": 7}[method]

    def stop(self):
        self.log.append((self.name, "stop"))


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(FakeWorker, "log", [])
    monkeypatch.setattr("benchmarks.speed.Worker", FakeWorker)
    return FakeWorker


def test_turns_are_interleaved_round_by_round(fake):
    results = measure_group(["a", "b"], 2, 40)
    turns = [("a", "turn"), ("b", "turn")]
    ends = [("a", "close"), ("b", "close"), ("a", "stop"), ("b", "stop")]
    assert fake.log == [("a", "open"), ("b", "open"), *turns, *turns, *ends]
    assert [len(r.turns) for r in results.values()] == [2, 2] and results["b"].peak == 7


def test_every_worker_stops_when_one_fails(fake, monkeypatch):
    monkeypatch.setattr(fake, "broken", ("a", "turn"))
    with pytest.raises(RuntimeError, match="broken"):
        measure_group(["a", "b"], 2, 40)
    assert fake.log[-2:] == [("a", "stop"), ("b", "stop")]


def test_groups_hold_what_memory_holds():
    needs = {"a": 4, "b": 4, "c": 9, "d": 1}
    assert in_groups(needs, 18) == [["a", "b", "c", "d"]] == in_groups(needs, None)
    assert in_groups(needs, 8) == [["a", "b"], ["c"], ["d"]]


def test_medians_by_hand():
    opened = {"sees": True, "positions": 41, "load": 1.0, "disk": 2e6}

    def turn(rate, first):
        return {"rate": rate, "first": first, "caption": first + 1}

    fast = Result(opened, [turn(10.0, 1.0), turn(30.0, 1.0), turn(20.0, 4.0)], 3 * 10**6)
    assert fast.median("rate") == 20
    row = speed_table({"fast": fast}).splitlines()[-1]
    assert "20.0 (10.0 to 30.0)" in row and row.endswith("| 1.00 | 2.0 | 3.0 |")


@pytest.mark.parametrize(
    "argv,message",
    [
        (["--rounds", "0"], "--rounds must be 1 or more"),
        (["--tokens", "31"], "--tokens 32 to 400"),
        (["--tokens", "401"], "--tokens 32 to 400"),
        (["--only", "V fp64"], "known are V bf16"),
        (["--checkpoint", "packed"], "is not NAME=FOLDER"),
        (["--checkpoint", "packed=nowhere"], "a folder that has a config.json"),
        (["--checkpoint", f"V bf16={ROOT}"], "the name is taken"),
        (["--checkpoint", f"a={ROOT}", "--checkpoint", f"a={ROOT}"], "the name is taken"),
    ],
)
def test_wrong_arguments_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit):
        parse(argv)
    assert message in capsys.readouterr().err


def test_checkpoints_come_first():
    options = parse(["--checkpoint", f"nano={ROOT}", "--only", "V bf16", "nano"])
    assert choose(options)[0] == ["nano", "V bf16"] and options.checkpoint == {"nano": ROOT}
