"""EfficientNet-Lite0, the teacher of nano's vision tower, as a folder that compose_hf.py reads.

python scripts/save_teacher.py runs/efficientnet_lite0
"""

import json
import sys
from pathlib import Path

from safetensors.torch import save

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from caption import replacing  # noqa: E402
from scripts.distill_vision import load_teacher  # noqa: E402

CONFIG = {
    "architecture": "tf_efficientnet_lite0",
    "num_classes": 1000,
    "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "classifier": "classifier"},
}


def main(folder: str) -> None:
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in load_teacher().state_dict().items()}
    with replacing(str(out / "model.safetensors"), "wb") as file:
        file.write(save(weights))
    with replacing(str(out / "config.json"), "w") as file:
        file.write(json.dumps(CONFIG, indent=1))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
