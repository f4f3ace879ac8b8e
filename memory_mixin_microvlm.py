"""The episodic memory in the model: what a batch asks it, how it joins a forward pass, and the verbs that change it.

`MemoryReader` is mixed into `MicroVLMModel`, `MemoryMixin` into `MicroVLMForConditionalGeneration`:

    image or words -> MemoryQuery    get_memory_query
    query, state   -> MemoryReadout  read_memory
    read-out       -> MemoryCache    attach_memory: keys and values of S tokens next to the text's
    image and text -> MemoryState    write_memory, edit_memory, forget

The model holds no state: every verb takes a `MemoryState` and returns another. B rows ask R memories, R = 1 or R = B.
"""

import hashlib
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache, DynamicCache, initialization as init

from .cache_microvlm import CACHE_NAME, MemoryCache
from .configuration_microvlm import require
from .memory_microvlm import (
    EpisodicMemory,
    MemoryContentEncoder,
    MemoryCopy,
    MemoryProjection,
    MemoryQuery,
    MemoryReadout,
    MemoryWords,
    in_float32,
    scope_threshold,
)
from .memory_posterior_microvlm import address_kl
from .memory_state_microvlm import MemoryState
from .quantization_microvlm import present, versions

# Values of the memory's config on which addresses, contents and the posterior depend, next to the weights.
FINGERPRINT_FIELDS = (
    *("num_slots", "code_size", "num_content_slots", "max_content_tokens", "addressing", "address_ridge"),
    *("address_temperature", "ben_cohen_steps", "observation_noise", "ordering", "gray_weight"),
)


def init_memory_weights(module: nn.Module, std: float) -> None:
    """Initialise a module of the memory; others are left alone."""
    if isinstance(module, EpisodicMemory):
        init.orthogonal_(module.reference)
        init.constant_(module.address_log_variance, -6.0)
        init.zeros_(module.key_encoder.feature_mean)
        init.ones_(module.key_encoder.feature_std)
        init.ones_(module.word_weight)
        for linear in (module.key_encoder.image_skip, module.key_encoder.image_fc1):
            init.xavier_uniform_(linear.weight)
    elif isinstance(module, MemoryContentEncoder):
        if module.slot_queries is not None:
            S, L = module.position_bias.shape
            init.normal_(module.slot_queries, std=std)
            distance = (torch.arange(S).view(-1, 1) - torch.arange(L)).abs().clamp(max=1)  # (S, L)
            init.copy_(module.position_bias, -6.0 * distance)
        init.copy_(module.v_proj.weight, torch.eye(*module.v_proj.weight.shape))
    elif isinstance(module, MemoryProjection):
        init.normal_(module.token_bias, std=0.2)
        init.xavier_uniform_(module.up.weight)
    elif isinstance(module, MemoryCopy):
        init.normal_(module.place, std=0.5)
        init.constant_(module.log_sharpness, 3.0)
        init.zeros_(module.gate.weight)
    elif isinstance(module, nn.LSTM):
        for parameter in module.parameters():
            init.uniform_(parameter, -(module.hidden_size**-0.5), module.hidden_size**-0.5)


def check_memory_arguments(memory, gate, readout=None) -> None:
    """Refuse a gate without a memory, and a memory next to a read-out of one."""
    both = "You cannot specify both memory and memory_readout at the same time"
    require(memory is None or readout is None, both)
    alone = "memory_gate is for a memory, which was not given: a cache keeps the one it has, with its gate."
    require(memory is not None or (isinstance(gate, str) and gate == "auto"), alone)


def question_mask(attention_mask: torch.Tensor | None, labels: torch.Tensor | None) -> torch.Tensor | None:
    """Mask (B, T) of the text that asks a memory: labelled positions are the answer."""
    if labels is None:
        return attention_mask
    return (labels == -100) & (True if attention_mask is None else attention_mask.bool())


