"""What a training step needs on a GPU, by arithmetic: memory, FLOPs, traffic between ranks. Nothing is run on a GPU, nothing is timed.

    python -m benchmarks.train_memory
    python -m benchmarks.train_memory recipes/m/stage1.yaml --gpu A100 --utilisation 0.3 --caption-words 20.2 16.3

One row per recipe: which parameters train, the micro-batch, accumulation, episodes and NF4 are read from it. Notable:

- Parameters are those of the models in `configs/`, on the meta device, frozen and quantised by train_hf.py's own functions.
- Kept for the backward pass: what autograd saves in vision tower, adapter, one decoder layer and the head with its loss, run on fake
  tensors (no memory, no arithmetic) in bf16 autocast. Run for one row and for two: what grows is per row, the rest is copies of
  weights, which autocast makes in bf16 of every float32 weight that a gradient passes through, and a ternary layer of its rounded one.
- A step's peak is weights, gradients, AdamW's two moments and DDP's buckets, and the larger of what backward holds at the first of its
  way (everything kept, and logits once more in float32, twice) and what AdamW's update takes. `--reserve` GB are the CUDA context's and
  NCCL's; `--margin` of the card stays free for fragments and small things.
- A gradient passes through every decoder layer, frozen or not, to reach the adapter: 2 N FLOPs per token forward, 2 N backward, 2 N
  more where weights train.
- Captions are log-normal in words with CC12M's mean and deviation (arXiv 2102.08981); a batch is as long as its longest, and padding
  is computed. The logits are the captions' only.
- A ternary layer rounds its latent weights in every pass: `ROUNDING_BYTES` per weight through the card's memory.
- `--utilisation` of the data sheet's dense bf16 peak is an assumption, as is `--network`.
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

from benchmarks.parameters import ROOT, MicroVLMConfig, build_on_meta, load_config, markdown_table
from microvlm.train.recipe import load_recipe
from microvlm.train.setup import change_config, check_patterns, unquantized_modules

NF4 = "quantization={load_in_4bit: true, bnb_4bit_quant_type: nf4, bnb_4bit_use_double_quant: %s}"
TERNARY_NF4 = [NF4 % "false", "config.qat_config.ternary_modules=null"]
RECIPES = (  # with what is set
    ("v/stage1", []),
    ("v/stage1", [NF4 % "true"]),
    ("v/stage2", []),
    ("v/stage2", [NF4 % "true"]),
    ("m/stage1", []),
    ("m/stage1", TERNARY_NF4),
    ("m/stage2", []),
)
GB = 1e9


@dataclass(frozen=True)
class GPU:
    """Of the vendor's data sheet: dense bf16 FLOP/s with float32 accumulation, bytes of memory, bytes/s of its memory."""

    flops: float
    memory: float
    bandwidth: float


GPUS = {
    "RTX 4090": GPU(165.2e12, 24e9, 1008e9),  # NVIDIA Ada GPU architecture, appendix A
    "A100": GPU(312e12, 80e9, 2039e9),  # NVIDIA A100 80GB SXM data sheet
    "H100": GPU(989e12, 80e9, 3350e9),  # NVIDIA H100 SXM data sheet: 1,979 with sparsity
}
# fake_ternary in float32, bytes read and written per weight: abs, mean, /, round, clamp, * scale, w - w, +, to bf16
ROUNDING_BYTES = 8 + 4 + 8 + 8 + 8 + 8 + 12 + 12 + 6
NF4_BYTES = 0.5 + 4 / 64  # a float32 scale per 64 weights
NF4_DOUBLE_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # the scales themselves in 8 bits
ADAMW_TRAFFIC = 28  # bytes per trained weight: weight, gradient and moments read, weight and moments written
MEMORY_COPIES = 4  # of the memory's posterior that a write and a read keep
LOGIT_TRANSIENT = 8  # bytes per logit: float32 gradients behind and before the log-softmax


