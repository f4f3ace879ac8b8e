"""Put a trained checkpoint at the root of a folder as a Hub repo receives it: weights (bf16, or packed as they are), config, processor, tokenizer.

    python scripts/publish.py runs/nano_stage1b .

Everything is written beside the target first and renamed, so a failure leaves the target as it was.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("target")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    target = Path(options.target)
    model = AutoModelForImageTextToText.from_pretrained(
        options.checkpoint, trust_remote_code=True, dtype=getattr(torch, options.dtype)
    )
    processor = AutoProcessor.from_pretrained(options.checkpoint, trust_remote_code=True)
    with tempfile.TemporaryDirectory(dir=target) as folder:
        model.save_pretrained(folder)
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
