"""Put a trained checkpoint at the root of a folder as a Hub repo receives it: weights (bf16, or packed as they are), config, processor, tokenizer.

    python scripts/publish.py runs/nano_stage1b .
    python scripts/publish.py runs/nano_ship . --only memory_projection     these weights alone, all else stays as it is

Everything is written beside the target first and renamed, so a failure leaves the target as it was.
"""

import argparse
import json
import os
import re
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor


def keep_others(path: Path, target: Path, only: str) -> None:
    """Into the weights in `path` those of `target`, but for the names that match `only`.

    Raises:
        ValueError: no name matches, or the two files differ in names, shapes or types.
    """
    new, old = load_file(path), load_file(target)
    shape = lambda tensors: {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}  # noqa: E731
    if shape(new) != shape(old):
        different = sorted(name for name, _ in shape(new).items() ^ shape(old).items())
        raise ValueError(f"{different[0]} is not of one shape and type in both checkpoints.")
    taken = [name for name in new if re.search(only, name)]
    if not taken:
        raise ValueError(f"no weight matches {only!r}.")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(old | {name: new[name] for name in taken}, path, metadata=metadata)
    print(f"taken: {', '.join(taken)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("target")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--only", help="regular expression: these weights alone, into those of the target")
    options = parser.parse_args()
    target = Path(options.target)
    model = AutoModelForImageTextToText.from_pretrained(
        options.checkpoint, trust_remote_code=True, dtype=getattr(torch, options.dtype)
    )
    processor = AutoProcessor.from_pretrained(options.checkpoint, trust_remote_code=True)
    with tempfile.TemporaryDirectory(dir=target) as folder:
        model.save_pretrained(folder)
        if options.only:
            weights = Path(folder, "model.safetensors")
            keep_others(weights, target / weights.name, options.only)
            weights.chmod(0o644)
            os.replace(weights, target / weights.name)
            return
        processor.save_pretrained(folder)
        tokenizer = Path(folder, "tokenizer_config.json")
        options = json.loads(tokenizer.read_text())
        options.pop("local_files_only", None)  # how it was read here, offline
        tokenizer.write_text(json.dumps(options, indent=2) + "\n")
        for path in sorted(Path(folder).iterdir()):
            if path.suffix != ".py":  # the code of the target is the newer one
                path.chmod(0o644)
                os.replace(path, target / path.name)
                print(f"{(target / path.name).stat().st_size:>12,} {path.name}")


if __name__ == "__main__":
    main()
