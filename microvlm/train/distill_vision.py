"""Train a DeiT-Tiny from nothing with EfficientNet-Lite0 as teacher.

The student learns the teacher's feature map and pooled features, the concept of an image and the words of its caption.
A recipe of `kind: distill` has the options, see recipes/nano/vision.yaml. A stopped run goes on by itself.
"""

import json
import math
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm
import torch
import torch.nn.functional as F
from datasets import Image
from datasets.fingerprint import Hasher
from safetensors.torch import save_file
from torch import nn

from ..data.augment import change_colors, change_style, random_affine, warp
from ..data.rows import load_rows
from ..files import atomic_path, write_json
from ..model import require
from ..teacher import nearest_neighbours, teacher_maps

SMALL = 144  # side of the copies that crops of at most 128 x 128 are taken from
LOG_STEPS = 100
STOP_WORDS = {"a", "an", "the", "of", "with", "and", "in", "on", "for", "to"}
LOSSES = {"dense", "pooled", "concept", "words"}
COUNTS = ("image_size", "teacher_size", "batch_size", "warmup_steps", "save_steps")
KEYS = {"kind": str, "output_dir": str} | dict.fromkeys(("train_file", "validation_file"), str | list[str])
KEYS |= dict.fromkeys((*COUNTS, "seed"), int)
KEYS |= dict.fromkeys(("learning_rate", "weight_decay", "drop_path", "style"), float | int)
KEYS |= {"weights": dict[str, float | int], "phases": list[dict[str, int]], "compile": bool | None}
KEYS |= {"unlabelled_file": str | list[str] | None, "unlabelled_rows": int | None, "optimizer": Literal["muon"] | None}


def check(recipe: dict[str, Any]) -> str:
    """Refuse values that cannot work; returns the folder of the run."""
    for key in COUNTS:
        require(recipe[key] > 0, f"{key} is {recipe[key]}: it has to be positive.")
    require(set(recipe["weights"]) == LOSSES, f"weights are those of {', '.join(sorted(LOSSES))}.")
    phases = recipe["phases"]
    fits = all(set(p) == {"size", "steps"} and min(p.values()) > 0 and p["size"] % 16 == 0 for p in phases)
    require(fits and phases, "a phase is {size: side of the crops, a multiple of 16, steps: their number}.")
    return recipe["output_dir"]


def read_images(path: str | list[str], size: int, exclude_copyleft: bool = True, sample: int | None = None, seed=0):
    """Read images (N, 3, size, size) uint8 and rows, or a `sample` of them."""
    source = load_rows(path, exclude_copyleft).cast_column("image", Image())
    if sample is not None:
        source = source.shuffle(seed=seed).select(range(min(sample, len(source))))
    images, rows = torch.empty(len(source), 3, size, size, dtype=torch.uint8), []
    for i, row in enumerate(source):
        square = row.pop("image").convert("RGB").resize((size, size), resample=3)
        images[i] = torch.from_numpy(np.array(square)).permute(2, 0, 1)
        rows.append(row)
    return images, rows


def resized(images: torch.Tensor, size: int, batch: int = 512) -> torch.Tensor:
    """Resize images (N, 3, H, W) uint8."""
    parts = (F.interpolate(x.float(), size=(size, size), mode="bilinear", antialias=True) for x in images.split(batch))
    return torch.cat([part.round().to(torch.uint8) for part in parts])


def cached_teacher_features(images: torch.Tensor, rows: list[dict], folder: Path, size: int) -> list[torch.Tensor]:
    """Compute `teacher_maps` once and cache them in `folder`."""
    made_of = [r["id"] for r in rows], int(images.numpy().sum(dtype=np.int64)), size
    cache = folder / f"teacher_{Hasher.hash(made_of)}.pt"
    if not cache.exists():
        with atomic_path(cache) as temporary:
            torch.save(teacher_maps(images, size), temporary)
    return torch.load(cache, weights_only=True)


