"""Train a DeiT-Tiny from scratch with EfficientNet-Lite0 as teacher."""

import argparse
import hashlib
import json
import math
import re
import time
from collections import Counter
from pathlib import Path

import numpy as np
import timm
import timm.layers
import torch
import torch.nn.functional as F
import yaml
from datasets import Image
from safetensors.torch import save_file
from torch import nn

from ..data.augment import change_colors, change_style, random_affine
from ..data.rows import load_rows
from ..model import load_plain
from ..teacher import teacher_maps

STOP_WORDS = {"a", "an", "the", "of", "with", "and", "in", "on", "for", "to"}


def square(picture, size: int) -> np.ndarray:
    return np.asarray(picture.convert("RGB").resize((size, size), resample=3))


def load_split(
    path: str | list[str], size: int, include_copyleft: bool, sample: int | None = None, seed: int = 0
) -> tuple[torch.Tensor, list[dict]]:
    """Pictures (N, 3, size, size) uint8 and their rows without the picture; with `sample`, so many rows drawn by `seed`."""
    source = load_rows(path, exclude_copyleft=not include_copyleft).cast_column("image", Image())
    if sample is not None:
        source = source.shuffle(seed=seed).select(range(min(sample, len(source))))
    pictures, rows = torch.empty(len(source), 3, size, size, dtype=torch.uint8), []
    for i, row in enumerate(source):
        pictures[i] = torch.from_numpy(square(row.pop("image"), size).copy()).permute(2, 0, 1)
        rows.append(row)
    return pictures, rows


def resized(images: torch.Tensor, size: int, batch: int = 512) -> torch.Tensor:
    """Pictures (N, 3, H, W) uint8 at another size."""
    parts = (F.interpolate(x.float(), size=(size, size), mode="bilinear", antialias=True) for x in images.split(batch))
    return torch.cat([part.round().to(torch.uint8) for part in parts])


