"""EfficientNet-Lite0, the teacher of nano's vision tower, as a folder that compose_hf.py reads.

python scripts/save_teacher.py runs/efficientnet_lite0
"""

import json
import sys
from pathlib import Path

from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from scripts.distill_vision import load_teacher  # noqa: E402

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in load_teacher().state_dict().items()}
    save_file(weights, folder / "model.tmp")
    (folder / "model.tmp").replace(folder / "model.safetensors")
    config = {
        "architecture": "tf_efficientnet_lite0",
        "num_classes": 1000,
        "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "classifier": "classifier"},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
