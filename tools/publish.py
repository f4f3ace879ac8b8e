"""Put a trained checkpoint at the root of a folder as a Hub repo receives it: weights (bf16, or packed as they are), config, processor, tokenizer.

    python tools/publish.py runs/nano_stage1b .
    python tools/publish.py runs/nano_ship . --only memory_projection     these weights alone, all else stays as it is

Everything is written inside the target first, under another name, and renamed; when one file cannot be, those before it are put back, so a
failure leaves the target as it was.
"""

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
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


def put_in_place(built: Path, target: Path, names: list[str]) -> None:
    """Rename files of the folder `built` to their places in `target`: all of them, or none.

    Raises:
        OSError: what hinders one.
    """
    with tempfile.TemporaryDirectory(prefix=".old.", dir=target) as old:
        before = {name for name in names if (target / name).exists()}
        for name in before:
            shutil.copy2(target / name, Path(old, name))
        done = []
        try:
            for name in names:
                (built / name).chmod(0o644)
                os.replace(built / name, target / name)
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
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=True, dtype=dtype)
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    with tempfile.TemporaryDirectory(prefix=".new.", dir=target) as folder:
        built = Path(folder)
        model.save_pretrained(built)
        if only:
            keep_others(built / "model.safetensors", target / "model.safetensors", only)
            names = ["model.safetensors"]
        else:
            processor.save_pretrained(built)
            tokenizer = built / "tokenizer_config.json"
            settings = json.loads(tokenizer.read_text())
            settings.pop("local_files_only", None)  # how it was read here, offline
            tokenizer.write_text(json.dumps(settings, indent=2) + "\n")
            # the code of the target is the newer one
            names = sorted(path.name for path in built.iterdir() if path.suffix != ".py")
        put_in_place(built, target, names)
    for name in names:
        print(f"{(target / name).stat().st_size:>12,} {name}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("target", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--only", help="regular expression: these weights alone, into those of the target")
    options = parser.parse_args(arguments)
    try:
        publish(options.checkpoint, options.target, options.dtype, options.only)
    except (OSError, ValueError, SafetensorError) as error:
        sys.exit(f"not published: {error}")


if __name__ == "__main__":
    main()
