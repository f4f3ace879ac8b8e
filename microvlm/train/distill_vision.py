"""Train a DeiT-Tiny from nothing with EfficientNet-Lite0 as teacher.

The student learns the teacher's feature map and pooled features, the concept of an image and the words of its caption,
and to put all drawings of a concept and its caption close to each other, whatever their style. A recipe of
`kind: distill` has the options, see recipes/nano/vision.yaml.
"""

import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from datasets import Image
from datasets.fingerprint import Hasher
from safetensors.torch import save_file
from torch import nn
from transformers import Trainer, TrainingArguments

from ..data.augment import change_colors, change_style, random_affine, warp
from ..data.rows import load_rows
from ..files import atomic_path, write_json
from ..model import require
from ..teacher import nearest_neighbours, teacher_maps
from .checkpoints import checkpoints
from .recipe import check_training
from .setup import build_optimizer

STOP_WORDS = {"a", "an", "the", "of", "with", "and", "in", "on", "for", "to"}
LOSSES = {"dense", "pooled", "concept", "words", "contrast"}
QUEUE = 4096  # images of earlier batches that a batch is contrasted with
TEMPERATURE = 0.1  # of the contrast
SIZES = (16, 64)  # concepts to find an image of another style among
KEYS = {"kind": str, "weights": dict[str, float | int], "phases": list[dict[str, int]], "training": dict}
KEYS |= dict.fromkeys(("image_size", "batch_size", "unlabelled_batch"), int) | {"style": float | int}
KEYS |= dict.fromkeys(("train_file", "unlabelled_file", "validation_file"), str | list[str])


def check(recipe: dict[str, Any]) -> str:
    """Refuse values that cannot work; returns the folder of the run."""
    check_training(recipe["training"])
    given = {key for key, value in recipe["training"].items() if value is not None}
    require({"output_dir", "seed"} <= given, "training needs an output_dir and a seed.")
    require(set(recipe["weights"]) == LOSSES, f"weights are those of {', '.join(sorted(LOSSES))}.")
    phases = recipe["phases"]
    fits = all(set(p) == {"size", "steps"} and min(p.values()) > 0 and p["size"] % 16 == 0 for p in phases)
    require(fits and phases, "a phase is {size: side of the crops, a multiple of 16, steps: their number}.")
    batch, extra, side = recipe["batch_size"], recipe["unlabelled_batch"], recipe["image_size"]
    require(batch % 2 == 0 < batch, "batch_size is positive and even.")
    require(min(extra, side) > 0, "unlabelled_batch and image_size are positive.")
    return recipe["training"]["output_dir"]


def read_images(path: str | list[str], size: int, exclude_copyleft: bool = True) -> tuple[torch.Tensor, list[dict]]:
    """Read images (N, 3, size, size) uint8 and rows."""
    source = load_rows(path, exclude_copyleft).cast_column("image", Image())
    missing = {"id", "concept", "style"} - set(source.column_names)
    require(not missing, f"{path} has no {', '.join(sorted(missing))}.")
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


def cached_teacher_features(images: torch.Tensor, rows: list[dict], folder: Path) -> list[torch.Tensor]:
    """Compute `teacher_maps` once and cache them in `folder`."""
    made_of = [row["id"] for row in rows], int(images.numpy().sum(dtype=np.int64))
    cache = folder / f"teacher_{Hasher.hash(made_of)}.pt"
    if not cache.exists():
        with atomic_path(cache) as temporary:
            torch.save(teacher_maps(images, images.shape[-1]), temporary)
    return torch.load(cache, weights_only=True)


def caption_words(caption: str) -> set[str]:
    """Collect the words of a caption that say something."""
    return set(re.findall(r"[a-z0-9]+", caption.lower())) - STOP_WORDS