def freeze(model, trainable: list[str]) -> None:
    """As train_hf.py's `set_trainable`, but a pattern may match nothing."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(re.search(pattern, name) for pattern in trainable))


def one_layer_model(config: MicroVLMConfig, trainable: list[str]):
    """The model with one decoder layer, which does not train, on the meta device."""
    values = config.to_dict()
    values["text_config"] |= {"num_hidden_layers": 1}
    values["text_config"].pop("layer_types", None)
    values["use_memory"] = False
    model = build_on_meta(MicroVLMConfig.from_dict(values)).train()
    freeze(model, trainable)
    model.model.language_model.layers.requires_grad_(False)
    return model


def give_fake_tensors(model) -> None:
    """In a FakeTensorMode: parameters and buffers on the CPU, still without storage."""
    fakes = {
        id(p): torch.nn.Parameter(torch.zeros(p.shape, dtype=p.dtype), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = fakes[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)


def saved_bytes(run, model) -> int:
    """Bytes that autograd keeps of `run()`, a storage once, without the model's parameters."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    del output
    return sum(storage.nbytes() for storage in kept.values())


@dataclass(frozen=True)
class Kept:
    """Bytes kept for backward by one part: for every row (of the decoder: every position), and once, copies of weights."""

    row: float
    once: float


def measure(run, model) -> Kept:
    """`run(rows)` at one and at two rows."""
    one, two = (saved_bytes(lambda n=n: run(n), model) for n in (1, 2))
    return Kept(two - one, 2 * one - two)


def kept_parts(config: MicroVLMConfig, trainable: list[str], positions: int = 128) -> dict[str, Kept]:
    """What parts keep: vision tower and adapter per picture, a frozen and a training decoder layer and the head with its loss per position."""
    model = one_layer_model(config, trainable)
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        give_fake_tensors(model)
        core, text = model.model, config.text_config
        layer, patches = core.language_model.layers[0], config.adapter_config.num_patches

        def hidden(n):
            return torch.zeros(n, positions, text.hidden_size, requires_grad=True)

        def run_vision(n):
            pictures = torch.zeros(n, 3, *core.vision_tower.timm_model.patch_embed.img_size)
            return core.vision_tower(pictures, do_pooling=False).last_hidden_state

        def run_adapter(n):
            return core.adapter(torch.zeros(n, patches, config.adapter_config.vision_hidden_size))

        def run_layer(n):
            x, place = hidden(n), torch.arange(positions).unsqueeze(0)
            return layer(x, position_ids=place, position_embeddings=core.language_model.rotary_emb(x, place))

        def run_head(n):
            labels = torch.zeros(n, positions, dtype=torch.long)
            logits = model.lm_head(hidden(n))
            return model.loss_function(logits=logits, labels=labels, shift_labels=labels, vocab_size=text.vocab_size)

        per_position = lambda kept: Kept(kept.row / positions, kept.once)  # noqa: E731
        parts = {"vision tower": measure(run_vision, model), "adapter": measure(run_adapter, model)}
        parts |= {"head": per_position(measure(run_head, model)), "frozen": per_position(measure(run_layer, model))}
        layer.requires_grad_(True)
        return parts | {"training": per_position(measure(run_layer, model))}


def layer_number(name: str) -> int | None:
    """Which decoder layer a parameter belongs to."""
    found = re.search(r"language_model\.layers\.(\d+)\.", name)
    return int(found[1]) if found else None


