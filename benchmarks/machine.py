"""Measure time and memory of this process, and describe the machine. Memory is read from Linux's /proc."""

import ctypes
import gc
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import transformers


def seconds(call: Callable) -> tuple[float, object]:
    """Time a call; returns the seconds and its result."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def read_bytes(file: str, name: str) -> int | None:
    """Read a number of kB from /proc, as bytes; None on other systems."""
    if sys.platform != "linux":
        return None
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc", file).read_text())[1])


def resident_memory() -> int | None:
    """Read the resident size of this process, bytes."""
    return read_bytes("self/status", "VmRSS")


def peak_memory() -> int | None:
    """Read the highest resident size since `reset_peak`, bytes."""
    return read_bytes("self/status", "VmHWM")


def available_memory() -> int | None:
    """Read how many bytes new processes can have."""
    return read_bytes("meminfo", "MemAvailable")


def reset_peak() -> None:
    """Give free memory back to the system and start a new peak."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def describe_machine() -> str:
    """Write a line with cores, threads, load and versions."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{cores} cores ({platform.machine()}), {torch.get_num_threads()} torch threads, "
        f"load average {os.getloadavg()[0]:.1f} at the start; Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, timm {timm.__version__}"
    )
