"""Stage-1 training speed: samples per second of `MicroVLMTrainer` beside a plain loop over the same modules.

    python -m benchmarks.train_throughput
    python -m benchmarks.train_throughput --rounds 5 --steps 6 --json runs/train_throughput.json
    python -m benchmarks.train_throughput --small --rounds 2 --steps 2 --batch-size 4

V's full-size shape with random weights (no memory module: stage 1 does not use it), vision tower and language model frozen, adapter and
alignment train, lm 1.0 + align 1.0, bf16 autocast, eager attention as in the recipes that run on a CPU. Notable:

- Pictures and captions are those of data/mini/train.parquet, read and decoded in the loop by the real collator. Tokenizer and picture
  size are those of the checkpoint in this folder; the config takes its image, end and pad tokens, all below 4,096, and its default
  prompt. The vocabulary of the head stays V's.
- All variants share one process and one model: before a turn its flags, collator and the dtype of its frozen weights are set. In a
  round every variant has one turn, over the same rows; a turn is a warm-up step and `--steps` batches that count. Start-up of `Trainer`
  is outside: time runs from the end of the warm-up step to the end of the last step. Rates are medians over rounds, ratios medians of
  the rounds' ratios.
- Before anything is timed both sides must compute the same loss on one batch.
- The plain loop computes logits at labelled positions alone; `MicroVLMTrainer` from the first labelled column of the batch on.
- Accumulation: steps of two batches. The alignment loss is over both, for which vision tower and adapter run over both once more.
- "rows sorted by length": the counted rows of a round, sorted before they are cut into batches.
- Frozen weights in bf16 is no option of train_hf.py; the row is for information.
- Share of the peak: matrix-product FLOPs that the step needs, by `step_flops`, over time, over the highest rate of a bare bf16
  product. Work done twice (checkpointing, the pass for accumulation) and on padding inside the head is not needed, so not counted;
  padding in the decoder is.
- Peak memory is the process's highest resident size during a turn (VmHWM, reset before it; Linux only), with the shared model in it.
- Run it on an idle machine.
"""

import argparse
import ctypes
import gc
import json
import math
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoProcessor, PrinterCallback, TrainerCallback, TrainingArguments

from benchmarks.overhead import machine, seconds
from benchmarks.parameters import ROOT, MicroVLMConfig, MicroVLMForConditionalGeneration, markdown_table
from microvlm.data.collators import CaptionCollator, FeatureCollator
from microvlm.data.feature_cache import cache_vision_features
from microvlm.data.rows import load_rows
from microvlm.train.setup import set_trainable
from microvlm.train.trainer import MicroVLMTrainer, TrainerOptions

