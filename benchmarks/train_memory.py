"""Compute the memory of a training step on a GPU by arithmetic; nothing runs on a GPU.

    python -m benchmarks.train_memory
    python -m benchmarks.train_memory recipes/m/stage1.yaml --set trainable=.* training.per_device_train_batch_size=20

One row per recipe, from which what trains, batch, episodes and NF4 are read. The assumptions:

- What the backward pass needs is what autograd saves of the model's parts in bf16 autocast, on tensors without storage.
  The difference of two rows and one is per row; the rest is bf16 copies of weights.
- The peak is weights, gradients, AdamW's moments and DDP's buckets, and the larger of all saved tensors with the
  logits' gradients, and AdamW's update. RESERVE and MARGIN are for CUDA, NCCL and fragments.
- A gradient passes every decoder layer, frozen or not, to reach the adapter.
- Captions are log-normal in words with CC12M's mean and deviation (arXiv 2102.08981). A batch is padded to its longest.
"""

import argparse
import math
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.models import CONFIGS, build_on_meta, load_config
from microvlm.files import ROOT
from microvlm.model import MicroVLMConfig
from microvlm.tables import markdown_table
from microvlm.train.recipe import load_recipe
from microvlm.train.setup import change_config, set_trainable, unquantized_modules

NF4 = "quantization={load_in_4bit: true, bnb_4bit_quant_type: nf4, bnb_4bit_use_double_quant: %s}"
V_NF4, M_NF4 = [NF4 % "true"], [NF4 % "false", "config.qat_config.ternary_modules=null"]
RUNS = (  # recipe, and what is set in it
    ("v/stage1", []),
    ("v/stage1", V_NF4),
    ("v/stage2", []),
    ("v/stage2", V_NF4),
    ("m/stage1", []),
    ("m/stage1", M_NF4),
    ("m/stage2", []),
)
GB = 1e9
NF4_BYTES = 0.5 + 4 / 64  # a float32 scale per 64 weights
NF4_DOUBLE_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # the scales themselves in 8 bits
MEMORY_COPIES = 4  # of the memory's posterior that a write and a read save
LOGIT_TRANSIENT = 8  # bytes per logit: float32 gradients after and before the log-softmax
PROMPT_TOKENS = 24  # without the image
CAPTION_WORDS, CAPTION_DEVIATION = 20.2, 16.3
TOKENS_PER_WORD = 1.3
RESERVE = 1.0 * GB
MARGIN = 0.1  # of a card's memory


@dataclass(frozen=True)
class Saved:
    """Bytes that one part saves for backward: per row (per position in the decoder), and once, copies of weights."""

    row: float
    once: float


def freeze(model, trainable: list[str]) -> None:
    """Freeze like train_hf.py's `set_trainable`, but a pattern may match nothing."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(re.search(pattern, name) for pattern in trainable))


def one_layer_model(config: MicroVLMConfig, trainable: list[str]):
    """Build the model on the meta device with one decoder layer, which does not train."""
    values = config.to_dict()
    values["text_config"] |= {"num_hidden_layers": 1}
    values["text_config"].pop("layer_types", None)
    values["use_memory"] = False
    model = build_on_meta(MicroVLMConfig.from_dict(values)).train()
    freeze(model, trainable)
    model.model.language_model.layers.requires_grad_(False)
    return model


def saved_bytes(run, model) -> int:
    """Count the bytes that autograd saves of `run()`, a storage once, without the model's parameters."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    del output
    return sum(storage.nbytes() for storage in storages.values())


def measure(run, model, positions: int = 1) -> Saved:
    """Measure `run(rows)` at one and at two rows; `row` is divided by `positions`."""
    one, two = (saved_bytes(lambda n=n: run(n), model) for n in (1, 2))
    return Saved((two - one) / positions, 2 * one - two)