class Batches(torch.utils.data.Dataset):
    """Make the batch of each step: crops, and what the student has to say about them.

    A batch has pairs of drawings of one concept, of two styles where there are, and then images without words.
    """

    def __init__(self, recipe: dict[str, Any], folder: Path):
        self.recipe = recipe
        self.sizes = [phase["size"] for phase in recipe["phases"] for _ in range(phase["steps"])]  # of every step
        self.images, self.rows = read_images(recipe["train_file"], recipe["image_size"])
        self.labelled = len(self.rows)
        images, rows = read_images(recipe["unlabelled_file"], recipe["image_size"])
        self.images = torch.cat([self.images, images])
        self.small = resized(self.images, max(1, recipe["image_size"] * 9 // 14))  # for crops of at most half the side
        # the teacher's features, (N, 320, h, w) and (N, 1280) in float16, are standardised
        self.maps, self.pooled = cached_teacher_features(self.images, self.rows + rows, folder)
        maps, pooled = self.maps.float(), self.pooled.float()
        self.map_mean, self.map_std = (x[:, None, None] for x in (maps.mean((0, 2, 3)), maps.std((0, 2, 3)) + 1e-4))
        self.pool_mean, self.pool_std = pooled.mean(0), pooled.std(0) + 1e-4
        # concepts, and words that at least three captions have
        names = {c: i for i, c in enumerate(sorted({row["concept"] for row in self.rows}))}
        self.concepts = torch.tensor([names[row["concept"]] for row in self.rows])
        self.drawings = defaultdict(list)
        for i, concept in enumerate(self.concepts.tolist()):
            self.drawings[concept].append(i)
        captions = [caption_words(row["caption"]) for row in self.rows]
        counts = Counter(word for words in captions for word in words)
        column = {w: i for i, w in enumerate(sorted(w for w, n in counts.items() if n >= 3))}
        self.words = torch.zeros(self.labelled, len(column))
        for i, words in enumerate(captions):
            self.words[i, [column[w] for w in words if w in column]] = 1
        self.num_concepts, self.num_words = len(names), len(column)
        print(f"{self.labelled} images of {len(names)} concepts, {len(rows)} without words", flush=True)

    def __len__(self) -> int:
        return len(self.sizes)

    def partner(self, i: int, generator: torch.Generator) -> int:
        """Draw another image of the concept of image `i`, of another style if there is one."""
        others = [j for j in self.drawings[self.concepts[i].item()] if j != i] or [i]
        others = [j for j in others if self.rows[j]["style"] != self.rows[i]["style"]] or others
        return others[torch.randint(len(others), (), generator=generator)]

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.recipe["training"]["seed"] * len(self) + step)
        # which images
        first = torch.randint(self.labelled, (self.recipe["batch_size"] // 2,), generator=generator)
        second = torch.tensor([self.partner(i, generator) for i in first.tolist()])
        count = (self.recipe["unlabelled_batch"],)
        index = torch.cat([first, second, torch.randint(self.labelled, len(self.images), count, generator=generator)])
        labelled = index[: len(first) * 2]
        # their crops
        size = self.sizes[step]
        theta = random_affine(len(index), degrees=12, shift=0.12, scale=0.3, generator=generator)
        source = self.small if size * 2 <= self.images.shape[-1] else self.images
        x = warp(source[index].float() / 255, theta, (size, size))
        x = change_style(x, self.recipe["style"], generator) if self.recipe["style"] else x
        # the teacher's map, cropped as the image was
        maps = warp(self.maps[index].float(), theta, (size // 16, size // 16))
        return {
            "pixel_values": (change_colors(x, 0.3, generator) - 0.5) / 0.5,
            "dense": ((maps - self.map_mean) / self.map_std).flatten(2).mT,  # (B, N, 320)
            "pooled": (self.pooled[index].float() - self.pool_mean) / self.pool_std,
            "concept": self.concepts[labelled],
            "words": self.words[labelled],
        }


class Student(nn.Module):
    """DeiT-Tiny with the heads of the losses, which are thrown away afterwards."""

    def __init__(self, num_concepts: int, num_words: int, weights: dict[str, float]):
        super().__init__()
        self.backbone = timm.create_model("deit_tiny_patch16_224", num_classes=0, dynamic_img_size=True)
        # of this tower alone: timm's own switch would change every later model of the process
        for block in self.backbone.blocks:
            block.attn.fused_attn = False  # three times the training throughput of the fused kernel on a CPU
        self.weights = weights
        self.encode = self.features  # `main` compiles it
        self.to_map = nn.Linear(192, 320)
        self.cls_to_pooled = nn.Linear(192, 1280)
        self.mean_to_pooled = nn.Linear(192, 1280)
        self.to_concept = nn.Linear(384, num_concepts)
        self.to_words = nn.Linear(384, num_words)
        # one space of images and captions, and the last images in it
        self.image_to_shared = nn.Linear(384, 256, bias=False)
        self.words_to_shared = nn.Linear(num_words, 256, bias=False)
        self.register_buffer("queue", F.normalize(torch.randn(QUEUE, 256), dim=-1))
        self.register_buffer("queue_concepts", torch.full((QUEUE,), -1))

    def features(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode images (B, 3, H, W): class token and mean patch, end to end (B, 384), and patches (B, N, 192)."""
        tokens = self.backbone.forward_features(x)
        cls, patches = tokens[:, 0], tokens[:, 1:]
        return torch.cat([cls, patches.mean(1)], -1), patches

    def forward(self, pixel_values, dense, pooled, concept, words) -> dict[str, Any]:
        """Compare with what the teacher and the labels say; the first rows are those with labels."""
        both, patches = self.encode(pixel_values)
        from_cls, from_mean = self.cls_to_pooled(both[:, :192]).float(), self.mean_to_pooled(both[:, 192:]).float()
        labelled = both[: len(concept)]
        said_words = self.to_words(labelled).float()
        losses = {
            "dense": F.smooth_l1_loss(self.to_map(patches).float(), dense),
            "pooled": F.smooth_l1_loss(from_cls, pooled) + F.smooth_l1_loss(from_mean, pooled),
            "concept": F.cross_entropy(self.to_concept(labelled).float(), concept, label_smoothing=0.1),
            "words": F.binary_cross_entropy_with_logits(said_words, words, reduction="sum") / len(concept),
            "contrast": self.contrast(self.image_to_shared(both), self.words_to_shared(words), concept),
        }
        return {"loss": sum(self.weights[name] * loss for name, loss in losses.items()), "losses": losses}

    def contrast(self, images: torch.Tensor, captions: torch.Tensor, concept: torch.Tensor) -> torch.Tensor:
        """Supervised contrast (Khosla et al. 2020) of the images with each other, with captions and earlier images."""
        images, captions = F.normalize(images.float(), dim=-1), F.normalize(captions.float(), dim=-1)
        asking = images[: len(concept)]
        with torch.autocast("cpu", enabled=False):
            logits = asking @ torch.cat([images, captions, self.queue]).mT / TEMPERATURE
        unknown = concept.new_full((len(images) - len(concept),), -1)
        concepts = torch.cat([concept, unknown, concept, self.queue_concepts])
        itself = torch.eye(len(asking), len(concepts), dtype=torch.bool, device=images.device)
        same = (concept[:, None] == concepts) & ~itself
        if self.training:
            known = torch.cat([concept, unknown])
            self.queue = torch.cat([images.detach(), self.queue])[:QUEUE]
            self.queue_concepts = torch.cat([known, self.queue_concepts])[:QUEUE]
        log_p = logits.masked_fill(itself, -torch.inf).log_softmax(-1)
        return -(log_p.masked_fill(~same, 0).sum(-1) / same.sum(-1)).mean()


@torch.inference_mode()
def embed(model: Student, images: torch.Tensor, size: int) -> torch.Tensor:
    """Encode images (N, 3, H, W) uint8 as class token and mean patch, end to end (N, 384)."""
    out = []
    for x in resized(images, size).split(32):
        with torch.autocast("cpu", torch.bfloat16):
            out.append(model.features((x.float() / 255 - 0.5) / 0.5)[0].float())
    return torch.cat(out)


def style_recall(features: torch.Tensor, rows: list[dict], count: int, draws: int = 40) -> float:
    """Measure how often the nearest of `count` concepts is that of an image in another style.

    Features (N, C) are standardised first. Only concepts with two styles count.
    """
    features = (features - features.mean(0)) / (features.std(0) + 1e-6)
    styles = defaultdict(dict)
    for i, row in enumerate(rows):
        styles[row["concept"]].setdefault(row["style"], i)
    pairs = torch.tensor([list(images.values())[:2] for images in styles.values() if len(images) > 1])
    count, generator, hits = min(count, len(pairs)), torch.Generator().manual_seed(0), 0
    for _ in range(draws):
        stored, asked = pairs[torch.randperm(len(pairs), generator=generator)[:count]].mT
        nearest = nearest_neighbours(features[stored], features[asked])
        hits += sum(i == place for place, i in enumerate(nearest))
    return hits / (draws * count)


class VisionTrainer(Trainer):
    """`Trainer` whose items are batches; it logs every loss, and evaluates styles of concepts never seen."""

    def __init__(self, eval_images: torch.Tensor, **kwargs):
        super().__init__(data_collator=lambda batches: batches[0], **kwargs)
        self.eval_images, self.sums = eval_images, Counter()

    def create_optimizer(self, model=None):
        """Use Muon for the matrices of the blocks, AdamW for the rest."""
        matrices = {p for p in self.model.backbone.blocks.parameters() if p.ndim == 2}
        self.optimizer = build_optimizer(self, {}, matrices)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        require(bool(outputs["loss"].isfinite()), f"the loss is not finite: {outputs['losses']}")
        self.sums.update({name: loss.item() for name, loss in outputs["losses"].items()} | {"steps": 1})
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if steps := self.sums.pop("steps", 0):
            logs |= {f"{name}_loss": value / steps for name, value in self.sums.items()}
            self.sums.clear()
        super().log(logs, start_time)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        self.model.eval()
        features = embed(self.model, self.eval_images, self.train_dataset.sizes[max(0, self.state.global_step - 1)])
        metrics = {f"eval_style_{count}": style_recall(features, self.eval_dataset, count) for count in SIZES}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def main(recipe: dict[str, Any]) -> None:
    """Train the vision tower of a recipe; a stopped run goes on by itself."""
    folder = Path(recipe["training"]["output_dir"])
    torch.manual_seed(recipe["training"]["seed"])
    batches = Batches(recipe, folder)
    model = Student(batches.num_concepts, batches.num_words, recipe["weights"])
    model.encode = torch.compile(model.features)
    order = {"per_device_train_batch_size": 1, "train_sampling_strategy": "sequential", "max_steps": len(batches)}
    args = TrainingArguments(**recipe["training"] | order)
    images, rows = read_images(recipe["validation_file"], recipe["image_size"], exclude_copyleft=False)
    trainer = VisionTrainer(images, model=model, args=args, train_dataset=batches, eval_dataset=rows)
    complete = [str(c) for c in checkpoints(folder) if (c / "trainer_state.json").exists()]  # it is written last
    trainer.train(resume_from_checkpoint=complete[-1] if complete else None)
    write_json(folder / "log.json", trainer.state.log_history)
    weights = {k: v.contiguous() for k, v in model.backbone.state_dict().items()}
    with atomic_path(folder / "model.safetensors") as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
