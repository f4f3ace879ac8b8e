"""The scripts in examples/, run as a stranger runs them: what they save computes what they printed."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import finetune_lora
import finetune_qlora
import finetune_trainer
import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from bitsandbytes.nn import Linear4bit
from conftest import ROOT, text_section
from datasets import Image
from safetensors.torch import load_file
from torch import nn
from toy_data import pairs, toy_checkpoint, use_cache, write_parquet
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

from microvlm.data.collators import CaptionCollator
from microvlm.data.rows import load_rows

NANO = {"model": ROOT, "data": ROOT / "data/mini"}
ANSWER = "{caption} Style: {style}."
TRAINED = r"model\.(adapter|language_model\.layers)\."


def wide_checkpoint(folder: Path, text: str = "qwen2") -> Path:
    """A toy of V's kind, wide enough for NF4's blocks of 64 values."""
    return toy_checkpoint(folder, text_config=text_section(text, hidden_size=128, intermediate_size=256))


def make_toy(folder: Path) -> dict[str, Path]:
    """A checkpoint and eight pictures with captions, the last four held out too."""
    data = folder / "data"
    data.mkdir()
    rows = pairs(style=["flat", "round"] * 4)
    write_parquet(data / "train.parquet", rows)
    write_parquet(data / "validation.parquet", rows[4:])
    return {"model": wide_checkpoint(folder / "model"), "data": data}


@pytest.fixture
def toy(tmp_path, monkeypatch) -> dict[str, Path]:
    use_cache(monkeypatch, tmp_path / "cache")
    return make_toy(tmp_path)


def arguments(start: dict[str, Path], output: Path) -> list[str]:
    few = ["--max-steps", "2", "--batch-size", "4", "--limit", "4"]
    return ["--model", str(start["model"]), "--data", str(start["data"]), "--output", str(output), *few]


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> Iterator[dict[str, tuple]]:
    """Every script as a process, all at the same time: three with nano, QLoRA with a toy of V's kind."""
    folder = tmp_path_factory.mktemp("examples")
    toy, started = make_toy(folder), {}
    for name in ("trainer", "trl", "lora", "qlora"):
        start, output = toy if name == "qlora" else NANO, folder / name
        command = [sys.executable, str(ROOT / f"examples/finetune_{name}.py"), *arguments(start, output)]
        env = os.environ | {"HF_DATASETS_CACHE": str(folder / f"cache_{name}"), "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started[name] = subprocess.Popen(command, cwd=folder, env=env, **pipes), start, output
    yield started
    for process, _, _ in started.values():
        process.kill()
        process.wait()


def finish(processes, name: str) -> tuple[str, dict[str, Path], Path]:
    """What a script printed, what it started from and where it saved."""
    process, start, output = processes[name]
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return out, start, output


def run_here(module, start: dict[str, Path], output: Path, monkeypatch, capsys) -> str:
    monkeypatch.setattr(sys, "argv", [module.__file__, *arguments(start, output)])
    module.main()
    return capsys.readouterr().out


def printed(out: str) -> tuple[float, float, str]:
    """Loss before and after, and the caption after."""
    before, after = re.search(r"loss on 4 held-out rows: ([\d.]+) before, ([\d.]+) after", out).groups()
    return float(before), float(after), re.search(r"^after: (.*)$", out, re.M)[1]


def load(folder: Path):
    return finetune_trainer.load(folder).eval()


def held_out(data: Path) -> list[dict]:
    rows = load_rows(str(data / "validation.parquet"), limit=4)
    return [row | {"caption": ANSWER.format(**row)} for row in rows]


@torch.no_grad()
def loss_and_caption(model, processor, data: Path) -> tuple[float, str]:
    """By the collator of train_hf.py and the model's own loss; by `generate` with its default prompt."""
    batch = CaptionCollator(processor, model.default_prompt(1)[0].tolist())(held_out(data))
    ids = model.eval().generate(pixel_values=batch["pixel_values"][:1], max_new_tokens=32, do_sample=False)
    return model(**batch).loss.item(), processor.decode(ids[0], skip_special_tokens=True)


def near(loss: float, model):
    """What rounding allows: padding on the other side moves some of nano's 8-bit activations by a step."""
    return pytest.approx(loss, abs=3e-2 if model.config.qat_config.ternary_modules else 2e-4)


def changed(a: nn.Module, b: nn.Module) -> set[str]:
    """Names of the tensors that are not bit-identical."""
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    return {name for name in a if not torch.equal(a[name], b[name])}


def check_saved(folder: Path, start, out: str, data: Path) -> None:
    """What should move moved, the rest is bit-identical; the saved folder computes the printed loss and caption."""
    before, after, caption = printed(out)
    model, processor = load(folder), AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    matrices = {name for name, p in start.named_parameters() if re.match(TRAINED, name) and p.ndim > 1}
    moved = changed(start, model)
    assert matrices <= moved
    assert all(re.match(TRAINED, name) for name in moved)
    assert after < before
    assert loss_and_caption(start, processor, data)[0] == near(before, start)
    assert loss_and_caption(model, processor, data) == (near(after, start), caption)
    assert model.generation_config.to_dict() == start.generation_config.to_dict()


def check_adapter(folder: Path) -> None:
    """Branches and the adapter, all of them trained, and nothing else; nothing that only this machine knows."""
    tensors = load_file(folder / "adapter_model.safetensors")
    assert all("lora_" in name or ".model.adapter." in name for name in tensors)
    branches = [tensor for name, tensor in tensors.items() if "lora_B" in name]
    assert branches and all(tensor.any() for tensor in branches)
    assert "transformers_modules" not in (folder / "adapter_config.json").read_text()


# --- the collator


@pytest.mark.parametrize("source", ["nano", "toy"])
def test_the_collator_is_that_of_train_hf(source, toy):
    start = NANO if source == "nano" else toy
    processor, model = AutoProcessor.from_pretrained(start["model"], trust_remote_code=True), load(start["model"])
    rows = load_rows(str(start["data"] / "validation.parquet"), limit=4)
    prompt = processor.decode(model.config.default_prompt_ids)
    ours = finetune_trainer.CaptionCollator(processor, prompt, ANSWER)(list(rows.cast_column("image", Image())))
    theirs = CaptionCollator(processor, model.default_prompt(1)[0].tolist())(held_out(start["data"]))
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
    for i in range(len(rows)):
        for name in ("input_ids", "labels"):  # padded on other sides
            a, b = (batch[name][i][batch["attention_mask"][i] == 1] for batch in (ours, theirs))
            assert torch.equal(a, b)
    padding = ours["attention_mask"] == 0
    assert padding.any() and (ours["labels"][padding] == -100).all()


# --- full fine-tuning


def test_trainer_on_nano(processes):
    out, start, folder = finish(processes, "trainer")
    check_saved(folder, load(start["model"]), out, start["data"])
    assert load(folder).memory_fingerprint() == load(start["model"]).memory_fingerprint()  # taught facts stay readable


def test_trl_on_nano(processes):
    pytest.importorskip("trl")
    out, start, folder = finish(processes, "trl")
    check_saved(folder, load(start["model"]), out, start["data"])


def test_trl_and_trainer_agree(toy, tmp_path, monkeypatch, capsys):
    pytest.importorskip("trl")
    import finetune_trl

    results = [
        printed(run_here(module, toy, tmp_path / module.__name__, monkeypatch, capsys))
        for module in (finetune_trainer, finetune_trl)
    ]
    assert results[0] == results[1]


# --- LoRA


def test_lora_on_ternary_layers_is_not_merged(processes):
    out, start, folder = finish(processes, "lora")
    assert "loaded again, the logits are equal: True" in out
    assert "not saved" in out and not (folder / "merged").exists()
    check_adapter(folder)
    model, processor = load(start["model"]), AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model.load_adapter(str(folder))
    before, after, caption = printed(out)
    assert after < before
    assert loss_and_caption(model.eval(), processor, start["data"]) == (near(after, model), caption)
    base = {name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items()}
    frozen = {name: t for name, t in load(start["model"]).state_dict().items() if ".adapter." not in name}
    assert all(torch.equal(base[name], tensor) for name, tensor in frozen.items())


def test_lora_on_plain_layers_is_merged(toy, tmp_path, monkeypatch, capsys):
    out = run_here(finetune_lora, toy, tmp_path / "out", monkeypatch, capsys)
    assert "loaded again, the logits are equal: True" in out
    check_adapter(tmp_path / "out")
    check_saved(tmp_path / "out/merged", load(toy["model"]), out, toy["data"])


# --- QLoRA


def test_qlora_leaves_a_whole_checkpoint(processes):
    out, start, folder = finish(processes, "qlora")
    assert "loaded again, the logits are equal: True" in out
    check_adapter(folder)
    base = finetune_qlora.load(start["model"]).dequantize()
    check_saved(folder / "merged", base, out, start["data"])
    assert "quantization_config" not in (folder / "merged/config.json").read_text()
    rounded = changed(load(start["model"]), base)
    assert rounded and all(re.fullmatch(r"model\.language_model\.layers\..*_proj\.weight", name) for name in rounded)


def test_qlora_on_nano_rounds_the_vision_tower_alone(tmp_path, monkeypatch, capsys):
    use_cache(monkeypatch, tmp_path / "cache")
    model = finetune_qlora.load(ROOT)
    rounded = {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert rounded == {name for name in linears if name.startswith("model.vision_tower.")}
    kinds = {type(module).__name__ for module in model.model.language_model.layers.modules()}
    assert "TernaryLinear" in kinds
    out = run_here(finetune_qlora, NANO, tmp_path / "out", monkeypatch, capsys)
    assert "loaded again, the logits are equal: True" in out
    assert "not saved" in out
    check_adapter(tmp_path / "out")
    branches = load_file(tmp_path / "out/adapter_model.safetensors")
    assert all(f"base_model.model.{name}.lora_B.weight" in branches for name in rounded)
    before, after, _ = printed(out)
    assert after < before


def test_qlora_takes_a_checkpoint_in_4_bits_as_it_is(toy, tmp_path):
    """bitsandbytes' weights are no packed ones: they are not unpacked and rounded again. Here other layers are in 4 bits than it would choose."""
    skip = ["lm_head", r"model\.(?!language_model\.layers\.1\.).*"]
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", llm_int8_skip_modules=skip)
    source = {"trust_remote_code": True, "dtype": torch.float32}
    made = AutoModelForImageTextToText.from_pretrained(toy["model"], quantization_config=config, **source)
    made.save_pretrained(tmp_path / "4bit")
    loaded = finetune_qlora.load(str(tmp_path / "4bit"))
    rounded = {name for name, module in loaded.named_modules() if isinstance(module, Linear4bit)}
    assert len(rounded) == 7 and all(".layers.1." in name for name in rounded)
    assert not changed(made, loaded)
    assert not any(m.support_avx512bf16_for_cpu for m in loaded.modules() if isinstance(m, Linear4bit))


def qlora_gradients(checkpoint: Path, batch, evaluate: bool, repack: bool = False) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = finetune_qlora.add_lora(finetune_qlora.load(checkpoint))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, and lora_A then has no gradient
            nn.init.normal_(parameter, std=0.05)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = module.support_avx512bf16_for_cpu or repack
    if evaluate:
        with torch.no_grad():
            model.eval()(**batch)
    model.train()(**batch).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(params=["qwen2", "llama"])
def quantized_start(request, tmp_path, toy) -> tuple[Path, dict]:
    checkpoint = wide_checkpoint(tmp_path / request.param, request.param)
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    return checkpoint, CaptionCollator(processor, load(checkpoint).default_prompt(1)[0].tolist())(held_out(toy["data"]))


def test_qlora_gradients_after_an_evaluation(quantized_start):
    alone, after = (qlora_gradients(*quantized_start, evaluate) for evaluate in (False, True))
    assert alone.keys() == after.keys()
    assert all(torch.equal(alone[name], after[name]) for name in alone)
    assert all(grad.any() for name, grad in alone.items() if "lora_" in name)


@pytest.mark.skipif(not has_avx512bf16(), reason="the processor has no AVX512-BF16")
def test_qlora_without_the_guard_loses_gradients(quantized_start):
    """Why `load` sets support_avx512bf16_for_cpu: if this fails, bitsandbytes has changed and the line may go."""
    alone = qlora_gradients(*quantized_start, evaluate=False)
    try:
        after = qlora_gradients(*quantized_start, evaluate=True, repack=True)
    except RuntimeError as error:  # layers with a bias
        assert "in-place operation" in str(error)
    else:
        branches = [name for name in alone if "lora_A" in name]
        assert sum(float(after[name].norm() < 0.5 * alone[name].norm()) for name in branches) > len(branches) / 2
