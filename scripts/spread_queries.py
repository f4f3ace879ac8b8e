"""Spread the attention of an adapter whose queries have stayed alike: every query's distance from their mean grows by a factor.

    python scripts/spread_queries.py runs/nano_stage2 --logits 1.0 --data data/mini/validation.parquet

The queries begin small, so that each prefix token starts as the mean of all patches. With little training they can stay there: all of them look at the
same places. `q_proj` is changed so that the mean query is as before and the others' distance from it is so much larger that the attention logits of different
queries differ by `--logits` (root mean square, before the softmax, over pictures of `--data`). Written in place, by rename; train on.
"""

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from transformers import AutoModelForImageTextToText, AutoProcessor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from caption import replacing  # noqa: E402
from data_microvlm import decode_row, load_rows  # noqa: E402


@torch.inference_mode()
def spread(adapter, patches: torch.Tensor, logits: float) -> float:
    """Change `q_proj` of an adapter in place for patch features (N, patches, vision width); returns the factor."""
    heads = lambda t: t.unflatten(-1, (adapter.num_heads, adapter.head_dim)).transpose(-3, -2)  # noqa: E731
    queries, keys = adapter.query_tokens, adapter.k_proj(adapter.project(patches))
    apart = (queries - queries.mean(0)) @ adapter.q_proj.weight.T
    differences = heads(apart) @ heads(keys).mT / adapter.head_dim**0.5  # (N, heads, P, patches)
    differences = differences - differences.mean(-1, keepdim=True)  # what all patches share, the softmax takes away
    factor = logits / float(differences.square().mean().sqrt())
    adapter.q_proj.bias += (1 - factor) * (queries.mean(0) @ adapter.q_proj.weight.T)
    adapter.q_proj.weight *= factor
    return factor


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--logits", type=float, default=1.0)
    parser.add_argument("--data", required=True)
    parser.add_argument("--pictures", type=int, default=64)
    options = parser.parse_args(arguments)
    model = AutoModelForImageTextToText.from_pretrained(options.checkpoint, trust_remote_code=True, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(options.checkpoint, trust_remote_code=True)
    rows = load_rows(options.data, limit=options.pictures)
    pictures = [decode_row(row, processor.image_processor)[0] for row in rows]
    pixel_values = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        features = model.eval().get_image_features(pixel_values, return_dict=True).last_hidden_state
    factor = spread(model.model.adapter, features[:, model.model.vision_tower.num_prefix_tokens :], options.logits)
    file = options.checkpoint / "model.safetensors"
    tensors = load_file(file)
    for name in ("weight", "bias"):
        old = tensors[f"model.adapter.q_proj.{name}"]
        tensors[f"model.adapter.q_proj.{name}"] = getattr(model.model.adapter.q_proj, name).detach().to(old.dtype)
    with replacing(str(file), "wb") as whole:
        whole.write(save(tensors, metadata={"format": "pt"}))
    print(f"the queries of {options.checkpoint} are {factor:.1f} times as far apart")


if __name__ == "__main__":
    main()
