"""Episodic memory, its learned parts: write an image and a sentence without a gradient step, and read them.

After Larimar (arXiv 2403.11901), whose memory is the generative pseudo-inverse memory of the Kanerva machine family
(arXiv 1804.01756). K slots, code width C, S content slots:

    image -> key k (C,)                         MemoryKeyEncoder
    key   -> address w (K,), unit length        EpisodicMemory.address, see `addressing_microvlm.py`
    text  -> content z (S x C,)                 MemoryContentEncoder
    write -> mean M (K, S x C), covariance Sigma (K, K)     MemoryState.write
    read  -> z_r = w M, v = w Sigma w^T         MemoryState.read
    z_r   -> keys and values of S memory tokens in every decoder layer      MemoryProjection
    z_r, v -> probability that the memory knows this query                  ScopeNet

The state is explicit: a `MemoryState` is made by the model, passed in, and returned changed; the model holds none.
docs/memory.md has the maths.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from .addressing_microvlm import address_keys, prepare_reference
from .configuration_microvlm import MicroVLMMemoryConfig, require
from .memory_posterior_microvlm import draw_address, no_autocast
from .memory_state_microvlm import MemoryRead, MemoryState
from .quantization_microvlm import Derived, present

NUM_SCOPE_STATISTICS = 9
WORD_SHARPNESS = 40.0  # of the address of a question in words
NEAREST = 8  # tokens that a slot may say


def in_float32(module: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    """Compute `module(*inputs)` in float32, whatever the dtype of its parameters, and without autocast."""
    with no_autocast(inputs[0]), present(module):
        # inputs and weights in float32
        inputs = [x.float() if x.is_floating_point() else x for x in inputs]
        tensors = dict((*module.named_parameters(), *module.named_buffers()))
        others = {name: t for name, t in tensors.items() if t.is_floating_point() and t.dtype != torch.float32}
        # packed weights take their scales as they are, and keep what they made of them
        tensors = {name: t.float() for name, t in others.items() if not name.endswith("weight_scale")}
        if not tensors:
            return module(*inputs)
        return torch.func.functional_call(module, tensors, tuple(inputs))


@dataclass
class MemoryQuery:
    """The questions of B rows to a memory: their images, or their words where a row has no image."""

    keys: torch.Tensor  # of the images, (B, C), unit length; zero where a row has none
    words: torch.Tensor | None = None  # of the rows without image, as contents, (B, T, C); None if all have one
    weights: torch.Tensor | None = None  # of the words, (B, T), zero on padding and in rows with an image

    @property
    def by_words(self) -> torch.Tensor:
        """Whether a row asks in words, (B,)."""
        if self.weights is None:
            return torch.zeros(len(self.keys), dtype=torch.bool, device=self.keys.device)
        return (self.weights > 0).any(1)


class MemoryKeyEncoder(nn.Module):
    """Images -> keys of unit length, (..., C).

    A key is made of vision features alone, never of the sentence to store, or reading would give the answer away.
    Features are standardised with training statistics (`calibrate`): raw mean-pooled features share one large
    direction and barely tell images apart.
    """

    def __init__(self, config: MicroVLMMemoryConfig, vision_size: int):
        super().__init__()
        self.register_buffer("feature_mean", torch.zeros(2 * vision_size))
        self.register_buffer("feature_std", torch.ones(2 * vision_size))
        self.dropout = nn.Dropout(config.key_dropout)
        self.image_skip = nn.Linear(2 * vision_size, config.code_size)
        self.image_fc1 = nn.Linear(2 * vision_size, config.key_hidden_size)
        self.image_fc2 = nn.Linear(config.key_hidden_size, config.code_size)

    @staticmethod
    def pool(vision_features: torch.Tensor, skip: int) -> torch.Tensor:
        """Pool features (N, skip + patches, W) to class token and mean of the patches, (N, 2 W), float32.

        Without a class token (`skip` 0, a convnet) the largest value of each channel takes its place.
        """
        x = vision_features.float()
        return torch.cat([x[:, 0] if skip else x.amax(1), x[:, skip:].mean(1)], -1)

    @torch.no_grad()
    def calibrate(self, pooled: torch.Tensor) -> None:
        """Take mean and standard deviation per channel from pooled features (N, 2 W)."""
        self.feature_mean.copy_(pooled.float().mean(0))
        self.feature_std.copy_(pooled.float().std(0).clamp(min=1e-4))

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        x = self.dropout((pooled - self.feature_mean) / self.feature_std)
        return F.normalize(self.image_skip(x) + self.image_fc2(F.gelu(self.image_fc1(x))), dim=-1)


class MemoryContentEncoder(nn.Module):
    """Token embeddings (N, L, D) with mask (N, L) -> content (N, S, C), every slot a mean of unit vectors.

    With S = L, slot s is token s. With fewer, S learned queries pool the raw embeddings, and a bias on the position
    starts slot s at token s. The projection starts as the identity where the widths allow: the decoder reads back words
    it knows.
    """

    def __init__(self, config: MicroVLMMemoryConfig, hidden_size: int):
        super().__init__()
        S, L = config.num_content_slots, config.max_content_tokens
        self.num_slots = S
        self.slot_queries = None if S == L else nn.Parameter(torch.empty(S, hidden_size))
        self.position_bias = None if S == L else nn.Parameter(torch.empty(S, L))
        self.v_proj = nn.Linear(hidden_size, config.content_size, bias=False)

    def forward(self, embeddings: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Pool to content; without a mask, return the unit vectors (..., C) of embeddings (..., D) alone."""
        value = self.v_proj(embeddings)
        # rare words weigh as much as common ones
        value = value / value.square().sum(-1, keepdim=True).add(1e-12).sqrt()
        if mask is None:
            return value
        if self.slot_queries is None:
            return F.pad(value * mask.unsqueeze(-1), (0, 0, 0, self.num_slots - value.shape[1]))
        # where each slot looks, then what it sees there
        L, T, x = self.position_bias.shape[1], embeddings.shape[1], embeddings * mask.unsqueeze(-1)
        scores = self.slot_queries @ x.mT / math.sqrt(x.shape[-1])  # (N, S, T)
        scores = F.pad(scores, (0, L - T)) + self.position_bias  # a slot past the end looks at nothing and stays zero
        return scores.softmax(-1)[..., :T] @ (value * mask.unsqueeze(-1))


