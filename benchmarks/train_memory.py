"""Compute the memory of a training step on a GPU by arithmetic; nothing runs on a GPU.

    python -m benchmarks.train_memory
    python -m benchmarks.train_memory recipes/m/stage1.yaml --batch-size 20 --trainable '.*'

One row per recipe, from which what trains, batch, episodes and NF4 are read. The assumptions:

- What the backward pass needs is what autograd saves of the model's parts in bf16 autocast, on tensors without storage.
  The difference of two rows and one is per row; the rest is bf16 copies of weights.
- The peak is weights, gradients, AdamW's moments and DDP's buckets, and the larger of all saved tensors with the
  logits' gradients, and AdamW's update. `--reserve` and `--margin` are for CUDA, NCCL and fragments.
- A gradient passes every decoder layer, frozen or not, to reach the adapter.
- Captions are log-normal in words with CC12M's mean and deviation (arXiv 2102.08981). A batch is padded to its longest.
"""

import math
import re
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import HfArgumentParser

from benchmarks.models import CONFIGS, build_on_meta, load_config
from microvlm.files import ROOT
from microvlm.model import MicroVLMConfig
from microvlm.tables import markdown_table
from microvlm.train.recipe import load_recipe
from microvlm.train.setup import change_config, check_patterns, unquantized_modules

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