class Plan:
    """A recipe, its model's parameters, and what follows from them."""

    def __init__(self, path: Path, overrides: list[str], options: argparse.Namespace):
        recipe, variant = load_recipe(path, overrides), path.parent.name
        self.name, self.options = f"{variant}/{path.stem}" + " NF4" * (recipe.quantization is not None), options
        if variant not in ("m", "v"):
            raise ValueError(f"{path}: recipes of M and V are in recipes/m and recipes/v.")
        config = change_config(load_config(ROOT / "configs" / f"microvlm-{variant}.json"), recipe.config)
        self.config, self.text = config, config.text_config
        self.trainable = options.trainable or recipe.trainable
        training = recipe.training
        self.batch = options.batch_size or training["per_device_train_batch_size"]
        self.accumulation = training.get("gradient_accumulation_steps", 1)
        self.episode = (recipe.data.episodes.size or 0) if recipe.data.episodes else 0
        self.aligns = bool(recipe.loss_weights.get("align"))
        self.quantization = recipe.quantization
        self.longest = recipe.data.max_caption_tokens or math.inf
        self.count()
        self.parts = kept_parts(config, self.trainable)

    def count(self) -> None:
        model = build_on_meta(self.config)
        check_patterns("trainable", self.trainable, model)
        trains = lambda name: any(re.search(p, name) for p in self.trainable)  # noqa: E731
        self.parameters = sum(p.numel() for p in model.parameters())
        self.trained = sum(p.numel() for name, p in model.named_parameters() if trains(name))
        self.layers = self.text.num_hidden_layers
        per_layer = [0] * self.layers
        self.trained_layers = set()
        self.ternary = 0
        patterns = self.config.qat_config.ternary_modules or []
        for name, p in model.named_parameters():
            if (number := layer_number(name)) is not None:
                per_layer[number] += p.numel()
                if trains(name):
                    self.trained_layers.add(number)
            if any(re.fullmatch(q, name.removesuffix(".weight").removeprefix("model.")) for q in patterns):
                self.ternary += p.numel()
        self.layer_size, self.decoder = per_layer[0], sum(per_layer)
        self.head = model.lm_head.weight.numel()
        self.nf4 = 0
        if self.quantization:
            skipped = set(unquantized_modules(model, self.trainable))
            for name, module in model.named_modules():
                if isinstance(module, torch.nn.Linear) and name not in skipped and module is not model.lm_head:
                    self.nf4 += module.weight.numel()
        tower = dict(model.model.vision_tower.named_parameters())
        self.vision = sum(p.numel() for p in tower.values())
        prefix = "model.vision_tower."
        self.vision_trained = sum(p.numel() for name, p in tower.items() if trains(prefix + name))
        adapter = model.model.adapter
        self.on_patches = sum(m.weight.numel() for m in (adapter.fc1, adapter.fc2, adapter.k_proj, adapter.v_proj))
        self.on_prefix = adapter.out_proj.weight.numel()

    # ---- lengths

    def caption(self, batch: int) -> int:
        """Tokens of the longest of `batch` captions with its end: Blom's estimate for a log-normal, cut as the recipe does."""
        mean, deviation = self.options.caption_words
        sigma = math.sqrt(math.log1p((deviation / mean) ** 2))
        mu = math.log(mean) - sigma**2 / 2
        z = NormalDist().inv_cdf((batch - 0.375) / (batch + 0.25))
        return min(math.ceil(math.exp(mu + sigma * z) * self.options.tokens_per_word) + 1, self.longest)

    @property
    def mean_caption(self) -> float:
        return self.options.caption_words[0] * self.options.tokens_per_word + 1

    def length(self, batch: int) -> int:
        """Positions of a padded row."""
        return self.config.num_prefix_tokens + self.options.prompt_tokens + self.caption(batch)

    @property
    def pictures(self) -> int:
        """The vision tower sees per row: with episodes also the written view and its grey copy."""
        return 1 if not self.episode else 2 + bool(self.config.memory_config.gray_weight)

    # ---- memory

    def weights(self) -> float:
        scale = 0.0
        if self.quantization:
            scale = NF4_DOUBLE_BYTES if self.quantization.get("bnb_4bit_use_double_quant") else NF4_BYTES
        frozen = self.parameters - self.trained - self.nf4
        return 4 * self.trained + self.options.frozen_bytes * frozen + scale * self.nf4

    def fixed(self, ranks: int = 1, sharded: bool = False) -> dict[str, float]:
        """Bytes that do not depend on the batch."""
        n = ranks if sharded else 1
        return {
            "weights": self.weights() / n,
            "gradients": 4 * self.trained / n,
            "AdamW": 8 * self.trained / n,
            "buckets": 4 * self.trained if ranks > 1 and not sharded else 0.0,
            # FSDP holds the embeddings and two layers at a time, in bf16
            "gathered": 2 * (self.head + 2 * self.layer_size) if sharded else 0.0,
        }

    def kept(self, batch: int, checkpointing: bool) -> tuple[float, float, float]:
        """Bytes kept per row, once, and what the first part of backward takes besides, per row."""
        T, logits, parts = self.length(batch), self.caption(batch) + 1, self.parts
        row = parts["vision tower"].row * self.pictures + parts["adapter"].row + parts["head"].row * logits
        once = sum(parts[name].once for name in ("vision tower", "adapter", "head"))
        frozen, training = parts["frozen"], parts["training"]
        if self.quantization:  # bitsandbytes unpacks a weight again in backward and keeps no copy
            frozen = Kept(frozen.row, 0.0)
        if checkpointing:  # the inputs of all layers, float32, and one layer in full
            row += 4 * T * self.text.hidden_size * self.layers + training.row * T
            once += max(frozen.once, training.once)
        else:
            for part, count in ((frozen, self.layers - len(self.trained_layers)), (training, len(self.trained_layers))):
                row, once = row + part.row * T * count, once + part.once * count
        if self.episode:
            memory = self.config.memory_config
            numbers = memory.num_slots * (memory.num_content_slots * memory.code_size + memory.num_slots)
            row += MEMORY_COPIES * 4 * numbers / self.episode
        return row, once, LOGIT_TRANSIENT * logits * self.text.vocab_size

    def peak(self, batch: int, ranks: int = 1, sharded: bool = False, checkpointing: bool = False) -> float:
        row, once, transient = self.kept(batch, checkpointing)
        fixed = sum(self.fixed(ranks, sharded).values())
        update = 4 * self.trained / (ranks if sharded else 1)
        return self.options.reserve * GB + fixed + max(batch * (row + transient) + once, update)

    def largest_batch(self, memory: float, **kwargs) -> int:
        """The most rows that fit, a multiple of the episode; 0: none does."""
        step, room = self.episode or 1, memory * (1 - self.options.margin)
        fitting = [n for n in range(step, 1025, step) if self.peak(n, **kwargs) <= room]
        return max(fitting, default=0)

    # ---- work

    def flops(self, batch: int, checkpointing: bool = False) -> float:
        """Of one row in a batch of so many, forward and backward."""
        T, caption, text = self.length(batch), self.caption(batch), self.text
        heads = text.num_attention_heads * (
            getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        )
        attention = 4 * T * T * heads * self.layers
        layers = 2 * self.decoder * T
        trained = 2 * self.layer_size * len(self.trained_layers) * T
        decoder = (2 + checkpointing) * (layers + attention) + attention + trained
        head = 2 * 2 * self.head * (caption + 1)
        tokens = self.config.adapter_config.num_patches + 1
        tower = 2 * tokens * (self.vision + 2 * self.vision_trained) * self.pictures
        adapter = 3 * 2 * (self.on_patches * (tokens - 1) + self.on_prefix * self.config.num_prefix_tokens)
        again = 0.0
        if self.aligns and self.accumulation > 1:  # embeddings of the other micro-batches
            again = 2 * tokens * self.vision * self.pictures + adapter / 3
        return decoder + head + tower + adapter + again

    def seconds(self, gpu: GPU, batch: int) -> tuple[float, float]:
        """Of a micro-batch: with matrix products at the assumed share of the peak, and for weights that go through memory."""
        moved = ROUNDING_BYTES * self.ternary
        moved += (0.5 + 2) * 2 * self.nf4 + ADAMW_TRAFFIC * self.trained / self.accumulation
        return batch * self.flops(batch) / (gpu.flops * self.options.utilisation), moved / gpu.bandwidth