def without_placeholders(labels: torch.LongTensor, placeholders: torch.BoolTensor, kwargs: dict) -> torch.LongTensor:
    """Take image placeholders out of labels (B, T), and their share out of what `Trainer` has counted."""
    kept, number = labels.masked_fill(placeholders, -100), kwargs.get("num_items_in_batch")
    if number is not None:
        left, counted = ((t[:, 1:] != -100).sum() for t in (kept, labels))
        kwargs["num_items_in_batch"] = (number * (left / counted.clamp(min=1))).clamp(min=1)
    if (shifted := kwargs.get("shift_labels")) is not None:
        after = F.pad(placeholders[:, 1:], (0, 1))[:, -shifted.shape[1] :]  # with `logits_to_keep` the last ones
        kwargs["shift_labels"] = shifted.masked_fill(after, -100)
    return kept


def memory_outputs(readout: MemoryReadout | None) -> dict[str, torch.Tensor]:
    """Name what a forward pass returns of a read-out."""
    if readout is None:
        return {}
    return {
        "scope_probability": readout.scope_logits.sigmoid(),
        "scope_logits": readout.scope_logits,
        "memory_content": readout.content,
        "memory_kl": readout.memory_kl,
        "address_kl": readout.address_kl,
    }


def fingerprint_bytes(name: str, value: torch.Tensor) -> bytes:
    """Return what a fingerprint takes of a weight: its name and its bfloat16 values, the same in both widths."""
    readable = isinstance(value, torch.Tensor) and not value.is_meta and not value.is_quantized
    advice = "open memory, vision tower and token embeddings as ordinary weights."
    require(readable, f"this form of the model has no memory, {name} is no tensor of numbers: {advice}")
    if value.ndim == 0 and not value.is_floating_point():  # BatchNorm's count of batches, a format of bitsandbytes
        return b""
    value = getattr(value, "full_tensor", lambda: value)().to(torch.bfloat16)  # of a DTensor
    name = name.removesuffix(".weight") if name.startswith("embeddings.") else name
    return name.encode() + value.cpu().flatten().view(torch.uint8).numpy().tobytes()