def cached_teacher_features(
    images: torch.Tensor, rows: list[dict], folder: Path, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`teacher_features`, kept in `folder` under a name made of what they depend on."""
    made_of = repr(([r["id"] for r in rows], int(images.numpy().sum(dtype=np.int64)), size))
    key = hashlib.sha256(made_of.encode()).hexdigest()[:16]
    cache = folder / f"teacher_{key}.pt"
    if cache.exists():
        return torch.load(cache, weights_only=True)
    started = time.time()
    features = teacher_maps(images, size)
    torch.save(features, cache.with_suffix(".tmp"))
    cache.with_suffix(".tmp").replace(cache)
    print(f"teacher features of {len(images)} pictures in {time.time() - started:.0f} s", flush=True)
    return features


def caption_words(caption: str) -> list[str]:
    return [w for w in re.findall(r"[a-z0-9]+", caption.lower()) if w not in STOP_WORDS]


class Student(nn.Module):
    """DeiT-Tiny with the throw-away heads that carry the distillation and label losses."""

    def __init__(self, num_concepts: int, num_words: int, drop_path: float):
        super().__init__()
        self.backbone = timm.create_model(
            "deit_tiny_patch16_224", num_classes=0, dynamic_img_size=True, drop_path_rate=drop_path
        )
        # of this tower alone: timm's own switch would change every later model of the process
        for block in self.backbone.blocks:
            block.attn.fused_attn = False  # 1.3 x the training throughput of the fused kernel on this CPU path
        self.to_map = nn.Linear(192, 320)
        self.cls_to_pooled = nn.Linear(192, 1280)
        self.mean_to_pooled = nn.Linear(192, 1280)
        self.to_concept = nn.Linear(384, num_concepts)
        self.to_words = nn.Linear(384, num_words)

    def features(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.backbone.forward_features(x)  # (B, 1 + N, 192)
        return tokens[:, 0], tokens[:, 1:]

    def forward(self, x):
        cls, patches = self.features(x)
        mean = patches.mean(1)
        both = torch.cat([cls, mean], -1)
        return (
            self.to_map(patches),
            self.cls_to_pooled(cls),
            self.mean_to_pooled(mean),
            self.to_concept(both),
            self.to_words(both),
        )


@torch.inference_mode()
def embed(model: Student, images: torch.Tensor, size: int) -> torch.Tensor:
    """Class token and mean patch token, end to end (N, 384)."""
    model.eval()
    out = []
    for start in range(0, len(images), 64):
        x = (images[start : start + 64].float() / 255 - 0.5) / 0.5
        if x.shape[-1] != size:
            x = F.interpolate(x, size=(size, size), mode="bilinear", antialias=True)
        with torch.autocast("cpu", torch.bfloat16):
            out.append(torch.cat([t.mean(1) if t.ndim == 3 else t for t in model.features(x)], -1).float())
    model.train()
    return torch.cat(out)


def first_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Weights to begin from: a run of this script, or the tower of a checkpoint of MicroVLM, packed or not."""
    if (folder / "state.pt").exists():
        return torch.load(folder / "state.pt", weights_only=True)["model"]
    tower = load_plain(folder).model.vision_tower.timm_model.state_dict()
    return {f"backbone.{name}": weight for name, weight in tower.items()}


def nearest_neighbour_exact(train_x, train_rows, val_x, val_rows) -> float:
    mean, std = train_x.mean(0), train_x.std(0) + 1e-6
    a, b = F.normalize((train_x - mean) / std, dim=-1), F.normalize((val_x - mean) / std, dim=-1)
    nearest = (b @ a.T).argmax(-1).tolist()
    return float(np.mean([train_rows[j]["concept"] == row["concept"] for j, row in zip(nearest, val_rows)]))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="YAML file, see recipes/nano_vision.yaml")
    recipe = yaml.safe_load(Path(parser.parse_args(arguments).recipe).read_text())
    out = Path(recipe["output_dir"])
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe["seed"])
    g = torch.Generator().manual_seed(recipe["seed"])

    side = recipe.get("picture_size", 256)
    images, rows = load_split(recipe["train_file"], side, include_copyleft=False)
    labelled = len(rows)
    if recipe.get("unlabelled_file"):
        more = load_split(recipe["unlabelled_file"], side, False, recipe["unlabelled_rows"], recipe["seed"])
        images, rows = torch.cat([images, more[0]]), rows + more[1]
        del more
    val_images, val_rows = load_split(recipe["validation_file"], side, include_copyleft=True)
    print(
        f"{labelled} training pictures, {len(images) - labelled} without words, {len(val_images)} validation pictures",
        flush=True,
    )

    maps, pooled = cached_teacher_features(images, rows, out, recipe.get("teacher_size", 320))
    map_mean, map_std = maps.float().mean((0, 2, 3)), maps.float().std((0, 2, 3)) + 1e-4
    pool_mean, pool_std = pooled.float().mean(0), pooled.float().std(0) + 1e-4

    concepts = {c: i for i, c in enumerate(sorted({r["concept"] for r in rows[:labelled]}))}
    counts = Counter(w for r in rows for w in set(caption_words(r["caption"])))
    words = {w: i for i, w in enumerate(sorted(w for w, n in counts.items() if n >= 3))}
    concept_ids = torch.tensor([concepts[r["concept"]] for r in rows[:labelled]] + [-100] * (len(rows) - labelled))
    word_targets = torch.zeros(len(rows), len(words))
    for i, r in enumerate(rows):
        for w in caption_words(r["caption"]):
            if w in words:
                word_targets[i, words[w]] = 1

    model = Student(len(concepts), len(words), recipe["drop_path"])
    small = resized(images, 144)
    muon = recipe.get("optimizer") == "muon"
    matrices = [p for p in model.backbone.blocks.parameters() if muon and p.ndim == 2]
    taken = set(matrices)
    decay = [p for p in model.parameters() if p.ndim > 1 and p not in taken]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": recipe["weight_decay"]}, {"params": rest, "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.98), fused=True)]
    if muon:  # on the blocks' matrices, AdamW on the rest
        matrices = [{"params": matrices, "weight_decay": recipe["weight_decay"]}]
        optimizers.append(torch.optim.Muon(matrices, lr=1.0, adjust_lr_fn="match_rms_adamw"))
    forward = torch.compile(model) if recipe.get("compile") else model
    phases, done, batch, log, log_file = recipe["phases"], 0, recipe["batch_size"], [], out / "log.json"
    total = sum(p["steps"] for p in phases)
    state_file = out / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        done = state["step"]
        log = json.loads(log_file.read_text()) if log_file.exists() else []
        log = [entry for entry in log if entry["step"] <= done]
        g.manual_seed(recipe["seed"] + done)
        print(f"resumed at step {done}", flush=True)
    elif recipe.get("init"):
        first = first_weights(Path(recipe["init"]))
        new = [
            k for k, v in model.state_dict().items() if k not in first or first[k].shape != v.shape
        ]  # heads of other labels
        if any(k.startswith("backbone.") for k in new):
            raise ValueError(
                f"{recipe['init']} is another vision tower: {', '.join(new)} are missing or differ in shape."
            )
        model.load_state_dict({k: v for k, v in first.items() if k not in new}, strict=False)
        print(f"weights of {recipe['init']}, schedule and optimizer new; begun anew: {new}", flush=True)

    def save(step: int) -> None:
        temporary = state_file.with_suffix(".tmp")
        saved = [optimizer.state_dict() for optimizer in optimizers]
        torch.save({"model": model.state_dict(), "optimizers": saved, "step": step}, temporary)
        temporary.replace(state_file)
        weights = {k: v.contiguous() for k, v in model.backbone.state_dict().items()}
        save_file(weights, str(out / "model.tmp"), metadata={"format": "pt"})
        (out / "model.tmp").replace(out / "model.safetensors")

    started, sums, order = time.time(), Counter(), []
    phase_of = [p for p in phases for _ in range(p["steps"])]
    model.train()
    for step in range(done, total):
        phase = phase_of[step]
        size = phase["size"]
        lr = recipe["learning_rate"] * min(1, (step + 1) / recipe["warmup_steps"])
        lr *= 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / total))
        for group in (g for optimizer in optimizers for g in optimizer.param_groups):
            group["lr"] = lr
        if len(order) < batch:
            order = torch.randperm(len(images), generator=g).tolist()
        idx = torch.tensor(order[:batch])
        order = order[batch:]

        theta = random_affine(batch, degrees=12, shift=0.12, scale=0.3, generator=g)
        grid = F.affine_grid(theta, (batch, 3, size, size), align_corners=False)
        source = small if size <= 128 else images
        x = F.grid_sample(source[idx].float() / 255, grid, padding_mode="border", align_corners=False)
        x = change_style(x, recipe["style"], g) if recipe.get("style") else x
        x = (change_colors(x, 0.3, g) - 0.5) / 0.5
        patch_grid = F.affine_grid(theta, (batch, 1, size // 16, size // 16), align_corners=False)
        target = F.grid_sample(maps[idx].float(), patch_grid, padding_mode="border", align_corners=False)
        target = ((target - map_mean[:, None, None]) / map_std[:, None, None]).flatten(2).mT  # (B, N, 320)
        target_pooled = (pooled[idx].float() - pool_mean) / pool_std

        with torch.autocast("cpu", torch.bfloat16):
            dense, from_cls, from_mean, concept, word = forward(x)
        known = concept_ids[idx] != -100
        of_labels = known.sum().clamp(min=1)  # a batch may have no row with words
        losses = {
            "dense": F.smooth_l1_loss(dense.float(), target),
            "pooled": F.smooth_l1_loss(from_cls.float(), target_pooled)
            + F.smooth_l1_loss(from_mean.float(), target_pooled),
            "concept": F.cross_entropy(concept.float(), concept_ids[idx], label_smoothing=0.1, reduction="sum")
            / of_labels,
            "words": F.binary_cross_entropy_with_logits(word.float()[known], word_targets[idx][known], reduction="sum")
            / of_labels,
        }
        loss = sum(recipe["weights"][k] * v for k, v in losses.items())
        if not torch.isfinite(loss):
            raise RuntimeError(f"loss is not finite at step {step}: {losses}")
        model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        sums.update({k: v.item() for k, v in losses.items()})
        if (step + 1) % 100 == 0:
            rate = (step + 1 - done) * batch / (time.time() - started)
            parts = " ".join(f"{k} {v / min(100, step + 1 - done):.3f}" for k, v in sums.items())
            print(f"step {step + 1}/{total} size {size} lr {lr:.1e} {parts} | {rate:.0f} pictures/s", flush=True)
            sums = Counter()
        if (step + 1) % recipe["save_steps"] == 0 or step + 1 == total:
            save(step + 1)
            train_x, val_x = embed(model, images[:labelled], size), embed(model, val_images, size)
            score = nearest_neighbour_exact(train_x, rows[:labelled], val_x, val_rows)
            log.append({"step": step + 1, "size": size, "nearest_neighbour_concept": score})
            log_file.write_text(json.dumps(log, indent=1))
            print(
                f"step {step + 1}: nearest neighbour has the right concept for {score:.3f} of validation_seen",
                flush=True,
            )
