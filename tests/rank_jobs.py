"""What the ranks of one launch do for tests/test_ranks.py: recipes, one after the other.

    torchrun --nproc_per_node 2 tests/rank_jobs.py jobs.json

A job has a `name`, the `argv` of `train_hf.main`, and perhaps `stop`: [rank, checkpoint], a rank that gets SIGTERM as
soon as that
checkpoint is complete, or `poison`: [rank, n], a rank whose n-th batch is of pictures that are not numbers. Every
rank leaves NAME_rankR.json beside jobs.json: how the job ended, a digest of the rank's weights after
training, and the rows of its batches.
"""

import hashlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from conftest import ROOT  # noqa: F401  puts the project on the path

import train_hf
from microvlm.train import trainer
from microvlm.train.checkpoints import is_complete
from microvlm.train.data import TrackedCollator
from microvlm.train.trainer import MicroVLMTrainer

RANK = int(os.environ["RANK"])


class RecordingCollator(TrackedCollator):
    batches: list[list[str]] = []
    poisoned: int | None = None

    def __call__(self, rows):
        batch = super().__call__(rows)
        if len(self.batches) == self.poisoned:
            batch["pixel_values"].fill_(torch.nan)
        self.batches.append(batch["row_names"])
        return batch


class DigestTrainer(MicroVLMTrainer):
    digest: str | None = None

    def train(self, *args, **kwargs):
        output = super().train(*args, **kwargs)
        found = hashlib.sha256()
        for _, tensor in sorted(self.model.state_dict().items()):
            tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        DigestTrainer.digest = found.hexdigest()
        return output


def allow_fsdp_on_cpu() -> None:
    """accelerate 1.15 shards on accelerators only: on CPUs it drops the settings without a word and takes DDP."""
    init = AcceleratorState.__init__

    def init_and_shard(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init_and_shard


def terminate_after(checkpoint: Path) -> None:
    while not is_complete(checkpoint):
        time.sleep(0.005)
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    trainer.TrackedCollator, train_hf.MicroVLMTrainer = RecordingCollator, DigestTrainer
    if os.environ.get("ACCELERATE_USE_FSDP"):
        allow_fsdp_on_cpu()
    file = Path(sys.argv[1])
    for job in json.loads(file.read_text()):
        RecordingCollator.batches, DigestTrainer.digest, ended = [], None, "done"
        rank, checkpoint = job.get("stop", (None, None))
        if rank == RANK:
            threading.Thread(target=terminate_after, args=(Path(checkpoint),), daemon=True).start()
        rank, batch = job.get("poison", (None, None))
        RecordingCollator.poisoned = batch if rank == RANK else None
        start = time.perf_counter()
        try:
            train_hf.main(job["argv"])
        except SystemExit as error:
            ended = error.code
        except (ValueError, OSError) as error:
            ended = f"{type(error).__name__}: {error}"
        report = {"ended": ended, "digest": DigestTrainer.digest, "batches": RecordingCollator.batches}
        report["seconds"] = round(time.perf_counter() - start, 2)
        (file.parent / f"{job['name']}_rank{RANK}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
