"""Put a trained checkpoint into a folder as a Hub repo has it: weights, config, processor, tokenizer.

    python tools/publish.py runs/nano/packed .

Weights become bf16, or stay packed. Everything is written inside the target under another name first, and renamed. When
one rename fails, the files before it are put back.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from safetensors import SafetensorError

from microvlm.model import load


def put_in_place(source: Path, target: Path, names: list[str]) -> None:
    """Rename files of `source` to their places in `target`: all of them, or none."""
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


def publish(checkpoint: str, target: Path, dtype: str = "bfloat16") -> None:
    """Put a checkpoint into a folder.

    Raises:
        OSError, ValueError: the checkpoint cannot be loaded, or the target cannot be written.
    """
    if not target.is_dir():
        raise ValueError(f"{target} is not a folder.")
    model, processor = load(checkpoint, dtype=dtype, device="cpu")
    with tempfile.TemporaryDirectory(prefix=".new.", dir=target) as folder:
        source = Path(folder)
        model.save_pretrained(source)
        processor.save_pretrained(source)
        # how the tokenizer was read here, offline
        tokenizer = source / "tokenizer_config.json"
        settings = json.loads(tokenizer.read_text())
        settings.pop("local_files_only", None)
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
    options = parser.parse_args(argv)
    try:
        publish(options.checkpoint, options.target, options.dtype)
    except (OSError, ValueError, SafetensorError) as error:
        sys.exit(f"not published: {error}")


if __name__ == "__main__":
    main()
