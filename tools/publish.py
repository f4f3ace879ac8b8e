"""Put a trained checkpoint into a folder as a Hub repo has it: weights, config, processor, tokenizer.

    python tools/publish.py runs/nano/captions .
    python tools/publish.py runs/nano/memory . --only memory_projection     these weights; all else stays

Weights become bf16, or stay packed. Everything is written inside the target under another name first, and renamed. When
one rename fails, the files before it are put back.
"""

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from microvlm.model import load


def layout(tensors: dict[str, torch.Tensor]) -> dict[str, tuple]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def keep_others(path: Path, target: Path, only: str) -> None:
    """Replace in the file `path` all weights by those of `target`, except names that match `only`.

    Raises:
        ValueError: no name matches, or the two files differ in names, shapes or types.
    """
    new, old = load_file(path), load_file(target)
    if different := sorted(name for name, _ in layout(new).items() ^ layout(old).items()):
        raise ValueError(f"{different[0]} is not of one shape and type in both checkpoints.")
    names = [name for name in new if re.search(only, name)]
    if not names:
        raise ValueError(f"no weight matches {only!r}.")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(old | {name: new[name] for name in names}, path, metadata=metadata)
    print(f"published: {', '.join(names)}")


def put_in_place(source: Path, target: Path, names: list[str]) -> None:
    """Rename files of the folder `source` to their places in `target`: all of them, or none."""
    with tempfile.TemporaryDirectory(prefix=".old.", dir=target) as old:
        # copies of what is there
        before = {name for name in names if (target / name).exists()}
        for name in before:
            shutil.copy2(target / name, Path(old, name))
        # one by one; back again when one fails
        done = []
        try:
            for name in names:
                (source / name).chmod(0o644)
                os.replace(source / name, target / name)
                done.append(name)
        except BaseException:
            for name in done:
                os.replace(Path(old, name), target / name) if name in before else (target / name).unlink()
            raise


def publish(checkpoint: str, target: Path, dtype: str = "bfloat16", only: str | None = None) -> None:
    """Put a checkpoint, or those of its weights whose names match `only`, into a folder.

    Raises:
        OSError, ValueError: the checkpoint cannot be loaded, the target cannot be written, or `only` does not fit.
    """
    if not target.is_dir():
        raise ValueError(f"{target} is not a folder.")
    model, processor = load(checkpoint, dtype=dtype, device="cpu")
    with tempfile.TemporaryDirectory(prefix=".new.", dir=target) as folder:
        # write all files
        source, names = Path(folder), ["model.safetensors"]
        model.save_pretrained(source)
        if only:
            keep_others(source / "model.safetensors", target / "model.safetensors", only)
        else:
            processor.save_pretrained(source)
            tokenizer = source / "tokenizer_config.json"
            settings = json.loads(tokenizer.read_text())
            settings.pop("local_files_only", None)  # how it was read here, offline
            tokenizer.write_text(json.dumps(settings, indent=2) + "\n")
            # the code of the target is the newer one
            names = sorted(path.name for path in source.iterdir() if path.suffix != ".py")
        put_in_place(source, target, names)
    for name in names:
        print(f"{(target / name).stat().st_size:>12,} {name}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("target", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--only", help="regular expression: only these weights, into those of the target")
    options = parser.parse_args(argv)
    try:
        publish(options.checkpoint, options.target, options.dtype, options.only)
    except (OSError, ValueError, SafetensorError) as error:
        sys.exit(f"not published: {error}")


if __name__ == "__main__":
    main()
