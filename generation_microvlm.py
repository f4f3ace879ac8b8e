"""Generation: what `generate()` of transformers needs to know of images, of a memory, and of large vocabularies.

A memory is read once, before the first token; its read-out goes into the cache (`MemoryCache`), or, without a cache,
into every pass. A conversation that continues from a cache takes only the images that the cache does not hold.
"""

import math
from contextlib import nullcontext

import torch
from transformers import GenerationMixin
from transformers.generation.logits_process import (
    LogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    SuppressTokensLogitsProcessor,
)
from transformers.masking_utils import create_masks_for_generate

from .cache_microvlm import CACHE_NAME, MemoryCache, one_cache
from .configuration_microvlm import require
from .memory_mixin_microvlm import check_memory_arguments
from .memory_state_microvlm import MemoryState
from .threads_microvlm import kernel_threads

INDEXED = (MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor, SuppressTokensLogitsProcessor)


class IndexedProcessor(LogitsProcessor):
    """Set the scores of some tokens to -inf by their numbers, as one of the library's processors does.

    That looks every token of the vocabulary up in the list: milliseconds per token.
    """

    def __init__(self, processor: LogitsProcessor):
        known = vars(processor)
        self.tokens = known.get("suppress_tokens", known.get("eos_token_id"))
        # of a sequence that is long enough
        self.length = known.get("prompt_length_to_skip", 0)
        self.length += known.get("min_length", known.get("min_new_tokens", math.inf))
        self.supports_continuous_batching = processor.supports_continuous_batching

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[-1] >= self.length:
            return scores
        if not hasattr(self, "inside"):  # numbers outside the vocabulary count for nothing
            self.inside = self.tokens[(self.tokens >= 0) & (self.tokens < scores.shape[-1])].to(scores.device)
        return scores.index_fill(-1, self.inside, -math.inf)