class MemoryReader:
    """Ask a memory and attach what it says to the text's cache: the part of `MicroVLMModel`."""

    def get_text_mask(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None, is_fact: bool = False
    ) -> torch.BoolTensor:
        """Mask (B, T) of words: no padding, placeholders or control tokens of the prompt.

        The attention mask is (B, T), or (B, past + T) with what a cache holds. A fact has no prompt: all words count.
        """
        # control tokens
        text, prompt = self.config.text_config, self.config.default_prompt_ids or []
        control = {self.config.image_token_id, *([] if is_fact and self.config.prompt_has_words else prompt)}
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(text, name, None)
            control.update(value if isinstance(value, (list, tuple)) else [value] if value is not None else [])
        mask = ~torch.isin(input_ids, torch.tensor(sorted(control), device=input_ids.device))
        return mask if attention_mask is None else mask & attention_mask[:, -input_ids.shape[1] :].bool()

    def get_memory_query(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None,
        vision_features: torch.FloatTensor | None,
    ) -> MemoryQuery:
        """Make the query of B rows: the mean key of a row's images, or its words without any.

        The text is (B, T), the features of all images (N, 1 + patches, vision width).
        """
        per_row = self.count_images(input_ids)  # (B,)
        placeholders, images = int(per_row.sum()), 0 if vision_features is None else len(vision_features)
        require(placeholders == images, f"The text has placeholders for {placeholders} images, {images} were given.")
        # keys of the images, summed over those of a row
        shape = (len(per_row), self.config.memory_config.code_size)
        keys = torch.zeros(shape, dtype=torch.float32, device=input_ids.device)  # (B, C)
        if images:
            image_keys = self.memory.image_keys(vision_features, self.vision_tower.num_prefix_tokens)  # (N, C)
            owner = torch.arange(len(per_row), device=per_row.device).repeat_interleave(per_row)  # (N,)
            keys = F.normalize(keys.index_add(0, owner, image_keys), dim=-1)
        if bool((per_row > 0).all()):
            return MemoryQuery(keys)
        # words of the rows without an image, moved to the front in their order
        mask = self.get_text_mask(input_ids, attention_mask) & (per_row == 0).unsqueeze(1)
        place = (~mask).long().argsort(dim=1, stable=True)[:, : max(1, int(mask.sum(1).max()))]
        ids, mask = input_ids.gather(1, place), mask.gather(1, place)  # (B, words)
        words = self.memory.words(self.get_input_embeddings()(ids))  # (B, words, C)
        return MemoryQuery(keys, words, self.memory.weigh_words(ids) * mask)

    def scope_threshold(self, memory: MemoryState, by_words: bool = False) -> torch.Tensor:
        """Probability (R,) from which each memory applies to an image, or to a question in words."""
        config = self.config.memory_config
        return scope_threshold(config.word_threshold if by_words else config.scope_threshold, memory.counts)

    def read_memory(
        self, memory: MemoryState, query: MemoryQuery, gate: str | torch.Tensor = "auto", kl: bool = True
    ) -> MemoryReadout:
        """Read what a memory adds to a forward pass of B rows.

        Args:
            memory: R rows; every B / R neighbouring rows of the query ask one of them.
            query: of `get_memory_query`.
            gate: `auto` (ScopeNet: soft in training, hard by the config's threshold in eval), `on`, `off`, a boolean
                or a weight in [0, 1], or one per row (B,).
            kl: also compute the two KL terms, which generation does without.
        """
        read, addresses = self.memory.read(memory, query)
        scope = in_float32(self.scope, query.keys, read.statistics.flatten(0, 1))  # (B,)
        log_gate = self._log_gate(memory, query, scope, gate)
        content = read.content.flatten(0, 1)  # (B, S x C)
        slots = content.view(len(scope), self.config.memory_config.num_content_slots, -1)
        words = None
        if self.memory_copy is not None:
            words = MemoryWords.of(slots, self.memory.vocabulary(self.get_input_embeddings()))
        with present(self.memory):
            return MemoryReadout(
                key_values=self.memory_projection(content.to(self.memory_projection.token_bias.dtype)),
                layers=self.config.full_attention_layers,
                log_gate=log_gate,
                scope_logits=scope,
                content=slots,
                words=words,
                address=addresses.flatten(0, 1),
                memory_kl=memory.kl().mean().float().to(scope.device) if kl else None,
                address_kl=address_kl(addresses, self.memory.address_log_variance.float()).mean() if kl else None,
            )

    def _log_gate(self, memory: MemoryState, query: MemoryQuery, scope: torch.Tensor, gate) -> torch.Tensor:
        """Log of the gate (B,), from 0 for on to -inf for off; scope logits (B,)."""
        B, queries = len(scope), len(scope) // memory.num_rows  # in all, and to each memory
        if isinstance(gate, (bool, int, float)):  # the same for all rows
            gate = torch.full((B,), float(gate), dtype=torch.float32, device="cpu")
        # weights of the caller, ScopeNet's own, or on and off
        if isinstance(gate, torch.Tensor):
            require(gate.shape == (B,), f"memory_gate has the shape {tuple(gate.shape)}, expected ({B},).")
            gate = gate.to(scope.device, torch.float32)
            require(bool(((gate >= 0) & (gate <= 1)).all()), "memory_gate must lie between 0 and 1.")
            log_gate = gate.log()
        elif gate == "auto" and self.training:
            log_gate = F.logsigmoid(scope)
        else:
            known = gate in ("auto", "on", "off")
            require(known, f"memory_gate must be 'auto', 'on', 'off' or a tensor, got {gate!r}.")
            on = torch.full_like(scope, gate == "on", dtype=torch.bool)
            if gate == "auto":
                thresholds = (self.scope_threshold(memory, by_words) for by_words in (True, False))
                thresholds = (t.to(scope.device).repeat_interleave(queries) for t in thresholds)
                on = scope.sigmoid() >= torch.where(query.by_words, *thresholds)
            log_gate = torch.zeros_like(scope).masked_fill(~on, -torch.inf)
        # an empty memory is off
        empty = (memory.counts == 0).repeat_interleave(queries)
        return log_gate.masked_fill(empty.to(log_gate.device), -torch.inf)

    @property
    def _is_checkpointing(self) -> bool:
        on = self.training and getattr(self.language_model, "gradient_checkpointing", False)
        return on and (CACHE_NAME == "past_key_values" or torch.is_grad_enabled())  # 5.23 does without gradients, too

    def attach_memory(
        self, readout: MemoryReadout, cache: Cache | None, use_cache: bool | None
    ) -> tuple[MemoryCache, bool | None]:
        """Put a read-out into the cache of a pass; returns it, and whether it keeps the text."""
        layers, text_config = self.language_model.layers, self.config.text_config
        checkpointing = self._is_checkpointing
        paged = f"a memory cannot join a {type(cache).__name__}: generate_batch() has none, generate(memory=...) has."
        require(isinstance(cache, Cache | None), paged)
        if checkpointing:
            options = (getattr(m._gradient_checkpointing_func, "keywords", {}) for m in layers)
            reentrant = any(keywords.get("use_reentrant") is True for keywords in options)
            needs = "gradient checkpointing with a memory needs"
            require(cache is None, f"{needs} a pass without a cache.")
            require(not reentrant, f"{needs} use_reentrant=False: all layers share the memory's graph.")
        # a new cache
        if cache is None:
            use_cache = getattr(text_config, "use_cache", True) if use_cache is None else use_cache
            if use_cache and not checkpointing:
                return MemoryCache(DynamicCache(config=text_config), readout), True
            return MemoryCache.read_only(len(layers), readout), False
        # the caller's cache
        if not hasattr(cache, "attach"):
            return MemoryCache(cache, readout), use_cache
        cache.attach(readout)
        return cache, use_cache

    def reaching_all(self, loss: torch.FloatTensor) -> torch.FloatTensor:
        """Give what a loss leaves out a gradient of 0: with checkpointing, `Trainer` makes DDP wait for all."""
        if not (self._is_checkpointing and torch.distributed.is_initialized()):
            return loss
        return loss + sum(p.flatten()[:0].sum().to(loss.device) for p in self.parameters() if p.requires_grad)

    @contextmanager
    def replaying_memory(self, cache: Cache | None):
        """Let checkpointed layers keep a read-only cache, so that their replay reads the memory again."""
        replay = self._is_checkpointing and getattr(cache, "is_read_only", False)
        layers = self.language_model.layers if replay else []
        for layer in layers:
            layer._can_checkpoint_with_cache = True  # of GradientCheckpointingLayer, transformers 5.23 and 5.24
        try:
            yield
        finally:
            for layer in layers:
                del layer._can_checkpoint_with_cache  # the class says no


