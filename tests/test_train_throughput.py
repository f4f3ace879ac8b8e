"""The training benchmark runs on a tiny model and its two sides agree; nothing here asserts a time."""

import math
import sys

import pytest
import torch
from toy_data import use_cache

from benchmarks import machine, train_throughput
from benchmarks.train_throughput import PLAIN, TRAINER, VARIANTS, Turn


def small_bench(folder, rounds: int) -> train_throughput.Bench:
    options = ["--small", "--batch-size", "3", "--steps", "2", "--rounds", str(rounds)]
    return train_throughput.Bench(train_throughput.parse(options), str(folder))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What the command prints, and the turns that it took."""
    folder, printed, turns = tmp_path_factory.mktemp("throughput"), [], []
    measure = train_throughput.measure
    with pytest.MonkeyPatch.context() as patch:
        use_cache(patch, folder / "cache")
        patch.setattr(
            train_throughput.transformers.utils.logging, "disable_progress_bar", lambda: None
        )  # for all tests
        patch.setattr("builtins.print", lambda *args, **kwargs: printed.append(" ".join(map(str, args))))
        patch.setattr(train_throughput, "measure", lambda *args: turns.append(measure(*args)) or turns[0])
        train_throughput.main(["--small", "--rounds", "2", "--steps", "2", "--batch-size", "3"])
    return "\n".join(printed), turns[0]


def test_every_variant_has_a_row_of_finite_numbers(run):
    out, turns = run
    assert list(turns) == [v.name for v in VARIANTS]
    for name, own in turns.items():
        assert len(own) == 2 and all(math.isfinite(turn.seconds) and turn.seconds > 0 for turn in own), name
        row = next(line for line in out.splitlines() if line.startswith(f"| {name} |"))
        assert math.isfinite(float(row.split("|")[2].split()[0])) and (name != PLAIN.name or "+0.0%" in row)


@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's")
def test_peak_memory_is_of_the_turn(run):
    assert all(turn.peak > 2**26 for turns in run[1].values() for turn in turns)
    machine.reset_peak()
    before = machine.peak_memory()
    torch.ones(2**25)  # 128 MiB
    grown = machine.peak_memory() - before
    machine.reset_peak()
    assert grown > 2**26 > machine.peak_memory() - before


def test_both_sides_compute_the_same_loss(tmp_path, monkeypatch):
    use_cache(monkeypatch, tmp_path / "cache")
    bench = small_bench(tmp_path, 1)
    batch = bench.collator([bench.rows[i] for i in range(3)])
    trainer = bench.make_trainer(TRAINER, bench.rows, bench.collator)
    with torch.no_grad(), trainer.compute_loss_context_manager():
        torch.manual_seed(0)  # the same dropout
        plain = train_throughput.plain_loss(bench.model, batch).item()
        torch.manual_seed(0)
        assert plain == pytest.approx(trainer.compute_loss(bench.model, dict(batch)).item(), rel=5e-3)


def test_variants_read_the_same_rows(tmp_path, monkeypatch):
    use_cache(monkeypatch, tmp_path / "cache")
    bench = small_bench(tmp_path, 2)
    batches = {}
    for variant in VARIANTS:
        for number in range(2):
            rows = bench.round_rows(number, variant)
            batches[variant, number] = rows[variant.accumulation * 3 : -3]  # those that count
            assert set(batches[variant, number]) == set(batches[PLAIN, number])
            assert variant.by_length or batches[variant, number] == batches[PLAIN, number]
        assert len({*batches[variant, 0], *batches[variant, 1]}) == 2 * 2 * 3
    seen = []
    monkeypatch.setattr(train_throughput, "plain_loss", lambda model, batch: seen.append(batch) or batch_loss(model))
    bench.turn(1, PLAIN)
    assert len(seen) == 3  # a warm-up step and two that count
    expected = bench.collator([bench.rows[i] for i in batches[PLAIN, 1][-3:]])
    assert torch.equal(seen[-1]["input_ids"], expected["input_ids"])
    assert torch.equal(seen[-1]["pixel_values"], expected["pixel_values"])


def batch_loss(model):
    return sum(p.sum() for p in model.parameters() if p.requires_grad)


def test_the_table_takes_ratios_round_by_round():
    times = {PLAIN.name: (1.0, 2.0, 4.0), TRAINER.name: (1.1, 2.2, 40.0)}
    turns = {name: [Turn(seconds, 10**8) for seconds in values] for name, values in times.items()}
    row = train_throughput.table(turns, 8).splitlines()[-1]
    assert row == "| MicroVLMTrainer | 3.64 (0.2 to 7.27) | +10.0% | 0.10 |"


@pytest.mark.parametrize("option", [["--steps", "3"], ["--steps", "0"], ["--rounds", "0"], ["--batch-size", "1"]])
def test_options_that_make_no_turn_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        train_throughput.main(["--small", *option])
    assert "must be even" in capsys.readouterr().err


def test_more_rows_than_there_are_is_refused(tmp_path, monkeypatch):
    use_cache(monkeypatch, tmp_path / "cache")
    with pytest.raises(IndexError, match="out of range"):
        small_bench(tmp_path, 1000)
