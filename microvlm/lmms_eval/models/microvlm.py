"""Give lmms-eval the model: --model microvlm --model_args pretrained=."""

from lmms_eval.api.model import lmms
from lmms_eval.api.registry import register_model
from tqdm import tqdm

from microvlm.lmms_eval.captioner import Captioner


@register_model("microvlm")
class MicroVLM(lmms):
    """Score a checkpoint of MicroVLM, a folder or a Hub id, in one process."""

    def __init__(
        self,
        pretrained: str = ".",
        revision: str | None = None,
        dtype: str = "float32",
        device: str | None = None,
        batch_size: int | str = 16,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.captioner = Captioner(pretrained, revision, dtype, device)
        self.batch_size_per_gpu = int(batch_size)

    @property
    def batch_size(self) -> int:
        return self.batch_size_per_gpu

    @property
    def device(self):
        return self.captioner.model.device

    def images(self, task: str, split: str, doc_id: int, doc_to_visual) -> list:
        """Open the images of a row of a task."""
        return list(doc_to_visual(self.task_dict[task][split][doc_id]) or [])

    def generate_until(self, requests) -> list[str]:
        """Answer requests (context, generation arguments, doc_to_visual, doc_id, task, split), in their order."""
        # requests with equal arguments share batches
        groups, answers = {}, [""] * len(requests)
        for place, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(place)
        batches = [p[s : s + self.batch_size] for p in groups.values() for s in range(0, len(p), self.batch_size)]
        for places in tqdm(batches, desc="captions"):
            arguments = [requests[place].args for place in places]
            images = [self.images(task, split, doc_id, visual) for _, _, visual, doc_id, task, split in arguments]
            texts = self.captioner.generate([a[0] for a in arguments], images, **dict(arguments[0][1]))
            for place, text in zip(places, texts, strict=True):
                answers[place] = text
                self.cache_hook.add_partial("generate_until", requests[place].args[:2], text)
        return answers

    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
        """Compute each continuation's log-probability and whether it is the greedy one.

        Requests are (context, continuation or doc_to_target, doc_to_visual, doc_id, task, split).
        """
        results = []
        for context, target, doc_to_visual, doc_id, task, split in tqdm([r.args for r in requests], desc="likelihoods"):
            text = target if isinstance(target, str) else target(self.task_dict[task][split][doc_id])
            images = self.images(task, split, doc_id, doc_to_visual)
            results.append(self.captioner.loglikelihood(context, text, images))
        return results

    def generate_until_multi_round(self, requests) -> list[str]:
        raise NotImplementedError("MicroVLM answers one question at a time: tasks of several rounds are not scored.")