def saved_parts(config: MicroVLMConfig, trainable: list[str], positions: int = 128) -> dict[str, Saved]:
    """Measure what each part saves: per image, or of head with loss and decoder layers per position."""
    model = one_layer_model(config, trainable)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", torch.bfloat16):
        model.to_empty(device="cpu")  # fake tensors, still without storage
        core, text = model.model, config.text_config
        layer, patches = core.language_model.layers[0], config.adapter_config.num_patches

        def hidden(n):
            return torch.zeros(n, positions, text.hidden_size, requires_grad=True)

        def run_vision(n):
            images = torch.zeros(n, 3, *core.vision_tower.timm_model.patch_embed.img_size)
            return core.vision_tower(images, do_pooling=False).last_hidden_state

        def run_adapter(n):
            return core.adapter(torch.zeros(n, patches, config.adapter_config.vision_hidden_size))

        def run_layer(n):
            x, place = hidden(n), torch.arange(positions).unsqueeze(0)
            return layer(x, position_ids=place, position_embeddings=core.language_model.rotary_emb(x, place))

        def run_head(n):
            labels = torch.zeros(n, positions, dtype=torch.long)
            logits = model.lm_head(hidden(n))
            return model.loss_function(logits=logits, labels=labels, shift_labels=labels, vocab_size=text.vocab_size)

        # every part at one and at two rows
        parts = {"vision tower": measure(run_vision, model), "adapter": measure(run_adapter, model)}
        parts |= {"head": measure(run_head, model, positions), "frozen": measure(run_layer, model, positions)}
        layer.requires_grad_(True)
        return parts | {"training": measure(run_layer, model, positions)}


