"""A checkpoint with another vision tower of the same architecture; adapter, memory and decoder stay and have to be trained on.

python scripts/swap_vision.py runs/nano_memory runs/nano_vision3/model.safetensors runs/nano_start
"""

import argparse
import sys
from pathlib import Path

from safetensors.torch import load_file
from transformers import AutoProcessor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from quantize_hf import load_plain  # noqa: E402


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("vision", help="weights of the tower in timm's layout")
    parser.add_argument("out", metavar="OUT", help="a folder that does not exist")
    options = parser.parse_args(arguments)
    if Path(options.out).exists():
        sys.exit(f"error: {options.out} exists: choose another folder.")
    model = load_plain(options.checkpoint)
    processor = AutoProcessor.from_pretrained(options.checkpoint, trust_remote_code=True)
    model.model.vision_tower.timm_model.load_state_dict(load_file(options.vision))
    model.save_pretrained(options.out)
    processor.save_pretrained(options.out)


if __name__ == "__main__":
    main()
