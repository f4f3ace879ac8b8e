"""How far is a memory from never having been written, after 1,000 random writes and forgets? And for which float width and noise?

    python benchmarks/memory_drift.py

Unit addresses drawn at random, contents of unit-variance numbers, up to `--live` facts at a time; in the end all but one are forgotten and
the posterior is compared with that of a fresh memory that holds this one only: relative distance of mean and of covariance.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from compose_hf import modeling  # noqa: E402  gives the model files a package

MemoryState = modeling.MemoryState


def drift(dtype: torch.dtype, noise: float, slots: int, live: int, steps: int = 1000) -> tuple[float, float]:
    """Relative distance of mean and covariance from a memory that holds the last fact only."""
    generator = torch.Generator().manual_seed(0)
    new = lambda: MemoryState.new(1, slots, 64, noise, live + 1, 1, dtype=dtype)  # noqa: E731
    state = new()
    for _ in range(steps):
        count = int(state.counts)
        if count < live and (count < 2 or torch.rand((), generator=generator) < 0.6):
            address = F.normalize(torch.randn(1, 1, slots, generator=generator), dim=-1)
            state = state.write(address, torch.randn(1, 1, 64, generator=generator))
        else:
            state = state.forget(int(torch.randint(count, (), generator=generator)))
    while int(state.counts) > 1:
        state = state.forget(0)
    fresh = new().write(state.addresses, state.contents)
    distance = lambda a, b: float((a - b).norm() / b.norm())  # noqa: E731
    return distance(state.mean, fresh.mean), distance(state.covariance, fresh.covariance)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, default=128)
    parser.add_argument("--live", type=int, default=64)
    options = parser.parse_args()
    print("| state | noise variance | mean | covariance |\n| --- | ---: | ---: | ---: |")
    for dtype in (torch.float32, torch.float64):
        for noise in (1e-4, 1e-2, 0.1, 1.0):
            mean, covariance = drift(dtype, noise, options.slots, options.live)
            print(f"| {str(dtype).removeprefix('torch.')} | {noise:g} | {mean:.1e} | {covariance:.1e} |", flush=True)


if __name__ == "__main__":
    main()