def caption_words(caption: str) -> set[str]:
    """Collect the words of a caption that say something."""
    return set(re.findall(r"[a-z0-9]+", caption.lower())) - STOP_WORDS


class Targets:
    """Hold what the student has to say; the first `labelled` rows have a concept."""

    def __init__(self, rows: list[dict], labelled: int, maps: torch.Tensor, pooled: torch.Tensor):
        # the teacher's features, (N, 320, h, w) and (N, 1280) in float16, are standardised
        self.maps, self.pooled = maps, pooled
        self.map_mean = maps.float().mean((0, 2, 3))[:, None, None]
        self.map_std = maps.float().std((0, 2, 3))[:, None, None] + 1e-4
        self.pool_mean, self.pool_std = pooled.float().mean(0), pooled.float().std(0) + 1e-4
        # concepts, and words that at least three captions have
        names = {c: i for i, c in enumerate(sorted({r["concept"] for r in rows[:labelled]}))}
        self.concepts = torch.full((len(rows),), -100)
        self.concepts[:labelled] = torch.tensor([names[r["concept"]] for r in rows[:labelled]])
        captions = [caption_words(r["caption"]) for r in rows]
        counts = Counter(w for words in captions for w in words)
        column = {w: i for i, w in enumerate(sorted(w for w, n in counts.items() if n >= 3))}
        self.words = torch.zeros(len(rows), len(column))
        for i, words in enumerate(captions):
            self.words[i, [column[w] for w in words if w in column]] = 1
        self.num_concepts, self.num_words = len(names), len(column)

    def losses(self, outputs, index: torch.Tensor, theta: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compare the student's outputs for crops `theta` (B, 2, 3) of images `index` (B,)."""
        dense, from_cls, from_mean, concept, words = (x.float() for x in outputs)
        # the map is cropped as the image was
        side = math.isqrt(dense.shape[1])
        target = warp(self.maps[index].float(), theta, (side, side))
        target = ((target - self.map_mean) / self.map_std).flatten(2).mT  # (B, N, 320)
        pooled = (self.pooled[index].float() - self.pool_mean) / self.pool_std
        # labels, of the rows that have some
        concepts = self.concepts[index]
        known = concepts != -100
        count = known.sum().clamp(min=1)
        wrong_concepts = F.cross_entropy(concept, concepts, label_smoothing=0.1, reduction="sum")
        wrong_words = F.binary_cross_entropy_with_logits(words[known], self.words[index][known], reduction="sum")
        return {
            "dense": F.smooth_l1_loss(dense, target),
            "pooled": F.smooth_l1_loss(from_cls, pooled) + F.smooth_l1_loss(from_mean, pooled),
            "concept": wrong_concepts / count,
            "words": wrong_words / count,
        }


class Student(nn.Module):
    """DeiT-Tiny with the heads of the losses, which are thrown away afterwards."""

    def __init__(self, num_concepts: int, num_words: int, drop_path: float):
        super().__init__()
        self.backbone = timm.create_model(
            "deit_tiny_patch16_224", num_classes=0, dynamic_img_size=True, drop_path_rate=drop_path
        )
        # of this tower alone: timm's own switch would change every later model of the process
        for block in self.backbone.blocks:
            block.attn.fused_attn = False  # 1.3 x the training throughput of the fused kernel on a CPU
        self.to_map = nn.Linear(192, 320)
        self.cls_to_pooled = nn.Linear(192, 1280)
        self.mean_to_pooled = nn.Linear(192, 1280)
        self.to_concept = nn.Linear(384, num_concepts)
        self.to_words = nn.Linear(384, num_words)

    def features(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode images (B, 3, H, W): class token (B, 192) and patches (B, N, 192)."""
        tokens = self.backbone.forward_features(x)
        return tokens[:, 0], tokens[:, 1:]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Predict map, pooled features (from class token and from mean patch), concept and words."""
        cls, patches = self.features(x)
        mean = patches.mean(1)
        both = torch.cat([cls, mean], -1)
        heads = self.to_map(patches), self.cls_to_pooled(cls), self.mean_to_pooled(mean)
        return *heads, self.to_concept(both), self.to_words(both)


@torch.inference_mode()
def embed(model: Student, images: torch.Tensor, size: int) -> torch.Tensor:
    """Encode images as class token and mean patch, end to end (N, 384)."""
    model.eval()
    out = []
    for x in images.split(64):
        x = (x.float() / 255 - 0.5) / 0.5
        if x.shape[-1] != size:
            x = F.interpolate(x, size=(size, size), mode="bilinear", antialias=True)
        with torch.autocast("cpu", torch.bfloat16):
            cls, patches = model.features(x)
            out.append(torch.cat([cls, patches.mean(1)], -1).float())
    model.train()
    return torch.cat(out)


def build_optimizers(model: Student, weight_decay: float, muon: bool) -> list[torch.optim.Optimizer]:
    """Make AdamW, and Muon for the matrices of the blocks if wanted."""
    matrices = [p for p in model.backbone.blocks.parameters() if muon and p.ndim == 2]
    others = set(model.parameters()) - set(matrices)
    decay = [p for p in model.parameters() if p in others and p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.98), fused=True)]
    if muon:
        matrices = [{"params": matrices, "weight_decay": weight_decay}]
        optimizers.append(torch.optim.Muon(matrices, lr=1.0, adjust_lr_fn="match_rms_adamw"))
    return optimizers


