"""Change images at random for training."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F


def random_affine(n: int, degrees: float, shift: float, scale: float, generator=None) -> torch.Tensor:
    """Draw maps (n, 2, 3) from crop to image that rotate, shift, zoom and stretch."""

    def uniform(*size: int) -> torch.Tensor:
        return torch.rand(*size, generator=generator) * 2 - 1

    angle = uniform(n) * math.radians(degrees)
    zoom, stretch = torch.exp(uniform(n) * math.log1p(scale)), torch.exp(uniform(n) * 0.15)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = angle.cos() * zoom * stretch, -angle.sin() * zoom
    theta[:, 1, 0], theta[:, 1, 1] = angle.sin() * zoom, angle.cos() * zoom / stretch
    theta[:, :, 2] = uniform(n, 2) * shift
    return theta


def warp(images: torch.Tensor, theta: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Sample crops of images (B, C, H, W) under maps (B, 2, 3)."""
    # outside an image its border goes on
    grid = F.affine_grid(theta, [len(images), 1, *size], align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def change_colors(x: torch.Tensor, strength: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """Change colours, erase a patch and add noise in images (B, 3, H, W)."""
    B, _, H, W = x.shape

    def rand(*size: int) -> torch.Tensor:
        return torch.rand(*size, generator=generator)

    # saturation, for some down to grey
    gray = x.mean(1, keepdim=True)
    saturation = 1 + 2 * strength * (2 * rand(B, 1, 1, 1) - 1)
    x = gray + (x - gray) * torch.where(rand(B, 1, 1, 1) < 0.3 * strength, torch.zeros(()), saturation)
    # contrast and brightness
    x = (x - 0.5) * (1 + strength * (2 * rand(B, 1, 1, 1) - 1)) + 0.5 + 0.35 * strength * (rand(B, 1, 1, 1) - 0.5)
    # pictograms come on white: for one in three the ground is another pale colour
    ground = torch.where(rand(B, 1, 1, 1) < 0.33, 1 - strength * rand(B, 3, 1, 1), torch.ones(()))
    x = torch.where(gray > 0.97, x * ground, x)
    # a patch of one colour
    for i in torch.nonzero(rand(B) < strength).flatten().tolist():
        h, w = int(H * (0.1 + 0.25 * rand(1))), int(W * (0.1 + 0.25 * rand(1)))
        top, left = int((H - h) * rand(1)), int((W - w) * rand(1))
        x[i, :, top : top + h, left : left + w] = rand(3, 1, 1)
    return (x + 0.06 * strength * torch.randn(x.shape, generator=generator)).clamp(0, 1)


def change_style(x: torch.Tensor, share: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """Outline a share of the images (B, 3, H, W) and blur an equal share."""
    draw, x = torch.rand(len(x), generator=generator), x.clone()
    outlined, blurred = draw < share, (draw >= share) & (draw < 2 * share)
    if blurred.any():
        x[blurred] = F.avg_pool2d(F.pad(x[blurred], (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    if outlined.any():
        gray = F.pad(x[outlined].mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
        slope = (gray[..., 1:-1, 2:] - gray[..., 1:-1, :-2]).abs() + (gray[..., 2:, 1:-1] - gray[..., :-2, 1:-1]).abs()
        lines = 1 - F.max_pool2d((4 * slope).clamp(0, 1), 3, stride=1, padding=1)
        # a quarter of the outlined ones are bare lines on white
        bare = (draw[outlined] < share / 4).view(-1, 1, 1, 1)
        x[outlined] = lines * torch.where(bare, torch.ones(()), x[outlined])
    return x


def image_augmentation(
    degrees: float = 10, shift: float = 0.1, scale: float = 0.2, color: float = 0.25, style: float = 0.0
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Make a function that augments images (B, 3, H, W) in [0, 1]."""

    def augment(x: torch.Tensor) -> torch.Tensor:
        # never flipped: captions say left and right
        x = warp(x, random_affine(len(x), degrees, shift, scale), x.shape[-2:])
        x = change_style(x, style) if style else x
        return change_colors(x, color) if color else x

    return augment


def gray_copy(x: torch.Tensor) -> torch.Tensor:
    """Take the colours out of images (B, 3, H, W), in the same shape."""
    return x.mean(1, keepdim=True).expand_as(x).contiguous()