# ---- tables


def gb(x: float) -> str:
    return f"{x / GB:.1f}"


def parameter_rows(plans: list[Plan]) -> str:
    header = ["recipe", "parameters", "train", "share", "NF4", "weights, GB", "gradients", "AdamW", "DDP buckets"]
    rows = []
    for plan in plans:
        fixed = plan.fixed(ranks=8)
        rows.append([
            plan.name, f"{plan.parameters:,}", f"{plan.trained:,}", f"{plan.trained / plan.parameters:.1%}", f"{plan.nf4:,}",
            *(gb(fixed[k]) for k in ("weights", "gradients", "AdamW", "buckets")),
        ])  # fmt: skip
    return markdown_table(header, rows)


def activation_rows(plans: list[Plan]) -> str:
    header = ["recipe", "rows", "positions", "logits", "kept per row, MB", "... checkpointed", "copies of weights, GB"]
    header += ["... checkpointed", "logits' gradients per row, MB"]
    rows = []
    for plan in plans:
        (row, once, transient), (short, few, _) = (plan.kept(plan.batch, c) for c in (False, True))
        rows.append([
            plan.name, str(plan.batch), str(plan.length(plan.batch)), str(plan.caption(plan.batch) + 1), f"{row / 1e6:,.0f}",
            f"{short / 1e6:,.0f}", gb(once), gb(few), f"{transient / 1e6:,.0f}",
        ])  # fmt: skip
    return markdown_table(header, rows)