class Plan:
    """A recipe in recipes/m or recipes/v, its model's parameters, and what follows from them."""

    def __init__(self, path: Path, overrides: list[str]):
        recipe, variant = load_recipe(path, overrides), path.parent.name
        self.name = f"{variant}/{path.stem}" + (", NF4" if recipe.quantization else "")
        self.config = change_config(load_config(CONFIGS / f"microvlm-{variant}.json"), recipe.config)
        self.text, self.quantization = self.config.text_config, recipe.quantization
        # what the recipe says of a step
        self.batch = recipe.training["per_device_train_batch_size"]
        self.episode = (recipe.data.episodes.size or 0) if recipe.data.episodes else 0
        self.longest = recipe.data.max_caption_tokens or math.inf
        # what its model says
        model = build_on_meta(self.config)
        set_trainable(model, recipe.trainable)
        self.count_parameters(model, recipe.trainable)
        self.parts = saved_parts(self.config, recipe.trainable)

    def count_parameters(self, model, trainable: list[str]) -> None:
        """Count parameters by what happens to them in training."""
        self.parameters = sum(p.numel() for p in model.parameters())
        self.trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.head = model.lm_head.weight.numel()
        # decoder layers
        layers = [list(layer.parameters()) for layer in model.model.language_model.layers]
        self.layers, self.layer = len(layers), sum(p.numel() for p in layers[0])
        self.trained_layers = sum(any(p.requires_grad for p in layer) for layer in layers)
        # frozen linear layers in NF4
        self.nf4 = 0
        if self.quantization:
            skipped = {*unquantized_modules(model, trainable), "lm_head"}
            linears = {n: m.weight.numel() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
            self.nf4 = sum(size for name, size in linears.items() if name not in skipped)

    @property
    def images(self) -> int:
        """Count the images per row; an episode adds the written view and its grey copy."""
        return 1 if not self.episode else 2 + bool(self.config.memory_config.gray_weight)

    def caption(self, batch: int) -> int:
        """Estimate the tokens of the longest caption with its end (Blom), cut to the recipe's limit."""
        sigma = math.sqrt(math.log1p((CAPTION_DEVIATION / CAPTION_WORDS) ** 2))
        mu = math.log(CAPTION_WORDS) - sigma**2 / 2
        z = NormalDist().inv_cdf((batch - 0.375) / (batch + 0.25))
        return min(math.ceil(math.exp(mu + sigma * z) * TOKENS_PER_WORD) + 1, self.longest)

    def length(self, batch: int) -> int:
        """Count the positions of a padded row."""
        return self.config.num_prefix_tokens + PROMPT_TOKENS + self.caption(batch)

    def fixed(self, ranks: int = 1, sharded: bool = False) -> dict[str, float]:
        """Count the bytes that do not depend on the batch."""
        scale, n = 0.0, ranks if sharded else 1
        if self.quantization:
            scale = NF4_DOUBLE_BYTES if self.quantization.get("bnb_4bit_use_double_quant") else NF4_BYTES
        return {
            "weights": (4 * (self.parameters - self.nf4) + scale * self.nf4) / n,  # train_hf.py loads float32
            "gradients": 4 * self.trained / n,
            "AdamW": 8 * self.trained / n,
            "buckets": 4 * self.trained if ranks > 1 and not sharded else 0.0,
            # FSDP holds the embeddings and two layers at a time, in bf16
            "gathered": 2 * (self.head + 2 * self.layer) if sharded else 0.0,
        }

    def saved(self, batch: int, checkpointing: bool) -> tuple[float, float]:
        """Count bytes saved for backward, with the logits' gradients: per row, and once."""
        T, logits, parts = self.length(batch), self.caption(batch) + 1, self.parts
        row = parts["vision tower"].row * self.images + parts["adapter"].row + parts["head"].row * logits
        once = sum(parts[name].once for name in ("vision tower", "adapter", "head"))
        # decoder layers
        frozen, training, trained = parts["frozen"], parts["training"], self.trained_layers
        if self.quantization:  # bitsandbytes unpacks a weight again in backward and saves no copy
            frozen = Saved(frozen.row, 0.0)
        if checkpointing:  # the inputs of all layers, float32, and one layer in full
            row += 4 * T * self.text.hidden_size * self.layers + training.row * T
            once += max(frozen.once, training.once)
        else:
            row += T * (frozen.row * (self.layers - trained) + training.row * trained)
            once += frozen.once * (self.layers - trained) + training.once * trained
        # the memory's posterior
        if self.episode:
            memory = self.config.memory_config
            numbers = memory.num_slots * (memory.num_content_slots * memory.code_size + memory.num_slots)
            row += MEMORY_COPIES * 4 * numbers / self.episode
        return row + LOGIT_TRANSIENT * logits * self.text.vocab_size, once

    def peak(self, batch: int, ranks: int = 1, sharded: bool = False, checkpointing: bool = False) -> float:
        """Count the bytes of a step at its highest."""
        row, once = self.saved(batch, checkpointing)
        update = 4 * self.trained / (ranks if sharded else 1)
        return RESERVE + sum(self.fixed(ranks, sharded).values()) + max(batch * row + once, update)

    def largest_batch(self, memory: float) -> int:
        """Find the most rows that fit, a multiple of the episode; 0: none does."""
        step, room = self.episode or 1, memory * (1 - MARGIN)
        return max((n for n in range(step, 1025, step) if self.peak(n) <= room), default=0)


def memory_table(plans: list[Plan]) -> str:
    """Write parameters, peaks of the recipe's batch, and the most rows that fit."""
    header = ["recipe", "parameters", "train", "share", "rows"]
    header += ["one GPU, GB", "... checkpointed", "DDP", "FSDP, 8 ranks", "most rows, 24 GB", "most rows, 80 GB"]
    ways = ({}, {"checkpointing": True}, {"ranks": 8}, {"ranks": 8, "sharded": True})
    rows = []
    for plan in plans:
        row = [plan.name, plan.parameters, plan.trained, f"{plan.trained / plan.parameters:.1%}", plan.batch]
        row += [f"{plan.peak(plan.batch, **way) / GB:.1f}" for way in ways]
        rows.append(row + [plan.largest_batch(memory) for memory in (24e9, 80e9)])
    return markdown_table(header, rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", type=Path, help="in recipes/m or recipes/v; default: all of RUNS")
    parser.add_argument("--set", nargs="+", default=[], dest="overrides", metavar="KEY=VALUE", help="in every recipe")
    options = parser.parse_args(argv)
    runs = [(path, options.overrides) for path in options.recipes]
    runs = runs or [(ROOT / "recipes" / f"{name}.yaml", overrides + options.overrides) for name, overrides in RUNS]
    plans = [Plan(path.resolve(), overrides) for path, overrides in runs]
    print(f"Parameters, peak memory (GB of 10^9 bytes) and rows that fit\n\n{memory_table(plans)}")


if __name__ == "__main__":
    main()
