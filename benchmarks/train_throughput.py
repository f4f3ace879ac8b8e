"""Measure stage-1 training speed: `MicroVLMTrainer` next to a plain loop over the same modules.

    python -m benchmarks.train_throughput --rounds 5 --steps 6
    python -m benchmarks.train_throughput --small --rounds 2 --steps 2 --batch-size 4

V at full size with random weights, vision tower and language model frozen, lm 1.0 + align 1.0, bf16 autocast. Notable:

- Rows are those of data/mini/train.parquet, decoded in the loop. Tokenizer and prompt are this repo's checkpoint's.
- All variants share one model. In a round each has a turn over the same rows: a warm-up step, then `--steps` batches
  that count. Rates are medians over rounds, ratios medians of the rounds' ratios.
- Both sides compute the same loss of a batch (tests/test_train_throughput.py).
- The plain loop computes logits at labelled positions only, the trainer from the batch's first labelled column on.
- Accumulation: steps of two batches; the alignment loss is over both, so tower and adapter run once more.
- Peak memory is the process's highest resident size in a turn (Linux only), with the shared model in it.
- Run it on an idle machine.
"""

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoProcessor, PrinterCallback, TrainerCallback, TrainingArguments

from benchmarks.machine import describe_machine, peak_memory, reset_peak
from benchmarks.models import v_config
from microvlm.data.collators import CaptionCollator, FeatureCollator
from microvlm.data.feature_cache import cache_vision_features
from microvlm.data.rows import load_rows
from microvlm.files import ROOT
from microvlm.model import MicroVLMConfig, MicroVLMForConditionalGeneration
from microvlm.tables import markdown_table
from microvlm.train.setup import set_trainable
from microvlm.train.trainer import MicroVLMTrainer, TrainerOptions

DATA = ROOT / "data" / "mini" / "train.parquet"
WEIGHTS = {"lm": 1.0, "align": 1.0}
LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 1e-5, 0.01, 1.0


@dataclass(frozen=True)
class Variant:
    """What a row of the table runs with."""

    name: str
    plain: bool = False
    cached: bool = False
    checkpointing: bool = False
    accumulation: int = 1
    by_length: bool = False


PLAIN, TRAINER = Variant("plain loop", plain=True), Variant("MicroVLMTrainer")
VARIANTS = (
    PLAIN,
    TRAINER,
    Variant("MicroVLMTrainer, vision feature cache", cached=True),
    Variant("MicroVLMTrainer, gradient checkpointing", checkpointing=True),
    Variant("MicroVLMTrainer, 2 x accumulation", accumulation=2),
    Variant("MicroVLMTrainer, rows sorted by length", by_length=True),
)


class Turn(NamedTuple):
    """Seconds of the batches that count, data included, and the highest resident size, bytes or None."""

    seconds: float
    peak: int | None


class StepClock(TrainerCallback):
    """Note when steps end."""

    def __init__(self):
        self.times = []

    def on_step_end(self, args, state, control, **kwargs):
        self.times.append(time.perf_counter())


def build(small: bool, processor) -> MicroVLMForConditionalGeneration:
    """Build V, or a tiny model of its kind, with random weights and the processor's tokens."""
    prompt = MicroVLMConfig.from_pretrained(ROOT).default_prompt_ids
    config = v_config(small, image_token_id=processor.image_token_id, default_prompt_ids=prompt)
    torch.manual_seed(0)
    # eager attention, as in the recipes that run on a CPU
    model = MicroVLMForConditionalGeneration._from_config(config, dtype=torch.float32, attn_implementation="eager")
    set_trainable(model, ["adapter", "alignment"])
    return model.train()