def peak_rows(plans: list[Plan]) -> str:
    header = ["recipe", "rows", "one GPU, GB", "... checkpointed", "DDP", "FSDP, 8 ranks"]
    header += [f"most rows, {name}" for name in ("24 GB", "24 GB checkpointed", "80 GB", "80 GB, DDP")]
    rows = []
    for plan in plans:
        variants = ({}, {"checkpointing": True}, {"ranks": 8}, {"ranks": 8, "sharded": True})
        fits = ((24e9, {}), (24e9, {"checkpointing": True}), (80e9, {}), (80e9, {"ranks": 8}))
        rows.append([
            plan.name, str(plan.batch), *(gb(plan.peak(plan.batch, **v)) for v in variants),
            *(str(plan.largest_batch(memory, **v)) for memory, v in fits),
        ])  # fmt: skip
    return markdown_table(header, rows)


def speed_rows(plans: list[Plan], gpus: list[str]) -> str:
    header = ["recipe", "GPU", "rows", "TFLOP per row", "products, ms", "weights through memory, ms", "rows/s"]
    header += ["caption tokens/s", "loader workers"]
    rows = []
    for plan in plans:
        for name in gpus:
            products, moved = plan.seconds(GPUS[name], plan.batch)
            rate = plan.batch / (products + moved)
            workers = math.ceil(rate * plan.options.decode_ms / 1000)
            rows.append([
                plan.name, name, str(plan.batch), f"{plan.flops(plan.batch) / 1e12:.2f}", f"{products * 1e3:.0f}",
                f"{moved * 1e3:.0f}", f"{rate:.0f}", f"{rate * plan.mean_caption:,.0f}", str(workers),
            ])  # fmt: skip
    return markdown_table(header, rows, left=2)


def traffic_rows(plans: list[Plan], ranks: tuple[int, ...], network: float) -> str:
    header = ["recipe", "gradients, GB", *(f"sent per rank, {n} ranks, GB" for n in ranks)]
    header += [f"between 8 machines, s at {network:g} GB/s a machine", "compute of a step on an A100, s"]
    rows = []
    for plan in plans:
        size = 4 * plan.trained
        sent = [2 * (n - 1) / n * size for n in ranks]
        step = sum(plan.seconds(GPUS["A100"], plan.batch)) * plan.accumulation
        across = 2 * (8 - 1) / 8 * size / (network * GB)
        rows.append([plan.name, f"{size / GB:.2f}", *(f"{s / GB:.2f}" for s in sent), f"{across:.2f}", f"{step:.2f}"])
    return markdown_table(header, rows)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", type=Path, help="default: those of V and M, and with NF4")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipes")
    parser.add_argument("--batch-size", type=int, help="rows of a micro-batch; default: the recipe's")
    parser.add_argument("--trainable", nargs="+", metavar="REGEX", help="default: the recipe's; .* for everything")
    parser.add_argument("--prompt-tokens", type=int, default=24, help="of the prompt without the picture")
    parser.add_argument("--caption-words", type=float, nargs=2, default=(20.2, 16.3), metavar=("MEAN", "DEVIATION"))
    parser.add_argument("--tokens-per-word", type=float, default=1.3)
    parser.add_argument("--frozen-bytes", type=int, default=4, help="of a frozen weight; train_hf.py loads float32")
    parser.add_argument("--gpu", nargs="+", default=list(GPUS), choices=list(GPUS))
    parser.add_argument("--utilisation", type=float, default=0.35, help="share of the peak that products reach")
    parser.add_argument("--network", type=float, default=25.0, help="GB/s out of a machine")
    parser.add_argument("--reserve", type=float, default=1.0, help="GB of CUDA context and NCCL")
    parser.add_argument("--margin", type=float, default=0.1, help="share of a card's memory to leave free")
    parser.add_argument("--decode-ms", type=float, default=8.0, help="a loader worker's time for a picture")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    recipes = [(path, []) for path in options.recipes] or [
        (ROOT / f"recipes/{r}.yaml", changes) for r, changes in RECIPES
    ]
    plans = [Plan(path, changes + options.set, options) for path, changes in recipes]
    tables = {
        "Parameters, and what does not grow with the batch (GB of 10^9 bytes)": parameter_rows(plans),
        "What a micro-batch keeps for backward": activation_rows(plans),
        "Peak, and how many rows fit": peak_rows(plans),
        f"Speed at {options.utilisation:.0%} of the bf16 peak": speed_rows(plans, options.gpu),
        "Gradients between ranks, per step": traffic_rows(plans, (8, 64), options.network),
    }
    for title, table in tables.items():
        print(f"{title}\n\n{table}\n")


if __name__ == "__main__":
    main()
