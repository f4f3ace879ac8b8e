"""The arithmetic of benchmarks/train_memory.py against what autograd keeps of a real pass, and against a hand's."""

import pytest
import torch
from conftest import ROOT, tiny_config, tiny_inputs
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import train_memory
from microvlm.model import MicroVLMForConditionalGeneration

RECIPE = ROOT / "recipes/v/stage1.yaml"


@pytest.mark.parametrize("trains,row,once", [(False, 0, 2 * 48 * 32), (True, 2 * 48, 2 * 48 * 32)])
def test_a_linear_layer_keeps_a_bf16_weight_and_if_it_trains_its_input(trains, row, once):
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        linear = torch.nn.Linear(48, 32, bias=False).requires_grad_(trains)
        saved = train_memory.measure(lambda n: linear(torch.zeros(n, 48, requires_grad=True)), linear)
    assert (saved.row, saved.once) == (row, once)


@pytest.mark.parametrize("text", ["qwen2", "bitnet"])
@pytest.mark.parametrize("trainable", [["adapter", "alignment"], [".*"]], ids=["adapter", "all"])
def test_parts_add_up_to_what_a_real_pass_keeps(text, trainable):
    ternary = {"ternary_modules": [r"language_model\.layers\..*_proj"]} if text == "bitnet" else {}
    config = tiny_config(text, qat_config=ternary) if ternary else tiny_config(text)
    parts = train_memory.saved_parts(config, trainable, positions=32)
    torch.manual_seed(0)
    model = MicroVLMForConditionalGeneration(config).train()
    train_memory.freeze(model, trainable)
    length = 12

    def run(n):
        inputs = tiny_inputs(n, length - 5)
        with torch.autocast("cpu", torch.bfloat16):
            return model(**inputs, labels=inputs["input_ids"], use_cache=False).loss

    one, two = (train_memory.saved_bytes(lambda n=n: run(n), model) for n in (1, 2))
    layer = parts["training" if trainable == [".*"] else "frozen"]
    row = parts["vision tower"].row + parts["adapter"].row + length * (2 * layer.row + parts["head"].row)
    assert two - one == pytest.approx(row, rel=0.15)
    once = sum(parts[name].once for name in ("vision tower", "adapter", "head")) + 2 * layer.once
    assert 2 * one - two == pytest.approx(once, rel=0.15)


def test_a_plan_by_hand():
    plan = train_memory.Plan(RECIPE, [])
    assert plan.parameters == 504_276_800 and plan.trained == 4_719_616 and plan.nf4 == 0
    fixed = {"weights": 4 * plan.parameters, "gradients": 4 * plan.trained, "AdamW": 8 * plan.trained}
    assert plan.fixed() == fixed | {"buckets": 0.0, "gathered": 0.0}
    assert plan.fixed(ranks=4)["buckets"] == 4 * plan.trained
    assert plan.fixed(ranks=4, sharded=True)["weights"] == plan.parameters
    assert plan.length(10) == 25 + 24 + plan.caption(10) and plan.images == 1
    assert plan.peak(20) > plan.peak(10) > plan.peak(10, checkpointing=True)
    batch = plan.largest_batch(24e9)
    assert plan.peak(batch) <= 0.9 * 24e9 < plan.peak(batch + 1)


def test_the_table(capsys):
    train_memory.main([str(RECIPE), "--set", *train_memory.V_NF4])
    out = capsys.readouterr().out
    assert "| v/stage1, NF4 | 504,276,800 | 4,719,616 | 0.9% | 10 | 4.4 | 3.5 | 4.4 |" in out
