"""What the memory costs beside the prefill of V's full-size shape: reading and projecting, and the longer attention.

    python benchmarks/memory_overhead.py
    python benchmarks/memory_overhead.py --config configs/microvlm-nano.json --repeats 31

Random weights in bf16, a memory with K facts in it, one picture and a short question. By turns, medians: `prefill`, the forward pass of the
prompt without memory, from encoded pictures; `read`, key, address, read-out, scope and projection; `prefill with memory`, the same
forward with the read-out attached; `write` and `forget`, one fact, without the vision tower.
"""

import argparse
import time
from collections import defaultdict
from statistics import median

import torch
from parameters import ROOT, MicroVLMForConditionalGeneration, load_config, markdown_table


@torch.inference_mode()
def measure(config: str, repeats: int) -> dict[str, float]:
    """Median milliseconds of every part."""
    torch.manual_seed(0)
    loaded = load_config(config)
    model = MicroVLMForConditionalGeneration._from_config(loaded, dtype=torch.bfloat16).eval()
    P, K, image_token = loaded.num_prefix_tokens, loaded.memory_config.num_slots, loaded.image_token_id
    words = torch.randint(5, 1000, (1, 16))
    ids = torch.cat([torch.full((1, P), image_token), words], 1)
    size = model.model.vision_tower.timm_model.patch_embed.img_size
    image = model.get_image_features(torch.randn(1, 3, *size, dtype=torch.bfloat16), return_dict=True)
    encoded, memory = {"image": image}, model.new_memory()
    addresses = torch.nn.functional.normalize(torch.randn(1, K, K), dim=-1)
    memory = memory.write(addresses, torch.randn(1, K, memory.mean.shape[2]), method="direct")
    forward = lambda **kwargs: model(input_ids=ids, mm_encoder_outputs=encoded, use_cache=True, **kwargs)  # noqa: E731
    query = lambda: model.model.get_memory_query(ids, None, image.last_hidden_state)  # noqa: E731
    readout = model.model.read_memory(memory, query(), "on")
    to_write = encoded | {"gray": image}
    written = model.write_memory(memory, input_ids=ids, mm_encoder_outputs=to_write)
    parts = {
        "prefill": forward,
        "read": lambda: model.model.read_memory(memory, query(), "on", kl=False),
        "prefill with memory": lambda: forward(memory_readout=readout),
        "write": lambda: model.write_memory(memory, input_ids=ids, mm_encoder_outputs=to_write),
        "forget": lambda: model.forget(written, K),
    }
    times = defaultdict(list)
    for round in range(repeats + 2):
        for name, run in parts.items():
            start = time.perf_counter()
            run()
            if round >= 2:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "configs/microvlm-v.json"))
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    times = measure(options.config, options.repeats)
    rows = [[name, f"{value:.2f}", f"{value / times['prefill']:.1%}"] for name, value in times.items()]
    print(markdown_table(["part", "ms (median)", "of the prefill"], rows))


if __name__ == "__main__":
    main()