class Bench:
    """Model, rows and collators of all variants; `folder`: for the vision cache and the trainers."""

    def __init__(self, options: argparse.Namespace, folder: str):
        self.batch_size, self.steps, self.rounds = options.batch_size, options.steps, options.rounds
        self.folder = folder
        processor = AutoProcessor.from_pretrained(ROOT)
        self.model = build(options.small, processor)
        side = self.model.model.vision_tower.timm_model.patch_embed.img_size[0]
        prompt = self.model.default_prompt(1)[0].tolist()
        processor.image_processor.size = {"height": side, "width": side}
        self.collator = CaptionCollator(processor, prompt)
        # a round: a batch that only accumulation warms up with, one to warm up, those that count, one to read ahead
        self.per_round = (self.steps + 3) * self.batch_size
        self.rows = load_rows(str(DATA)).shuffle(seed=0).select(range(self.rounds * self.per_round))
        answers = self.collator.answers([caption.strip() for caption in self.rows["caption"]])
        self.lengths = [len(ids) for ids in answers]
        # features of the vision tower
        tower, label = self.model.model.vision_tower, f"{side} x {side}"
        features, self.cached_rows = cache_vision_features(tower, self.collator, self.rows, 1, folder, label)
        self.feature_collator = FeatureCollator(processor, prompt, features=features)

    def round_rows(self, number: int, variant: Variant) -> list[int]:
        """List which rows the turn of a variant reads, in order."""
        start = number * self.per_round + (0 if variant.accumulation > 1 else self.batch_size)
        first = number * self.per_round + 2 * self.batch_size
        end = first + self.steps * self.batch_size
        counting = list(range(first, end))
        if variant.by_length:
            counting.sort(key=lambda i: self.lengths[i])
        return [*range(start, first), *counting, *range(end, (number + 1) * self.per_round)]

    def turn(self, number: int, variant: Variant) -> Turn:
        """Train for one warm-up step and the batches that count."""
        rows = (self.cached_rows if variant.cached else self.rows).select(self.round_rows(number, variant))
        collator = self.feature_collator if variant.cached else self.collator
        torch.manual_seed(number)
        reset_peak()
        run = self.plain_loop if variant.plain else self.trainer
        return Turn(run(variant, rows, collator), peak_memory())

    def plain_loop(self, variant: Variant, rows, collator) -> float:
        """Train without a trainer; returns the seconds of the batches that count."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
        start = None
        for i, batch in enumerate(DataLoader(rows, self.batch_size, collate_fn=collator)):
            with torch.autocast("cpu", torch.bfloat16):
                loss = plain_loss(self.model, batch)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            # the clock starts after the warm-up step
            start = start or time.perf_counter()
            if i == self.steps:
                return time.perf_counter() - start

    def make_trainer(self, variant: Variant, rows, collator) -> MicroVLMTrainer:
        """Make the trainer of train_hf.py with the settings of the plain loop."""
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
        options, data = TrainerOptions(loss_weights=WEIGHTS), {"train_dataset": rows, "data_collator": collator}
        trainer = MicroVLMTrainer(model=self.model, args=args, options=options, **data)
        trainer.remove_callback(PrinterCallback)
        return trainer

    def trainer(self, variant: Variant, rows, collator) -> float:
        """Train with `MicroVLMTrainer`; returns the seconds of the batches that count."""
        clock, trainer = StepClock(), self.make_trainer(variant, rows, collator)
        trainer.add_callback(clock)
        trainer.train()
        if variant.checkpointing:
            self.model.activation_checkpointing_disable()
        return clock.times[-1] - clock.times[0]


def plain_loss(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Compute the stage-1 loss written out, with logits at labelled positions only."""
    core, ids, labels = model.model, batch["input_ids"], batch["labels"]
    # image to prefix
    with torch.no_grad():
        features = core.vision_tower(batch["pixel_values"], do_pooling=False).last_hidden_state
    prefix, _ = core.adapter(features[:, core.vision_tower.timm_model.num_prefix_tokens :])  # (B, P, D)
    # prefix and words to logits
    words = core.get_input_embeddings()(ids)  # (B, T, D)
    x = words.masked_scatter((ids == model.config.image_token_id).unsqueeze(-1), prefix.to(words.dtype))
    hidden = core.language_model(inputs_embeds=x, attention_mask=batch["attention_mask"], use_cache=False)
    target = F.pad(labels, (0, 1), value=-100)[:, 1:]  # of position t, token t + 1
    place = target != -100
    lm = F.cross_entropy(model.lm_head(hidden.last_hidden_state[place]).float(), target[place])
    # images and captions find each other
    text = (labels != -100).unsqueeze(-1)
    image_embeds = core.alignment.embed_image(prefix.mean(1))
    text_embeds = core.alignment.embed_text((words * text).sum(1) / text.sum(1))
    return WEIGHTS["lm"] * lm + WEIGHTS["align"] * model.contrastive_loss(image_embeds, text_embeds)


def measure(bench: Bench) -> dict[str, list[Turn]]:
    """Give every variant a turn in each round."""
    turns = defaultdict(list)
    for i in range(bench.rounds):
        for variant in VARIANTS:
            turns[variant.name].append(bench.turn(i, variant))
            rate = bench.steps * bench.batch_size / turns[variant.name][-1].seconds
            print(f"round {i + 1} of {bench.rounds}, {variant.name}: {rate:.3g} samples/s", file=sys.stderr, flush=True)
    return dict(turns)


def table(turns: dict[str, list[Turn]], samples: int) -> str:
    """Write the medians of every variant's turns, of `samples` rows each."""
    header = ["stage 1, bf16 autocast", "samples/s, median (range)", "time by the plain loop's", "peak memory, GB"]
    rows = []
    for name, own in turns.items():
        rates, peaks = [samples / turn.seconds for turn in own], [turn.peak for turn in own]
        time_by_plain = median(turn.seconds / plain.seconds for turn, plain in zip(own, turns[PLAIN.name]))
        rate = f"{median(rates):.3g} ({min(rates):.3g} to {max(rates):.3g})"
        memory = "not measured" if None in peaks else f"{max(peaks) / 1e9:.2f}"
        rows.append([name, rate, f"{time_by_plain - 1:+.1%}", memory])
    return markdown_table(header, rows)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4, help="batches that count in a turn, even, default %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every variant, default %(default)s")
    parser.add_argument("--batch-size", type=int, default=10, help="default %(default)s")
    parser.add_argument("--small", action="store_true", help="a tiny shape: shows that this runs, not how fast")
    options = parser.parse_args(argv)
    if options.steps < 2 or options.steps % 2 or options.rounds < 1 or options.batch_size < 2:
        parser.error("--steps must be even and 2 or more, --rounds 1 or more, --batch-size 2 or more.")
    return options


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    transformers.utils.logging.disable_progress_bar()
    print(f"{describe_machine()}\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, folder)
        name = f"{'a tiny model' if options.small else 'microvlm-v'}: {bench.model.num_parameters():,} parameters"
        rounds = f"batch {options.batch_size}, {options.rounds} rounds of {options.steps} batches"
        print(f"## {name}; {rounds}\n", flush=True)
        print(table(measure(bench), options.steps * options.batch_size))


if __name__ == "__main__":
    main()