class MemoryMixin:
    """Make, write, read and change memories: the part of `MicroVLMForConditionalGeneration`."""

    def require_memory(self) -> EpisodicMemory:
        missing = "this model has no episodic memory: build it with config.use_memory=True."
        require(self.model.memory is not None, missing)
        sharded = "a model that fully_shard() split has no memory: it has its weights for a pass only. Open it whole."
        require(not hasattr(self, "unshard"), sharded)
        return self.model.memory

    def train(self, mode: bool = True):
        """Like `super()`; the fingerprint is computed again afterwards."""
        self._fingerprint = (None,)
        for name, module in self.named_modules():
            if hasattr(module, "support_avx512bf16_for_cpu") and "language_model" not in name:
                module.support_avx512bf16_for_cpu = False  # the first pass would change 4 bits, and so the fingerprint
        return super().train(mode)

    def memory_fingerprint(self) -> str:
        """Digest all that makes addresses and contents: a memory is of models with the same digest.

        The decoder's layers are not in it: fine-tuning them leaves stored memories readable.
        """
        # words, keys and contents
        parts = {"embeddings": self.get_input_embeddings(), "memory": self.require_memory()}
        parts["vision_tower"] = self.model.vision_tower
        fields = tuple((name, getattr(self.config.memory_config, name)) for name in FINGERPRINT_FIELDS)
        # hash again only when a tensor was written to
        key = fields, versions(t for part in parts.values() for t in (*part.parameters(), *part.buffers()))
        if getattr(self, "_fingerprint", (None,))[0] != key:
            digest = hashlib.sha256(repr(fields).encode())
            with present(*parts.values()):
                for part, module in parts.items():
                    for name, value in sorted(module.state_dict(prefix=f"{part}.").items()):
                        digest.update(fingerprint_bytes(name, value))
            self._fingerprint = key, digest.hexdigest()[:32]
        return self._fingerprint[1]

    @torch.no_grad()
    def new_memory(self, batch_size: int = 1) -> MemoryState:
        """Make empty memories, one per row; one row serves any number of queries."""
        fingerprint, device = self.memory_fingerprint(), self.model.memory.prepared().device
        device = "cpu" if device.type == "mps" else device  # which has no float64
        return self.model.memory.new_state(batch_size, fingerprint, device=device)

    @torch.no_grad()
    def load_memory(self, path: str) -> MemoryState:
        """Open a memory that this model has saved; see `MemoryState.load` for what else is checked."""
        expected = self.new_memory()
        memory = MemoryState.load(path, expected, expected.device)
        # what is shown is what is spoken: sentences, where they were kept, give the contents
        told = memory.active & (memory.token_ids[..., 0] >= 0)
        ids, kept, refused = memory.token_ids[told], memory.contents[told], f"memory file {path} is refused"
        known = bool((ids < self.config.text_config.vocab_size).all())
        require(known, f"{refused}: it has token ids beyond the vocabulary.")
        contents = self.encode_contents(ids.to(self.model.memory.prepared().device)).to(kept) if len(ids) else kept
        same = ((contents - kept).norm(dim=-1) <= 0.05 * kept.norm(dim=-1)).all()  # other weight formats: 0.002
        require(bool(same), f"{refused}: a sentence is not what its content says.")
        return memory

    def _check_memory(self, memory: MemoryState, batch_size: int | None = None) -> None:
        """Refuse what is no memory of this model, or of another number of rows."""
        if not all(hasattr(memory, name) for name in MemoryState.TENSORS):  # or of another copy of this code
            raise TypeError(f"memory must be a MemoryState, got {type(memory).__name__}: load_memory() opens a file.")
        theirs, own, rows = memory.fingerprint, self.memory_fingerprint(), memory.num_rows
        another = f"the memory was written by another model: its fingerprint is {theirs}, this model's {own}."
        require(theirs == own, another)
        fits = batch_size is None or rows in (1, batch_size)
        require(fits, f"the memory has {rows} rows, the batch {batch_size}: they must agree, or be one.")

    def ask_memory(
        self,
        memory: MemoryState,
        gate: str | torch.Tensor,
        input_ids: torch.LongTensor | None,
        attention_mask: torch.Tensor | None,
        image,
        kl: bool = True,
    ) -> MemoryReadout:
        """Read a memory for B rows, by the encoded images of the batch or the words (B, T) of a row without any."""
        self.require_memory()
        no_ids = "reading a memory needs input_ids: inputs_embeds alone do not say which row owns an image."
        require(input_ids is not None, no_ids)
        self._check_memory(memory, len(input_ids))
        features = None if image is None else image.last_hidden_state  # (N, 1 + patches, vision width)
        query = self.model.get_memory_query(input_ids, attention_mask, features)
        return self.model.read_memory(memory, query, gate, kl)

    @torch.no_grad()
    def write_memory(
        self,
        memory: MemoryState | None = None,
        *,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        mm_encoder_outputs: dict | None = None,
        labels: list[str] | None = None,
    ) -> MemoryState:
        """Store B facts, an image and a sentence each: `write_memory(**processor(images=..., text=...))`.

        Args:
            memory: where to; unchanged. One row takes all facts, more rows one each. Default: a new memory of one row.
            input_ids: (B, T), one image's placeholders, which give the address, and the words, which give the content.
            attention_mask: (B, T).
            pixel_values: (B, 3, height, width), or `mm_encoder_outputs` with `image` and, if
                `memory_config.gray_weight` is not 0, `gray`: `get_image_features` of the images and their grey copies.
            labels: names to find the facts by; default: none, they go by number.
        """
        B, encoder = len(input_ids), self.require_memory()
        # dropout and noise would not be in the receipts
        require(not self.training, "write_memory needs the model in evaluation mode: call eval() first.")
        memory = self.new_memory() if memory is None else memory
        self._check_memory(memory, B)
        require(labels is None or len(labels) == B, f"{len(labels or [])} labels for {B} facts.")
        require(B > 0, "The batch is empty: input_ids has no rows.")
        # words and images
        contents, token_ids = self._encode_words(input_ids, attention_mask)
        keys = encoder.written_keys(*self._encode_images(input_ids, pixel_values, mm_encoder_outputs))
        # all facts to one row, or one to each
        R = memory.num_rows
        names = [""] * B if labels is None else list(labels)
        names = [names] if R == 1 else [[name] for name in names]
        keys, contents, token_ids = (t.view(R, B // R, -1) for t in (keys, contents, token_ids))
        return encoder.write(memory, keys, contents, names, token_ids=token_ids)

    def _encode_images(self, input_ids, pixel_values, mm_encoder_outputs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Keys (B, C) of the facts' images, and of their grey copies if the config asks for them."""
        # one image a row
        for row, count in enumerate(self.model.count_images(input_ids).tolist()):
            require(count == 1, f"row {row} has {count} images: a fact to write is one image and its words.")
        image, gray = self.model.encode_images(pixel_values, mm_encoder_outputs), None
        require(image is not None, "the text has placeholders, but there are no images: give pixel_values.")
        # its grey copy
        if self.config.memory_config.gray_weight:
            if pixel_values is not None:
                gray = self.model.encode_images(pixel_values.mean(1, keepdim=True).expand_as(pixel_values))
            else:
                gray = mm_encoder_outputs.get("gray")
            require(gray is not None, "mm_encoder_outputs lacks `gray`: a key to write needs the images in grey, too.")
        features = (None if encoded is None else encoded.last_hidden_state for encoded in (image, gray))
        return tuple(None if f is None else self.model.get_memory_query(input_ids, None, f).keys for f in features)

    def _encode_words(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Contents (B, S x C) of the rows' words and an end token; and these tokens (B, L), then -1."""
        # room for words and an end token
        words = self.model.get_text_mask(input_ids, attention_mask, is_fact=True)
        L = self.config.memory_config.max_content_tokens
        eos = self.config.text_config.eos_token_id
        eos = eos[0] if isinstance(eos, (list, tuple)) else eos
        room, lengths = L - (eos is not None), words.sum(1)
        # as many as there is room for
        for row, length in enumerate(lengths.tolist()):
            require(length > 0, f"row {row} has no words: a fact to write is one image and its words.")
            require(length <= room, f"row {row} has {length} tokens of words, at most {room} can be stored.")
        # what was typed as a control token would be left out
        within = (words.cumsum(1) > 0) & (words.flip(1).cumsum(1).flip(1) > 0)
        typed = (within & ~words & (input_ids != self.config.image_token_id)).any(1)
        advice = "write it as text, by tokenizer(..., split_special_tokens=True)."
        require(not typed.any(), f"a sentence has a control token between its words: {advice}")
        # words to the front in their order, then the end token, then -1
        order = (~words).long().argsort(dim=1, stable=True)
        packed = F.pad(input_ids.gather(1, order), (0, L))[:, :L]
        place = torch.arange(L, device=input_ids.device)
        token_ids = torch.where(place < lengths.unsqueeze(1), packed, -1)
        if eos is not None:
            token_ids[place == lengths.unsqueeze(1)] = eos
        return self.encode_contents(token_ids), token_ids

    def encode_contents(self, token_ids: torch.LongTensor) -> torch.Tensor:
        """Contents (N, S x C) of sentences (N, L), -1 after their end."""
        token_ids = token_ids[:, : max(1, int((token_ids >= 0).sum(1).max()))]
        embeddings = self.get_input_embeddings()(token_ids.clamp(min=0))  # (N, length, D)
        return self.model.memory.contents(embeddings, token_ids >= 0)

    def forget(self, memory: MemoryState, item: int | str, row: int | None = None) -> MemoryState:
        """Return the memory as if an item had never been written.

        `item` is a number in `memory.describe()`, or a label; a ValueError if it is not there.
        """
        self._check_memory(memory)
        return memory.forget(item, row)

    @torch.no_grad()
    def edit_memory(
        self,
        memory: MemoryState,
        item: int | str,
        input_ids: torch.LongTensor,
        row: int | None = None,
        label: str = "",
        attention_mask: torch.Tensor | None = None,
    ) -> MemoryState:
        """Put other words (1, T) and another label under the address of an item; refuses as `write_memory`."""
        self._check_memory(memory)
        require(len(input_ids) == 1, f"an item is edited to one sentence, got {len(input_ids)}.")
        contents, token_ids = self._encode_words(input_ids, attention_mask)
        return memory.edit(item, contents[0].to(memory.device), label, row, token_ids[0].to(memory.device))