class EpisodicMemory(nn.Module):
    """Addresses, and the learned parts of writing and reading."""

    def __init__(self, config: MicroVLMMemoryConfig, vision_size: int, hidden_size: int, vocab_size: int):
        super().__init__()
        self.config = config
        self.register_buffer("word_weight", torch.ones(vocab_size))
        self.key_encoder = MemoryKeyEncoder(config, vision_size)
        self.content_encoder = MemoryContentEncoder(config, hidden_size)
        self.reference = nn.Parameter(torch.empty(config.num_slots, config.code_size))  # M_ref
        self.address_log_variance = nn.Parameter(torch.empty(config.num_slots))
        self.order = None
        if config.ordering == "lstm":
            self.order = nn.LSTM(config.code_size, config.code_size // 2, bidirectional=True, batch_first=True)
        self._prepared, self._vocabulary = Derived(), Derived()

    def train(self, mode: bool = True):
        """Set the mode like `super()`, and drop what `prepared` and `vocabulary` hold."""
        # a fused optimizer changes weights without counting up their version
        self._prepared, self._vocabulary = Derived(), Derived()
        return super().train(mode)

    # ---- addresses

    def address(self, keys: torch.Tensor) -> torch.Tensor:
        """Address keys (..., C) by M_ref, to unit vectors (..., K), float32 inside any autocast.

        At unit length the prior variance of every query is 1.
        """
        with no_autocast(keys):
            w = address_keys(keys.float(), self.prepared(), self.config)
            return F.normalize(w, dim=-1)

    def prepared(self) -> torch.Tensor:
        """Prepare M_ref for its addressing, float32; without gradient only once for the same M_ref."""
        config = self.config

        def prepare() -> torch.Tensor:
            with present(self):
                return prepare_reference(self.reference.float(), config)

        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return prepare()
        options = config.addressing, config.address_ridge, config.ben_cohen_steps
        return self._prepared.get((self.reference,), prepare, *options)

    def ordered(self, keys: torch.Tensor) -> torch.Tensor:
        """Add to keys (R, E, C) what the LSTM says of their order in an episode, when there is one.

        The same transform on write and on read (a query is an episode of one), and never across rows.
        """
        if self.order is None or not keys.shape[1]:
            return keys
        return F.normalize(keys + in_float32(self.order, keys)[0], dim=-1)

    def sample(self, addresses: torch.Tensor) -> torch.Tensor:
        """Draw from the address posterior N(w, diag(exp(log variance)) / K)."""
        std = (0.5 * self.address_log_variance.float()).exp() / math.sqrt(addresses.shape[-1])
        return addresses + std * torch.randn_like(addresses)

    # ---- keys, words and contents

    def image_keys(self, vision_features: torch.Tensor, skip: int) -> torch.Tensor:
        """Encode vision features (N, skip + patches, W) to keys (N, C), float32."""
        return in_float32(self.key_encoder, self.key_encoder.pool(vision_features, skip))

    def written_keys(self, keys: torch.Tensor, gray_keys: torch.Tensor | None) -> torch.Tensor:
        """Mix keys (..., C) with those of the images' grey copies, to unit length: the keys to store under.

        The views farthest from an image are those without its colours. One look at a grey copy brings them near, and
        costs a reader nothing.
        """
        if gray_keys is None:
            return keys
        return F.normalize(keys + self.config.gray_weight * gray_keys, dim=-1)

    @torch.no_grad()
    def calibrate_words(self, sentences: list[list[int]], smoothing: float = 0.01) -> None:
        """Weigh every token by how few sentences (token ids) have it: smoothing / (smoothing + share).

        Smooth inverse frequency (Arora et al. 2017): a question is looked up by "penguin", not by "is" and "the".
        """
        counts = torch.zeros(len(self.word_weight), dtype=torch.float64, device="cpu")
        for ids in sentences:
            counts[sorted(set(ids))] += 1
        self.word_weight.copy_(smoothing / (smoothing + counts / max(1, len(sentences))))

    def weigh_words(self, ids: torch.Tensor) -> torch.Tensor:
        """Look up weights of tokens, in the shape of `ids`, float32; 1 for tokens added to the vocabulary since."""
        with present(self):
            known = ids < len(self.word_weight)
            return self.word_weight.float()[ids * known].masked_fill(~known, 1.0)

    def match(self, state: MemoryState, words: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Compare questions in words with the stored sentences, (R, Q, N); about 1 where a sentence has all words.

        The weighted mean over the words of the largest cosine with a content slot (late interaction, arXiv 2004.12832).

        Args:
            words: (R, Q, T, C), unit length.
            weights: (R, Q, T).
        """
        # cosines of all words with all slots, the best slot of each sentence, the mean over the words
        R, Q, T, C = words.shape
        slots = F.normalize(state.contents.float().view(R, -1, C), dim=-1)  # (R, N S, C)
        with no_autocast(words):
            cosines = words.reshape(R, Q * T, C).float() @ slots.mT
        best = cosines.view(R, Q, T, -1, self.config.num_content_slots).amax(-1)  # (R, Q, T, N)
        return (best * weights.unsqueeze(-1)).sum(2) / weights.sum(2, keepdim=True).clamp(min=1e-6)

    def words(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Map token embeddings (..., D) to unit vectors in the space of contents (..., C), float32."""
        return in_float32(self.content_encoder, embeddings)

    def vocabulary(self, embeddings: nn.Module) -> torch.Tensor:
        """Map all tokens of an embedding to the space of contents (V, C); without gradient only once."""

        def values() -> torch.Tensor:
            return self.words(embeddings(torch.arange(len(self.word_weight), device=self.reference.device)))

        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return values()
        return self._vocabulary.get((*embeddings.parameters(), *embeddings.buffers(), *self.parameters()), values)

    def contents(self, embeddings: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Encode token embeddings (N, L, D) with mask (N, L) to contents (N, S x C), float32."""
        return in_float32(self.content_encoder, embeddings, mask).flatten(1)

    # ---- states

    def new_state(self, rows: int, fingerprint: str = "", dtype=torch.float64, device=None) -> MemoryState:
        """Make an empty state of this memory's sizes."""
        config = self.config
        size = config.num_content_slots * config.content_size
        limits = config.observation_noise, config.max_items, config.max_content_tokens
        return MemoryState.new(rows, config.num_slots, size, *limits, fingerprint, dtype, device)

    def write(
        self,
        state: MemoryState,
        keys: torch.Tensor,
        contents: torch.Tensor,
        labels: list[list[str]] | None = None,
        active: torch.Tensor | None = None,
        method: str | None = None,
        token_ids: torch.Tensor | None = None,
    ) -> MemoryState:
        """Return the state after an episode of E items per row: keys (R, E, C), contents (R, E, S x C).

        In training the address is a sample (learned log-variance) and the content carries observation noise; in eval
        both are exact.
        """
        require(
            self.order is None or active is None or bool(active.all()),
            "with ordering='lstm' every row's episode must be of the same length.",
        )
        # addresses, and noisy copies in training
        device, observed = state.device, None
        addresses = self.address(self.ordered(keys))
        if self.training:
            noise = math.sqrt(self.config.observation_noise / contents.shape[-1])
            noisy = self.sample(addresses), contents + noise * torch.randn_like(contents)
            observed = tuple(t.to(device) for t in noisy)
        # on the state's device
        active, token_ids = (None if t is None else t.to(device) for t in (active, token_ids))
        method = method or self.config.write_method
        return state.write(addresses.to(device), contents.to(device), labels, active, method, observed, token_ids)

    def read(self, state: MemoryState, query: MemoryQuery) -> tuple[MemoryRead, torch.Tensor]:
        """Read a state: B / R neighbouring rows of the query ask each of its R rows.

        An image's address is a function of its key. Words have none: they are compared with the stored sentences, and
        the address is that of the sentences they match.

        Returns:
            the answer, and the addresses of the queries (R, B / R, K).
        """
        # images: the address of their key
        R, C = state.num_rows, query.keys.shape[-1]
        addresses = self.address(self.ordered(query.keys.view(-1, 1, C))).view(R, -1, self.config.num_slots)
        sampled = (self.sample(addresses) if self.training else addresses).to(state.device)
        similarity = by_words = None
        if query.words is not None:
            # rows in words: the address that their match with the sentences points to
            per_row = (query.words, query.weights, query.by_words.unsqueeze(-1))
            words, weights, by_words = (t.view(*sampled.shape[:2], *t.shape[1:]).to(state.device) for t in per_row)
            match = self.match(state, words, weights)
            drawn = draw_address(state.addresses, state.active, match, WORD_SHARPNESS)
            cosines = state.similarity(sampled.to(state.mean.dtype))
            similarity = torch.where(by_words, match.to(state.mean.dtype), cosines)
            sampled = torch.where(by_words, drawn, sampled)
            addresses = torch.where(by_words, drawn, addresses.to(state.device)).to(addresses.device)
        # the state may live on another device, one that has float64
        read = state.read(sampled, self.config.read_sharpness, similarity, by_words)
        return MemoryRead(**{name: value.to(addresses.device) for name, value in vars(read).items()}), addresses


class MemoryProjection(nn.Module):
    """A read-out (B, S' x C) -> keys and values of S memory tokens per layer, (B, layers, 2, heads, S, head_dim).

    W_M of Larimar. With S' = S content slots, slot s becomes token s through one map that all slots share, and a bias
    per slot; with S' = 1, as in Larimar, one map makes all S tokens. `kv_rank` factors the map.
    """

    def __init__(self, config: MicroVLMMemoryConfig, num_layers: int, num_heads: int, head_dim: int):
        super().__init__()
        self.num_slots, self.num_tokens = config.num_content_slots, config.num_memory_tokens
        self.shape = (num_layers, 2, num_heads, head_dim)
        # through a smaller width if the config has one
        per_token = math.prod(self.shape)
        out = per_token * (self.num_tokens // self.num_slots)
        self.down = None
        width = config.content_size
        if config.kv_rank is not None:
            self.down = nn.Linear(width, config.kv_rank, bias=False)
            width = config.kv_rank
        self.up = nn.Linear(width, out, bias=False)
        self.token_bias = nn.Parameter(torch.empty(self.num_tokens, per_token))

    def forward(self, content: torch.Tensor) -> torch.Tensor:
        B = len(content)
        x = content.view(B, self.num_slots, -1)
        # the scale of a read falls with the load; an empty slot stays small next to the others
        x = x / (x.square().mean((1, 2), keepdim=True) + 1e-8).sqrt()
        # S tokens, then their layers and heads
        x = self.up(x if self.down is None else self.down(x))
        x = x.view(B, self.num_tokens, -1) + self.token_bias
        return x.view(B, self.num_tokens, *self.shape).permute(0, 2, 3, 4, 1, 5)


@dataclass
class MemoryWords:
    """What the slots of B read-outs say: their contents, and the tokens nearest to each."""

    content: torch.Tensor  # (B, S, C)
    tokens: torch.LongTensor  # (B, S, NEAREST)
    cosines: torch.Tensor  # (B, S, NEAREST)

    @classmethod
    def of(cls, content: torch.Tensor, values: torch.Tensor) -> "MemoryWords":
        """Find the tokens nearest to contents (B, S, C); values (V, C) of all tokens."""
        with no_autocast(content):
            cosines, tokens = (F.normalize(content, dim=-1) @ values.mT).topk(NEAREST, dim=-1)
        return cls(content, tokens, cosines)

    def map(self, function) -> "MemoryWords":
        return MemoryWords(**{name: function(value) for name, value in vars(self).items()})


class MemoryCopy(nn.Module):
    """Say the token of a slot: a pointer from the decoder's state to the slots, mixed with its own words.

        p = (1 - g) p_decoder + g sum_s a_s p_s,  a = softmax of W_q h (W_p [z_(s-1), z_(s-2)] + b_s),  g = sigmoid(w h)

    After the pointer-generator (arXiv 1704.04368). A slot is found by its place and by the two tokens before it, and
    p_s is over the tokens nearest to its content. So any text comes back, whatever the decoder knows of its words.
    """

    def __init__(self, config: MicroVLMMemoryConfig, hidden_size: int):
        super().__init__()
        S, C, width = config.num_content_slots, config.content_size, config.copy_size
        self.query = nn.Linear(hidden_size, width)
        self.previous = nn.Linear(2 * C, width, bias=False)
        self.place = nn.Parameter(torch.empty(S, width))
        self.gate = nn.Linear(hidden_size, 1)
        self.dropout = config.copy_dropout
        self.log_sharpness = nn.Parameter(torch.empty(1))  # of p_s

    def forward(self, hidden, logits, log_gate, content, tokens, cosines) -> torch.Tensor:
        """Mix logits (B, T, V) of states (B, T, D) with `MemoryWords`; rows whose gate is off keep theirs."""
        # which slot
        before = F.pad(content, (0, 0, 2, 0))  # (B, 2 + S, C)
        place = self.previous(torch.cat([before[:, 1:-1], before[:, :-2]], -1)) + self.place  # (B, S, width)
        pointer = (self.query(hidden) @ place.mT / math.sqrt(place.shape[-1])).log_softmax(-1)  # (B, T, S)
        # its tokens
        log_probs = (cosines * self.log_sharpness.exp()).log_softmax(-1)  # (B, S, NEAREST)
        log_probs = (pointer.unsqueeze(-1) + log_probs.unsqueeze(1)).flatten(2)  # (B, T, S x NEAREST)
        tokens = tokens.flatten(1).unsqueeze(1).expand_as(log_probs)
        copied = torch.zeros_like(logits).scatter_add(-1, tokens, log_probs.exp())
        # or the decoder's; from some rows that are to be copied they are hidden, so that the pointer learns all of it
        if self.training and self.dropout:
            hide = (log_gate == 0) & (torch.rand_like(log_gate) < self.dropout)
            logits = logits.masked_fill(hide.view(-1, 1, 1), 0)
        gate = self.gate(hidden).sigmoid() * log_gate.exp().view(-1, 1, 1)  # (B, T, 1)
        mixed = ((1 - gate) * logits.softmax(-1) + gate * copied).clamp(min=1e-30).log()
        return torch.where((log_gate > -torch.inf).view(-1, 1, 1), mixed, logits)


class ScopeNet(nn.Module):
    """Context key (..., C) and `read_statistics` (..., 9) -> logit (...): does the memory know this query?

    The statistics tell how many items there are, and whether the query is in words: the best of many cosines is high
    by chance, and the higher the more alike the items are.
    """

    def __init__(self, config: MicroVLMMemoryConfig):
        super().__init__()
        hidden = config.scope_hidden_size
        self.context = nn.Linear(config.code_size, hidden, bias=False) if config.scope_context else None
        self.statistics = nn.Linear(NUM_SCOPE_STATISTICS, hidden)
        self.hidden = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, 1)

    def forward(self, key: torch.Tensor, statistics: torch.Tensor) -> torch.Tensor:
        x = self.statistics(statistics)
        if self.context is not None:
            x = x + self.context(key)
        return self.out(F.gelu(self.hidden(F.gelu(x)))).squeeze(-1)


def scope_threshold(threshold: float | list[list[float]], facts: torch.Tensor) -> torch.Tensor:
    """Look up the probability from which a memory of N facts applies, in the shape of `facts`, float32.

    Args:
        threshold: one for all, or pairs [facts, probability] in rising order; between them the logit is linear in
            log(1 + facts), outside them constant.
        facts: number of facts in each memory.
    """
    if isinstance(threshold, float):
        return torch.full(facts.shape, threshold, dtype=torch.float32, device=facts.device)
    # the two pairs around each memory's number of facts, and the place between them
    table = torch.tensor(threshold, dtype=torch.float64, device=facts.device)
    x, y, at = table[:, 0].log1p(), table[:, 1].logit(), facts.double().log1p()
    right = torch.searchsorted(x, at).clamp(1, len(x) - 1) if len(x) > 1 else torch.zeros_like(facts)
    left = (right - 1).clamp(min=0)
    share = ((at - x[left]) / (x[right] - x[left]).clamp(min=1e-9)).clamp(0, 1)
    return (y[left] + share * (y[right] - y[left])).sigmoid().float()


@dataclass
class MemoryReadout:
    """What a memory adds to a forward pass of B rows."""

    key_values: torch.Tensor  # (B, layers, 2, heads, S, head_dim)
    layers: list[int]  # of the decoder, to which they belong
    log_gate: torch.Tensor  # added to the attention scores of the memory tokens, (B,): 0 is on, -inf off
    scope_logits: torch.Tensor  # of ScopeNet, (B,)
    content: torch.Tensor  # (B, S, C)
    address: torch.Tensor  # of the query, (B, K)
    words: MemoryWords | None = None  # for the pointer, if the model has one
    memory_kl: torch.Tensor | None = None  # means over rows, ()
    address_kl: torch.Tensor | None = None

    def repeat_interleave(self, repeats: int) -> "MemoryReadout":
        fields = ("key_values", "log_gate", "scope_logits", "content", "address")
        words = self.words and self.words.map(lambda t: t.repeat_interleave(repeats, 0))
        return replace(self, words=words, **{n: getattr(self, n).repeat_interleave(repeats, 0) for n in fields})