DATA = ROOT / "data" / "mini" / "train.parquet"
WEIGHTS = {"lm": 1.0, "align": 1.0}
LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-5, 0.01, 1.0
SMALL = {
    "vision_config": {"model_args": {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3}},
    "text_config": {
        "vocab_size": 4096,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "adapter_config": {
        "vision_hidden_size": 24,
        "num_patches": 16,
        "num_prefix_tokens": 5,
        "mlp_hidden_size": 32,
        "num_attention_heads": 4,
    },
    "alignment_config": {"projection_size": 32},
}


@dataclass(frozen=True)
class Variant:
    """What a row of the table runs with."""

    name: str
    plain: bool = False
    cached: bool = False
    checkpointing: bool = False
    accumulation: int = 1
    by_length: bool = False
    frozen_dtype: torch.dtype = torch.float32


PLAIN, TRAINER = Variant("plain loop", plain=True), Variant("MicroVLMTrainer")
CACHED = Variant("MicroVLMTrainer, vision feature cache", cached=True)
VARIANTS = (
    PLAIN,
    TRAINER,
    CACHED,
    Variant("MicroVLMTrainer, gradient checkpointing", checkpointing=True),
    Variant("MicroVLMTrainer, 2 x accumulation", accumulation=2),
    Variant("MicroVLMTrainer, rows sorted by length", by_length=True),
    Variant("plain loop, frozen weights in bf16", plain=True, frozen_dtype=torch.bfloat16),
)


@dataclass
class Turn:
    """What one turn of a variant took.

    Args:
        seconds: of the counted batches, data included.
        waited: the collator's part of it, seconds.
        flops: matrix-product FLOPs of the counted batches.
        peak: highest resident size, bytes, or None where the system does not tell.
    """

    seconds: float
    waited: float
    flops: float
    peak: int | None


class TimedCollator:
    """A collator, and the seconds that its batches took."""

    def __init__(self, collator):
        self.collator, self.seconds = collator, []

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        took, batch = seconds(lambda: self.collator(rows))
        self.seconds.append(took)
        return batch


class StepClock(TrainerCallback):
    """Notes when steps end."""

    def __init__(self):
        self.times = []

    def on_step_end(self, args, state, control, **kwargs):
        self.times.append(time.perf_counter())


# ------------------------------------------------------------------------------------------------------ model and data


def build(small: bool, processor) -> MicroVLMForConditionalGeneration:
    """V, or a tiny model of the same architecture, with random weights and the tokens of `processor`."""
    config = json.loads((ROOT / "configs" / "microvlm-v.json").read_text(encoding="utf-8"))
    tokenizer, prompt = processor.tokenizer, json.loads((ROOT / "config.json").read_text())["default_prompt_ids"]
    config |= {"use_memory": False, "image_token_id": processor.image_token_id, "default_prompt_ids": prompt}
    config["text_config"] |= {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    for section, values in SMALL.items() if small else ():
        config[section] |= values
    torch.manual_seed(0)
    config = MicroVLMConfig.from_dict(config)
    model = MicroVLMForConditionalGeneration._from_config(config, dtype=torch.float32, attn_implementation="eager")
    set_trainable(model, ["adapter", "alignment"])
    return model.train()


def set_frozen_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Store what does not train in `dtype`."""
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


class Bench:
    """Model, rows and collators of all variants.

    Args:
        small: a tiny shape.
        batch_size: rows of a batch.
        steps: batches that count in a turn.
        rounds: turns of every variant.
        folder: for the vision cache and the trainers.
    """

    def __init__(self, small: bool, batch_size: int, steps: int, rounds: int, folder: str):
        self.batch_size, self.steps, self.folder = batch_size, steps, folder
        processor = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)
        self.model = build(small, processor)
        side = self.model.model.vision_tower.timm_model.patch_embed.img_size[0]
        prompt = self.model.default_prompt(1)[0].tolist()
        self.collator = CaptionCollator(processor, prompt, image_size=side)
        rows = load_rows(str(DATA)).shuffle(seed=0)
        self.prompt_length = len(prompt)
        all_answers = [len(ids) for ids in self.collator.answers([c.strip() for c in rows["caption"]])]
        # of a round: a batch that only accumulation warms up with, one to warm up, those that count, one to read ahead
        self.per_round = (steps + 3) * batch_size
        needed = rounds * self.per_round
        if needed > len(rows):
            raise ValueError(f"{rounds} rounds need {needed} rows, {DATA.name} has {len(rows)}: fewer rounds or steps.")
        self.rows, self.answers = rows.select(range(needed)), all_answers[:needed]
        self.cache_seconds, (features, self.cached_rows) = seconds(
            lambda: cache_vision_features(
                self.model.model.vision_tower, self.collator, self.rows, 1, folder, f"{side} x {side}"
            )
        )
        if len(self.cached_rows) < needed:
            raise ValueError(f"{needed - len(self.cached_rows)} pictures of {DATA.name} cannot be read.")
        self.feature_collator = FeatureCollator(features, processor, prompt)

    def round_rows(self, round: int, variant: Variant) -> list[int]:
        """Which rows the turn of a variant reads, in order."""
        start = round * self.per_round + (0 if variant.accumulation > 1 else self.batch_size)
        counted = round * self.per_round + 2 * self.batch_size
        end = counted + self.steps * self.batch_size
        middle = list(range(counted, end))
        if variant.by_length:
            middle.sort(key=lambda i: self.answers[i])
        return [*range(start, counted), *middle, *range(end, (round + 1) * self.per_round)]

    def counted_flops(self, rows: list[int], variant: Variant) -> float:
        counted, B = rows[variant.accumulation * self.batch_size : -self.batch_size], self.batch_size
        total = 0.0
        for k in range(0, len(counted), B):
            parts = step_flops(self.model, self.prompt_length, [self.answers[i] for i in counted[k : k + B]])
            total += sum(parts.values()) - (parts["vision tower"] if variant.cached else 0.0)
        return total

    def turn(self, round: int, variant: Variant) -> Turn:
        """Train for one warm-up step and the batches that count."""
        place = self.round_rows(round, variant)
        rows = (self.cached_rows if variant.cached else self.rows).select(place)
        collator = TimedCollator(self.feature_collator if variant.cached else self.collator)
        set_frozen_dtype(self.model, variant.frozen_dtype)
        torch.manual_seed(round)
        reset_peak()
        run = self.plain_loop if variant.plain else self.trainer
        took = run(variant, rows, collator)
        peak = peak_memory()
        set_frozen_dtype(self.model, torch.float32)
        waited = sum(collator.seconds[-self.steps :])  # Trainer reads a batch ahead, so it is not those that count
        return Turn(took, waited, self.counted_flops(place, variant), peak)

    def plain_loop(self, variant: Variant, rows, collator) -> float:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
        started = None
        for i, batch in enumerate(DataLoader(rows, self.batch_size, collate_fn=collator)):
            with torch.autocast("cpu", torch.bfloat16):
                loss = plain_loss(self.model, batch)
            loss.backward()
            nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            started = started or time.perf_counter()
            if i == self.steps:
                return time.perf_counter() - started

    def make_trainer(self, variant: Variant, rows, collator, callbacks: Iterable = ()) -> MicroVLMTrainer:
        args = TrainingArguments(
            output_dir=self.folder,
            max_steps=1 + self.steps // variant.accumulation,
            per_device_train_batch_size=self.batch_size,
            gradient_accumulation_steps=variant.accumulation,
            activation_checkpointing=variant.checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": False},
            train_sampling_strategy="sequential",
            learning_rate=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=MAX_GRAD_NORM,
            bf16=True,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=["labels"],
            dataloader_pin_memory=False,
        )
        trainer = MicroVLMTrainer(
            model=self.model,
            args=args,
            train_dataset=rows,
            data_collator=collator,
            callbacks=list(callbacks),
            options=TrainerOptions(loss_weights=WEIGHTS),
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def trainer(self, variant: Variant, rows, collator) -> float:
        clock = StepClock()
        self.make_trainer(variant, rows, collator, [clock]).train()
        if variant.checkpointing:
            self.model.activation_checkpointing_disable()
        return clock.times[-1] - clock.times[0]

    def losses(self) -> tuple[float, float]:
        """Of the first batch, by the plain loop and by the trainer, with the same dropout.

        Raises:
            ValueError: they differ.
        """
        batch = self.collator([self.rows[i] for i in range(self.batch_size)])
        trainer = self.make_trainer(TRAINER, self.rows, self.collator)
        with torch.no_grad(), trainer.compute_loss_context_manager():
            torch.manual_seed(0)
            plain = plain_loss(self.model, batch).item()
            torch.manual_seed(0)
            ours = trainer.compute_loss(self.model, dict(batch)).item()
        if not math.isclose(plain, ours, rel_tol=5e-3):
            raise ValueError(
                f"the two sides compute different losses, {plain:.5f} and {ours:.5f}: their times tell nothing."
            )
        return plain, ours

    def count_flops(self) -> tuple[float, float]:
        """FLOPs of the first batch's step: by `step_flops`, and by torch's counter."""
        batch = self.collator([self.rows[i] for i in range(self.batch_size)])
        # the counter knows products but not the fused attention of a CPU
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            with torch.autocast("cpu", torch.bfloat16):
                loss = plain_loss(self.model, batch)
            loss.backward()
        self.model.zero_grad()
        formula = step_flops(self.model, self.prompt_length, self.answers[: self.batch_size])
        return sum(formula.values()), float(counter.get_total_flops())


def plain_loss(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The stage-1 loss written out, with logits at labelled positions alone."""
    core, ids, labels = model.model, batch["input_ids"], batch["labels"]
    with torch.no_grad():
        features = core.vision_tower(batch["pixel_values"], do_pooling=False).last_hidden_state
    prefix, _ = core.adapter(features[:, core.vision_tower.timm_model.num_prefix_tokens :])  # (B, P, D)
    words = core.get_input_embeddings()(ids)  # (B, T, D)
    x = words.masked_scatter((ids == model.config.image_token_id).unsqueeze(-1), prefix.to(words.dtype))
    hidden = core.language_model(inputs_embeds=x, attention_mask=batch["attention_mask"], use_cache=False)
    target = F.pad(labels, (0, 1), value=-100)[:, 1:]  # of position t, token t + 1
    place = target != -100
    lm = F.cross_entropy(model.lm_head(hidden.last_hidden_state[place]).float(), target[place])
    text = (labels != -100).unsqueeze(-1)
    image_embeds = core.alignment.embed_image(prefix.mean(1))
    text_embeds = core.alignment.embed_text((words * text).sum(1) / text.sum(1))
    return WEIGHTS["lm"] * lm + WEIGHTS["align"] * model.contrastive_loss(image_embeds, text_embeds)


# ------------------------------------------------------------------------------------------------------ memory, FLOPs, peak


def reset_peak() -> None:
    """Give free memory back and let the highest resident size begin anew."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int | None:
    """Highest resident size since `reset_peak`, bytes."""
    if sys.platform != "linux":
        return None
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def linear_flops(module: nn.Module) -> int:
    """Of all linear layers in it, per position, forward."""
    return sum(2 * m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def decoder_flops(model, rows: int, length: int) -> float:
    """Matrix products of the frozen decoder over rows x length positions, forward and backward.

    A frozen layer has no weight gradient: 2 times its forward. Attention has no weights: 3 times.
    """
    decoder = model.model.language_model
    attention = decoder.layers[0].self_attn
    width = attention.o_proj.in_features
    per_row = 4 * length * length * width * len(decoder.layers)
    return rows * (2 * length * linear_flops(decoder) + 3 * per_row)


def step_flops(model, prompt_length: int, answers: list[int]) -> dict[str, float]:
    """Matrix products of a stage-1 step by part: forward of all, gradients of what trains and what lies behind it.

    Args:
        model: a ViT and a decoder, both frozen; adapter and alignment train.
        prompt_length: positions before the answer.
        answers: length of every row's answer, with its end.
    """
    core, adapter, B = model.model, model.model.adapter, len(answers)
    vit = core.vision_tower.timm_model
    patches, width = vit.patch_embed.num_patches, vit.num_features
    tokens = patches + vit.num_prefix_tokens
    vision = 2 * patches * vit.patch_embed.proj.weight.numel()
    vision += tokens * linear_flops(vit.blocks) + 4 * tokens * tokens * width * len(vit.blocks)
    P, D = adapter.query_tokens.shape
    per_patch = 3 * linear_flops(adapter.fc2) + 3 * linear_flops(adapter.k_proj) + 3 * linear_flops(adapter.v_proj)
    per_patch += 2 * linear_flops(adapter.fc1)  # its input needs no gradient
    pooling = 3 * 4 * P * patches * D + 3 * P * linear_flops(adapter.out_proj)
    alignment = core.alignment
    shared = alignment.image_proj.out_features
    return {
        "vision tower": B * vision,
        "adapter": B * (patches * per_patch + pooling) + 3 * P * linear_flops(adapter.q_proj),
        "decoder": decoder_flops(model, B, prompt_length + max(answers)),
        "head": 2 * sum(answers) * linear_flops(model.lm_head),
        "alignment": 3 * B * linear_flops(alignment) + 3 * 2 * B * B * shared,
    }


def product_rate(m: int, n: int, k: int, repeats: int = 7) -> float:
    """FLOP/s of a bare bf16 product (m, k) x (k, n), median."""
    x, w = torch.randn(m, k, dtype=torch.bfloat16), torch.randn(n, k, dtype=torch.bfloat16)
    took = [seconds(lambda: F.linear(x, w))[0] for _ in range(repeats + 1)][1:]
    return 2 * m * n * k / median(took)


# ------------------------------------------------------------------------------------------------------ report


def measure(bench: Bench, rounds: int) -> tuple[dict[str, list[Turn]], dict[str, float]]:
    """Turns of every variant, and the rates of bare products, FLOP/s, one by the model's shape and one large."""
    text = bench.model.config.text_config
    positions = bench.batch_size * (bench.prompt_length + round(mean(bench.answers)))
    square = 4 * text.hidden_size // 256 * 256 or 256
    shapes = [(positions, text.intermediate_size, text.hidden_size), (square, square, square)]
    turns, rates = defaultdict(list), defaultdict(list)
    for i in range(rounds):
        for m, n, k in shapes:
            rates[f"({m}, {k}) x ({k}, {n})"].append(product_rate(m, n, k))
        for variant in VARIANTS:
            turns[variant.name].append(bench.turn(i, variant))
            rate = bench.steps * bench.batch_size / turns[variant.name][-1].seconds
            print(f"round {i + 1} of {rounds}, {variant.name}: {rate:.3g} samples/s", file=sys.stderr, flush=True)
    return dict(turns), {name: median(values) for name, values in rates.items()}


def summary(turns: dict[str, list[Turn]], samples: int, peak_rate: float) -> dict[str, dict[str, float | None]]:
    """Medians of every variant.

    Args:
        turns: one per round.
        samples: of a turn.
        peak_rate: FLOP/s of a bare product.
    """
    base = turns[PLAIN.name]
    out = {}
    for name, own in turns.items():
        peaks = [t.peak for t in own]
        out[name] = {
            "samples_per_second": median(samples / t.seconds for t in own),
            "time_by_plain": median(t.seconds / p.seconds for t, p in zip(own, base)),
            "of_peak": median(t.flops / t.seconds / peak_rate for t in own),
            "data": median(t.waited / t.seconds for t in own),
            "peak_bytes": None if None in peaks else max(peaks),
        }
    return out


def table(results: dict[str, dict[str, float | None]], turns: dict[str, list[Turn]], samples: int) -> str:
    rows = []
    for name, r in results.items():
        rates = [samples / t.seconds for t in turns[name]]
        memory = "not measured" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 1e9:.2f}"
        rows.append(
            [
                name,
                f"{r['samples_per_second']:.3g} ({min(rates):.3g} to {max(rates):.3g})",
                f"{r['time_by_plain'] - 1:+.1%}",
                f"{r['of_peak']:.1%}",
                f"{r['data']:.1%}",
                memory,
            ]
        )
    header = [
        "stage 1, bf16 autocast",
        "samples/s, median (range)",
        "time by the plain loop's",
        "of the product peak",
        "data",
        "peak memory, GB",
    ]
    return markdown_table(header, rows)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4, help="batches that count in a turn, even, default %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every variant, default %(default)s")
    parser.add_argument("--batch-size", type=int, default=10, help="default %(default)s")
    parser.add_argument(
        "--small", action="store_true", help="a tiny shape: shows that this runs, its numbers say nothing"
    )
    parser.add_argument("--json", help="JSON file for all numbers")
    options = parser.parse_args(argv)
    if options.steps < 2 or options.steps % 2 or options.rounds < 1 or options.batch_size < 2:
        parser.error("--steps must be even and 2 or more, --rounds 1 or more, --batch-size 2 or more.")
    transformers.utils.logging.disable_progress_bar()
    where = machine()
    print(f"{where}\n", flush=True)
    B, samples = options.batch_size, options.steps * options.batch_size
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options.small, B, options.steps, options.rounds, folder)
        model = bench.model
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(
            f"## {'a tiny model' if options.small else 'microvlm-v'}: {model.num_parameters():,} parameters, {trained:,} train; "
            f"batch {B}, {options.rounds} rounds of {options.steps} batches\n",
            flush=True,
        )
        plain, ours = bench.losses()
        formula, counted = bench.count_flops()
        parts = step_flops(model, bench.prompt_length, bench.answers[:B])
        turns, rates = measure(bench, options.rounds)
        results = summary(turns, samples, max(rates.values()))
        cache_rate = len(bench.rows) / bench.cache_seconds
    cached, trainer = (results[v.name]["samples_per_second"] for v in (CACHED, TRAINER))
    gain = median(t.seconds / c.seconds for t, c in zip(turns[TRAINER.name], turns[CACHED.name]))
    print(f"{table(results, turns, samples)}\n")
    print(f"Loss of one batch: plain loop {plain:.4f}, MicroVLMTrainer {ours:.4f}.")
    print(f"bf16 products: {'; '.join(f'{name} {rate / 1e12:.3g} TFLOP/s' for name, rate in rates.items())}.")
    print(
        f"Products of the first batch's step: {formula / B / 1e9:.4g} GFLOP a sample by formula, {counted / B / 1e9:.4g} by torch's "
        f"counter; {', '.join(f'{name} {value / formula:.1%}' for name, value in parts.items())}."
    )
    print(
        f"Vision feature cache: x {gain:.3f} ({trainer:.3g} to {cached:.3g} samples/s); making it takes once "
        f"{1e3 / cache_rate:.3g} ms a picture and view ({cache_rate:.3g} pictures/s, {len(bench.rows)} pictures)."
    )
    values = {
        "machine": where,
        "options": vars(options),
        "results": results,
        "turns": {name: [asdict(t) for t in own] for name, own in turns.items()},
        "product_flops_per_second": rates,
        "flops": {"formula": formula, "counted": counted, "parts": parts},
        "losses": {"plain": plain, "trainer": ours},
        "vision_cache": {"gain": gain, "pictures_per_second": cache_rate},
    }
    if options.json:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        Path(options.json).write_text(json.dumps(values, indent=1))
    return values


if __name__ == "__main__":
    main()