class Distillation:
    """Train a student and keep its state in a folder."""

    def __init__(self, recipe: dict[str, Any], folder: Path):
        self.recipe, self.folder = recipe, folder
        torch.manual_seed(recipe["seed"])
        self._read_images()
        # what the student has to say
        maps, pooled = cached_teacher_features(self.images, self.rows, folder, recipe["teacher_size"])
        self.targets = Targets(self.rows, self.labelled, maps, pooled)
        # the student
        self.model = Student(self.targets.num_concepts, self.targets.num_words, recipe["drop_path"])
        self.forward = torch.compile(self.model) if recipe.get("compile") else self.model
        self.optimizers = build_optimizers(self.model, recipe["weight_decay"], recipe.get("optimizer") == "muon")
        self.generator = torch.Generator().manual_seed(recipe["seed"])
        self.sizes = [phase["size"] for phase in recipe["phases"] for _ in range(phase["steps"])]  # of every step
        self.done, self.log, self.order = 0, [], []

    def _read_images(self) -> None:
        """Read the files of the recipe; the first `labelled` rows have labels."""
        recipe, side = self.recipe, self.recipe["image_size"]
        self.images, self.rows = read_images(recipe["train_file"], side)
        self.labelled = len(self.rows)
        require({"id", "concept"} <= set(self.rows[0]), "the rows of train_file need an id and a concept.")
        if recipe.get("unlabelled_file"):
            sample, seed = recipe.get("unlabelled_rows"), recipe["seed"]
            images, rows = read_images(recipe["unlabelled_file"], side, sample=sample, seed=seed)
            self.images, self.rows = torch.cat([self.images, images]), self.rows + rows
        self.small = resized(self.images, SMALL)
        self.validation, self.validation_rows = read_images(recipe["validation_file"], side, exclude_copyleft=False)
        counts = f"{self.labelled} training images, {len(self.rows) - self.labelled} without words"
        print(f"{counts}, {len(self.validation)} validation images", flush=True)

    def resume(self) -> None:
        """Go on from the state in the folder, if there is one."""
        state_file, log_file = self.folder / "state.pt", self.folder / "log.json"
        if not state_file.exists():
            return
        state = torch.load(state_file, weights_only=True)
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:  # other data have other concepts and words
            raise ValueError(f"{state_file} is of a run with other data: choose another output_dir.") from error
        for optimizer, values in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(values)
        self.done = state["step"]
        log = json.loads(log_file.read_text()) if log_file.exists() else []
        self.log = [entry for entry in log if entry["step"] <= self.done]
        self.generator.manual_seed(self.recipe["seed"] + self.done)
        print(f"resumed at step {self.done}", flush=True)

    def train(self) -> None:
        """Take the steps that are left; log, save and evaluate on the way."""
        recipe, total = self.recipe, len(self.sizes)
        started, sums = time.time(), Counter()
        self.model.train()
        for step in range(self.done, total):
            # the rate: linear warm-up, cosine to a hundredth
            rate = recipe["learning_rate"] * min(1, (step + 1) / recipe["warmup_steps"])
            rate *= 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / total))
            size, taken = self.sizes[step], step + 1 - self.done
            sums.update(self.step(size, rate))
            # log
            if (step + 1) % LOG_STEPS == 0:
                speed = taken * recipe["batch_size"] / (time.time() - started)
                parts = " ".join(f"{k} {v / min(LOG_STEPS, taken):.3f}" for k, v in sums.items())
                print(f"step {step + 1}/{total} size {size} lr {rate:.1e} {parts} | {speed:.0f} images/s", flush=True)
                sums = Counter()
            # save and evaluate
            if (step + 1) % recipe["save_steps"] == 0 or step + 1 == total:
                self.save(step + 1)
                score = self.evaluate(size)
                self.log.append({"step": step + 1, "size": size, "nearest_neighbour_concept": score})
                write_json(self.folder / "log.json", self.log)
                print(f"step {step + 1}: the nearest neighbour has the right concept for {score:.3f}", flush=True)

    def step(self, size: int, rate: float) -> dict[str, float]:
        """Train on one batch of crops of `size`; return the losses."""
        count, generator = self.recipe["batch_size"], self.generator
        if len(self.order) < count:
            self.order = torch.randperm(len(self.images), generator=generator).tolist()
        index, self.order = torch.tensor(self.order[:count]), self.order[count:]
        # augment
        theta = random_affine(count, degrees=12, shift=0.12, scale=0.3, generator=generator)
        source = self.small if size <= 128 else self.images
        x = warp(source[index].float() / 255, theta, (size, size))
        x = change_style(x, self.recipe["style"], generator) if self.recipe["style"] else x
        x = (change_colors(x, 0.3, generator) - 0.5) / 0.5
        # compare
        with torch.autocast("cpu", torch.bfloat16):
            outputs = self.forward(x)
        losses = self.targets.losses(outputs, index, theta)
        loss = sum(self.recipe["weights"][k] * v for k, v in losses.items())
        if not torch.isfinite(loss):
            raise RuntimeError(f"the loss is not finite: {losses}")
        # learn
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        return {k: v.item() for k, v in losses.items()}

    def save(self, step: int) -> None:
        """Write the state to go on from, and the tower alone."""
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        with atomic_path(self.folder / "state.pt") as temporary:
            torch.save({"model": self.model.state_dict(), "optimizers": states, "step": step}, temporary)
        weights = {k: v.contiguous() for k, v in self.model.backbone.state_dict().items()}
        with atomic_path(self.folder / "model.safetensors") as temporary:
            save_file(weights, temporary, metadata={"format": "pt"})

    def evaluate(self, size: int) -> float:
        """Measure how often the nearest training image of a validation image has its concept."""
        train, validation = (embed(self.model, x, size) for x in (self.images[: self.labelled], self.validation))
        mean, std = train.mean(0), train.std(0) + 1e-6
        nearest = nearest_neighbours((train - mean) / std, (validation - mean) / std)
        pairs = zip(nearest, self.validation_rows)
        return float(np.mean([self.rows[i]["concept"] == row["concept"] for i, row in pairs]))


def main(recipe: dict[str, Any]) -> None:
    """Train the vision tower of a recipe."""
    run = Distillation(recipe, Path(recipe["output_dir"]))
    run.resume()
    run.train()