class MicroVLMGenerationMixin(GenerationMixin):
    """`generate()` with images and a memory: the part of `MicroVLMForConditionalGeneration`."""

    @torch.no_grad()
    def generate(self, inputs=None, *args, memory: MemoryState | None = None, memory_gate="auto", **kwargs):
        """Generate with what a memory knows of the images in the prompt, or of a row's words without any.

        Args:
            memory: one that all rows share, or one per row; read once, before the first token.
            memory_gate: `auto` (ScopeNet decides), `on`, `off`, or per row (B,), boolean or a weight in [0, 1].
        """
        check_memory_arguments(memory, memory_gate)
        cache = one_cache(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
        if cache is not None:
            kwargs[CACHE_NAME] = cache
        # a prompt for images without any: its words are no part of the answer
        pixel_values = kwargs.pop("pixel_values", None)
        input_ids, hidden = inputs if inputs is not None else kwargs.get("input_ids"), 0
        if input_ids is None and pixel_values is not None and kwargs.get("inputs_embeds") is None:
            kwargs["input_ids"] = input_ids = self.default_prompt(len(pixel_values), pixel_values.device)
            hidden = input_ids.shape[1] if self.config.prompt_has_words else 0
        # read the memory
        if memory is not None:
            self.require_memory()
            # encode the images once, for the memory and for the prompt
            image = self.model.encode_images(pixel_values, kwargs.get("mm_encoder_outputs"))
            if image is not None:
                kwargs["mm_encoder_outputs"] = {"image": image}
            mask = kwargs.get("attention_mask")
            kwargs["memory_readout"] = self.ask_memory(memory, memory_gate, input_ids, mask, image, kl=False)
        elif pixel_values is not None:
            kwargs["pixel_values"] = pixel_values
        with kernel_threads() if self.model.packed_decoder() is not None else nullcontext():
            output = super().generate(inputs, *args, **kwargs)
        if hidden:
            padding = self.generation_config.pad_token_id
            ids = output if isinstance(output, torch.Tensor) else output.sequences
            ids[:, :hidden] = self.config.image_token_id if padding is None else padding
        return output

    def generate_batch(self, *args, memory: MemoryState | None = None, **kwargs):
        """Generate by continuous batching like `super()`, from texts alone; it has no memory."""
        require(memory is None, "generate_batch() has no memory, its cache is paged: call generate(memory=...).")
        return super().generate_batch(*args, **kwargs)

    def default_prompt(self, batch_size: int, device: torch.device | None = None) -> torch.LongTensor:
        """Make the prompt of `generate(pixel_values=...)`, with one image a row, (batch_size, length)."""
        token, P = self.config.image_token_id, self.config.num_prefix_tokens
        ids = [i for t in self.config.default_prompt_ids or [token] for i in ([t] * P if t == token else [t])]
        return torch.tensor([ids], dtype=torch.long, device=device or self.device).expand(batch_size, -1).contiguous()

    def _get_logits_processor(self, generation_config, *args, logits_processor=None, **kwargs):
        """Like `super()`, but suppress tokens by index; the caller's own processors stay as they are."""
        processors = super()._get_logits_processor(
            generation_config, *args, logits_processor=logits_processor, **kwargs
        )
        # the library's, by those that look tokens up by index
        own = {id(processor) for processor in logits_processor or ()}
        for i, processor in enumerate(processors):
            if id(processor) not in own and type(processor) in INDEXED:
                processors[i] = IndexedProcessor(processor)
        return processors

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """Like `super()`; a read-out of a memory is put into the cache, once for each beam."""
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        readout = model_kwargs.pop("memory_readout", None)
        if readout is None:
            return
        # one row for each beam
        copies = max(generation_config.num_beams, generation_config.num_return_sequences)
        readout = readout.repeat_interleave(copies) if copies > 1 else readout
        # into the cache
        cache = model_kwargs.get(CACHE_NAME)
        if cache is None:  # use_cache=False: every step is a whole pass, and needs it again
            model_kwargs["memory_readout"] = readout
        elif hasattr(cache, "attach"):  # a MemoryCache, of any copy of this code
            cache.attach(readout)
        else:
            model_kwargs[CACHE_NAME] = MemoryCache(cache, readout)

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, past_key_values=None, cache=None, **kwargs):
        """Make the masks of a static cache ahead, unless `forward` has to append the memory's columns."""
        cache = one_cache(past_key_values, cache)
        if getattr(cache, "num_memory_tokens", 0):
            return attention_mask
        return create_masks_for_generate(config, inputs_embeds, attention_mask, cache, **kwargs)

    def prepare_inputs_for_generation(self, input_ids, next_sequence_length=None, inputs_embeds=None, **kwargs):
        """Like `super()`; a conversation that continues from its cache takes only images the cache does not hold."""
        for name in ("tokenizer", "assistant_tokenizer"):  # of stop strings: generate() hands them on to the model
            kwargs.pop(name, None)
        # are there placeholders that the cache holds?
        inputs = super().prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, inputs_embeds=inputs_embeds, **kwargs
        )
        image = (inputs.get("mm_encoder_outputs") or {}).get("image")
        length = input_ids.shape[1] if inputs_embeds is None else inputs_embeds.shape[1]
        if image is None or next_sequence_length is None or next_sequence_length >= length:
            return inputs
        # prefix tokens (N x P, D) lie in the order of their placeholders: keep those of the new positions
        prefix = torch.cat(tuple(image.pooler_output))
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        else:
            input_ids = None
        mask = self.model.get_placeholder_mask(input_ids, inputs_embeds, prefix).squeeze(-1)  # (B, T)
        order = mask.flatten().cumsum(0).view_as(mask) - 1  # which prefix token a placeholder takes
        new = order[:, -next_sequence_length:][mask[:, -next_sequence_length:]]
        image = type(image)(pooler_output=(prefix[new],)) if len(new) else None
        inputs["mm_encoder_outputs"] = {"image": image}
        return inputs