def option(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class Assumptions:
    """What the arithmetic assumes; every field is an option of the command."""

    batch_size: int = option(None, "rows of a micro-batch; default: the recipe's")
    trainable: str = option(None, "a regular expression; default: the recipe's; .* for everything")
    prompt_tokens: int = option(24, "of the prompt without the image")
    caption_words: float = option(20.2, "mean of a caption")
    caption_deviation: float = option(16.3, "of the words of a caption")
    tokens_per_word: float = option(1.3, "of a caption")
    frozen_bytes: int = option(4, "of a frozen weight; train_hf.py loads float32")
    reserve: float = option(1.0, "GB of CUDA context and NCCL")
    margin: float = option(0.1, "share of a card's memory to leave free")


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


def give_fake_tensors(model) -> None:
    """Move parameters and buffers to the CPU inside a FakeTensorMode, still without storage."""
    fakes = {
        id(p): torch.nn.Parameter(torch.zeros(p.shape, dtype=p.dtype), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    for module in model.modules():
        for name, parameter in module._parameters.items():
            module._parameters[name] = fakes.get(id(parameter))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)


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
    """Measure what each part saves.

    Returns:
        vision tower, adapter: per image; head with its loss, frozen and training decoder layer: per position.
    """
    model = one_layer_model(config, trainable)
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        give_fake_tensors(model)
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


class Counts:
    """Parameters of a model by what happens to them in training.

    Args:
        model: on the meta device.
        trainable: regular expressions.
        quantized: frozen linear layers are in NF4.
    """

    def __init__(self, model, trainable: list[str], quantized: bool):
        named = {name: p.numel() for name, p in model.named_parameters()}
        trained = {name for name in named if any(re.search(pattern, name) for pattern in trainable)}
        self.parameters, self.trained = sum(named.values()), sum(named[name] for name in trained)
        self.head = model.lm_head.weight.numel()
        # decoder layers
        numbers = {name: int(m[1]) for name in named if (m := re.search(r"language_model\.layers\.(\d+)\.", name))}
        self.layer = sum(named[name] for name, number in numbers.items() if number == 0)
        self.trained_layers = len({number for name, number in numbers.items() if name in trained})
        # NF4 weights
        skipped = {*unquantized_modules(model, trainable), "lm_head"} if quantized else set()
        linears = {n: m.weight.numel() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        self.nf4 = sum(size for name, size in linears.items() if name not in skipped) if quantized else 0


class Plan:
    """A recipe of M or V, its model's parameters, and what follows from them.

    Args:
        path: recipes/m/... or recipes/v/...; the folder names the variant.
        overrides: of the recipe, `key=value`.
        assumptions: of the arithmetic.
    """

    def __init__(self, path: Path, overrides: list[str], assumptions: Assumptions):
        recipe, self.assumptions = load_recipe(path, overrides), assumptions
        variant = path.parent.name
        if variant not in ("m", "v"):
            raise ValueError(f"{path}: recipes of M and V are in recipes/m and recipes/v.")
        self.name = f"{variant}/{path.stem}" + (", NF4" if recipe.quantization else "")
        self.config = change_config(load_config(CONFIGS / f"microvlm-{variant}.json"), recipe.config)
        self.text, self.quantization = self.config.text_config, recipe.quantization
        # what the recipe says of a step
        trainable = [assumptions.trainable] if assumptions.trainable else recipe.trainable
        self.batch = assumptions.batch_size or recipe.training["per_device_train_batch_size"]
        self.episode = (recipe.data.episodes.size or 0) if recipe.data.episodes else 0
        self.longest = recipe.data.max_caption_tokens or math.inf
        # what its model says
        model = build_on_meta(self.config)
        check_patterns("trainable", trainable, model)
        self.counts = Counts(model, trainable, bool(self.quantization))
        self.layers = self.text.num_hidden_layers
        self.parts = saved_parts(self.config, trainable)

    @property
    def images(self) -> int:
        """Count the images per row; an episode adds the written view and its grey copy."""
        return 1 if not self.episode else 2 + bool(self.config.memory_config.gray_weight)

    def caption(self, batch: int) -> int:
        """Estimate the tokens of the longest caption with its end (Blom), cut to the recipe's limit."""
        mean, deviation = self.assumptions.caption_words, self.assumptions.caption_deviation
        sigma = math.sqrt(math.log1p((deviation / mean) ** 2))
        mu = math.log(mean) - sigma**2 / 2
        z = NormalDist().inv_cdf((batch - 0.375) / (batch + 0.25))
        return min(math.ceil(math.exp(mu + sigma * z) * self.assumptions.tokens_per_word) + 1, self.longest)

    def length(self, batch: int) -> int:
        """Count the positions of a padded row."""
        return self.config.num_prefix_tokens + self.assumptions.prompt_tokens + self.caption(batch)

    def fixed(self, ranks: int = 1, sharded: bool = False) -> dict[str, float]:
        """Count the bytes that do not depend on the batch."""
        counts, scale = self.counts, 0.0
        if self.quantization:
            scale = NF4_DOUBLE_BYTES if self.quantization.get("bnb_4bit_use_double_quant") else NF4_BYTES
        frozen = counts.parameters - counts.trained - counts.nf4
        weights = 4 * counts.trained + self.assumptions.frozen_bytes * frozen + scale * counts.nf4
        n = ranks if sharded else 1
        return {
            "weights": weights / n,
            "gradients": 4 * counts.trained / n,
            "AdamW": 8 * counts.trained / n,
            "buckets": 4 * counts.trained if ranks > 1 and not sharded else 0.0,
            # FSDP holds the embeddings and two layers at a time, in bf16
            "gathered": 2 * (counts.head + 2 * counts.layer) if sharded else 0.0,
        }

    def saved(self, batch: int, checkpointing: bool) -> tuple[float, float]:
        """Count bytes saved for backward, with the logits' gradients: per row, and once."""
        T, logits, parts = self.length(batch), self.caption(batch) + 1, self.parts
        row = parts["vision tower"].row * self.images + parts["adapter"].row + parts["head"].row * logits
        once = sum(parts[name].once for name in ("vision tower", "adapter", "head"))
        # decoder layers
        frozen, training, trained = parts["frozen"], parts["training"], self.counts.trained_layers
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
        update = 4 * self.counts.trained / (ranks if sharded else 1)
        fixed = sum(self.fixed(ranks, sharded).values())
        return self.assumptions.reserve * GB + fixed + max(batch * row + once, update)

    def largest_batch(self, memory: float, **kwargs) -> int:
        """Find the most rows that fit, a multiple of the episode; 0: none does."""
        step, room = self.episode or 1, memory * (1 - self.assumptions.margin)
        return max((n for n in range(step, 1025, step) if self.peak(n, **kwargs) <= room), default=0)


def memory_table(plans: list[Plan]) -> str:
    """Write parameters, peaks and the most rows that fit."""
    header = [
        "recipe",
        "parameters",
        "train",
        "share",
        "rows",
        "one GPU, GB",
        "... checkpointed",
        "DDP",
        "FSDP, 8 ranks",
    ]
    header += [f"most rows, {name}" for name in ("24 GB", "24 GB checkpointed", "80 GB")]
    ways = ({}, {"checkpointing": True}, {"ranks": 8}, {"ranks": 8, "sharded": True})
    fits = ((24e9, {}), (24e9, {"checkpointing": True}), (80e9, {}))
    rows = []
    # counts, peaks of the recipe's batch, largest batches
    for plan in plans:
        counts = plan.counts
        row = [plan.name, counts.parameters, counts.trained, f"{counts.trained / counts.parameters:.1%}", plan.batch]
        row += [f"{plan.peak(plan.batch, **way) / GB:.1f}" for way in ways]
        rows.append(row + [plan.largest_batch(memory, **way) for memory, way in fits])
    return markdown_table(header, rows)


def parse(argv: list[str] | None = None) -> tuple[Assumptions, Namespace]:
    parser = HfArgumentParser(Assumptions, description=__doc__)
    parser.add_argument("recipes", nargs="*", type=Path, help="default: those of M and V")
    parser.add_argument("--set", nargs="+", default=[], dest="overrides", metavar="KEY=VALUE", help="in every recipe")
    return parser.parse_args_into_dataclasses(argv)


def main(argv: list[str] | None = None) -> None:
    assumptions, options = parse(argv)
    runs = [(path, options.overrides) for path in options.recipes]
    runs = runs or [(ROOT / "recipes" / f"{name}.yaml", overrides + options.overrides) for name, overrides in RUNS]
    plans = [Plan(path, overrides, assumptions) for path, overrides in runs]
    print(f"Parameters, peak memory (GB of 10^9 bytes) and rows that fit\n\n{memory_table(plans)}")


if __name__ == "__main__":
    main()
