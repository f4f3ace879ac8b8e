"""Check a composed checkpoint against its sources."""

from collections import Counter
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from ..model import MicroVLMForConditionalGeneration, require
from .vision import VISION_PREFIX

# A BitNet layer computes what the source's does up to the rounding of a product, and that is checked layer by layer.
# Over 30 layers of a random model the 8-bit rounding of the activations grows it to 0.09 of the logits.
LOGITS_TOLERANCE = 0.25


@torch.inference_mode()
def text_logits(model: PreTrainedModel, vocab_size: int) -> torch.Tensor:
    """Compute logits of two rows of random tokens."""
    ids = torch.randint(vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.compiler.set_stance("force_eager"):
        return model(input_ids=ids, use_cache=False).logits.float()


def verify(folder: Path, weights: dict[str, torch.Tensor], logits: torch.Tensor, exact: bool) -> list[str]:
    """Compare the written folder with weights and `text_logits` of its sources; returns what was checked."""
    problems, missing = [], dict.fromkeys(weights)
    # the tensors in the files
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in missing.keys() & set(file.keys()):
                if not torch.equal(file.get_tensor(name), weights[name]):
                    problems.append(f"{name} in the written checkpoint is not equal to its source.")
                del missing[name]
    if missing:
        problems.append(f"{len(missing)} tensors were not written, such as {next(iter(missing))}.")
    # the model they make
    model, info = MicroVLMForConditionalGeneration.from_pretrained(folder, dtype="auto", output_loading_info=True)
    if any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        problems.append(f"the written checkpoint does not fit its own config: {info}")
    # what it says without an image
    vocab_size = logits.shape[-1]
    difference = text_logits(model, vocab_size)[..., :vocab_size] - logits
    error = (difference.norm() / logits.norm()).item()
    if not error <= (0 if exact else LOGITS_TOLERANCE):
        allowed = "they must be equal bit by bit" if exact else f"allowed is {LOGITS_TOLERANCE}"
        problems.append(f"the logits differ from the text model's by {error:.2e} of their norm; {allowed}.")
    require(not problems, f"verification: {' '.join(problems)}")
    counts = Counter("vision" if name.startswith(VISION_PREFIX) else "text" for name in weights)
    return [
        *(f"{part}: {n} tensors equal to the source" for part, n in sorted(counts.items(), reverse=True)),
        "the folder loads without missing or unexpected keys",
        f"text logits {tuple(logits.shape)}: "
        + ("equal bit by bit" if error == 0 else f"differ by {error:.1e} of their norm"),
    ]
