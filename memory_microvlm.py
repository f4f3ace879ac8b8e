"""Episodic memory: write a picture and a sentence without a gradient step, read them back, forget them exactly.

After Larimar (arXiv 2403.11901), whose memory is the generative pseudo-inverse memory of the Kanerva machine family (arXiv 1804.01756).
A memory is the posterior of a Bayesian linear regression from addresses to contents (K slots, C code width, S content slots):

    picture -> key k (C,)                       MemoryKeyEncoder
    key     -> address w (K,), unit length      EpisodicMemory.address, through the fixed reference memory M_ref (K, C)
    text    -> content z (S x C,)               MemoryContentEncoder
    write   -> mean M (K, S x C), covariance Sigma (K, K)    MemoryState.write
    read    -> z_r = w M, v = w Sigma w^T       MemoryState.read
    z_r     -> keys and values of S memory tokens in every decoder layer      MemoryProjection
    z_r, v  -> does the memory know this query? ScopeNet

An address depends on the key and on M_ref alone, never on what was written: that is what makes forgetting exact. The state is explicit:
a `MemoryState` is made by the model, handed in, and returned changed; the model holds none. docs/memory.md has the maths.
"""

import json
import math
import os
import time
import uuid
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .configuration_microvlm import MicroVLMMemoryConfig

FORMAT, FORMAT_VERSION = "microvlm-memory", "1"
NUM_SCOPE_STATISTICS = 9
DOWNDATE_NOISE = (
    1e-3  # below, a down-date loses too many digits: at 1e-5 the mean is off by 1e-5 after forgetting 296 of 300 items
)
LATEST_TIME = 253402300800.0  # the year 10000
WORD_SHARPNESS = 40.0  # of the address of a question in words
MAX_FILE_ITEMS = 1_000_000  # a file that claims more is refused before anything is allocated


def no_autocast(x: torch.Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)


def in_float32(module: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    """`module(*inputs)` in float32, whatever the dtype of its parameters and whatever autocast is on."""
    with no_autocast(inputs[0]):
        inputs = [x.float() if x.is_floating_point() else x for x in inputs]
        tensors = dict((*module.named_parameters(), *module.named_buffers()))
        tensors = {name: t for name, t in tensors.items() if t.is_floating_point() and t.dtype != torch.float32}
        if not tensors:  # packed weights see to their own dtype
            return module(*inputs)
        tensors = {name: t.float() for name, t in tensors.items()}
        return torch.func.functional_call(module, tensors, tuple(inputs))


# ---------------------------------------------------------------------------------------------------------------- posterior maths
# R memories side by side. mean (R, K, Z), covariance (R, K, K), log_det (R,), addresses (R, N, K), contents (R, N, Z).


def sherman_morrison(mean, covariance, log_det, address, content, noise, sign=1.0):
    """Take one observation into the posterior of every row, or out of it: the seed's update, Larimar's eq. 3.

        Delta = z - w M,   s = w Sigma w^T + sign noise,   g = Sigma w^T / s,   M += g Delta,   Sigma -= g (w Sigma)

    with log det Sigma += log(noise) - log(sign s). Rank one, O(K^2 + K Z) per row.

    Args:
        address: (R, K).
        content: (R, Z).
        noise: variance of the observation noise, > 0.
        sign: 1 to write, -1 to take the same observation out again (an exact down-date), 0 to leave the row; a number or (R,).

    Returns:
        mean, covariance, log_det, new tensors.
    """
    sign = torch.as_tensor(sign, dtype=mean.dtype, device=mean.device).expand(len(mean))
    w_sigma = torch.einsum("rk,rkl->rl", address, covariance)
    s = (w_sigma * address).sum(-1) + torch.where(sign == 0, torch.ones_like(sign), sign) * noise  # (R,)
    gain = w_sigma / s.unsqueeze(-1) * sign.abs().unsqueeze(-1)
    error = content - torch.einsum("rk,rkz->rz", address, mean)
    mean = mean + gain.unsqueeze(-1) * error.unsqueeze(1)
    covariance = covariance - gain.unsqueeze(-1) * w_sigma.unsqueeze(1)
    covariance = (covariance + covariance.mT) / 2
    step = math.log(noise) - (sign * s).clamp(min=torch.finfo(s.dtype).tiny).log()
    return mean, covariance, log_det + torch.where(sign == 0, torch.zeros_like(step), step)


def direct_write(mean, covariance, log_det, addresses, contents, noise, active=None):
    """Take N observations into the posterior at once, by one Cholesky factor of an N x N matrix.

        G = W Sigma W^T + noise I,   M += Sigma W^T G^-1 (Z - W M),   Sigma -= Sigma W^T G^-1 W Sigma

    The same posterior as N rank-one writes in any order.

    Args:
        addresses: (R, N, K).
        contents: (R, N, Z).
        active: (R, N), False for places to leave out.

    Returns:
        mean, covariance, log_det, new tensors.
    """
    if active is not None:  # an observation at address zero changes nothing
        addresses = addresses * active.unsqueeze(-1)
    w_sigma = addresses @ covariance  # (R, N, K)
    gram = w_sigma @ addresses.mT + noise * torch.eye(addresses.shape[1], dtype=mean.dtype, device=mean.device)
    factor = torch.linalg.cholesky(gram)
    gain = torch.cholesky_solve(w_sigma, factor).mT  # (R, K, N)
    mean = mean + gain @ (contents - addresses @ mean)
    covariance = covariance - gain @ w_sigma
    covariance = (covariance + covariance.mT) / 2
    log_det = log_det + addresses.shape[1] * math.log(noise)
    log_det = log_det - 2 * torch.diagonal(factor, dim1=-2, dim2=-1).log().sum(-1)
    return mean, covariance, log_det


def memory_kl(mean, covariance, log_det) -> torch.Tensor:
    """KL of the matrix-normal posterior N(mean, covariance x I_Z) from the prior N(0, I x I_Z), divided by K Z.

        KL = (Z tr(Sigma) + |M|^2 - K Z - Z log det Sigma) / 2

    The seed's formula has C on the square term only; the trace and the log-determinant count once per content column.

    Returns:
        (R,), nats per entry of the memory.
    """
    K, Z = mean.shape[1:]
    trace = torch.diagonal(covariance, dim1=-2, dim2=-1).sum(-1)
    square = mean.square().sum((1, 2))
    return (Z * trace + square - K * Z - Z * log_det) / (2 * K * Z)


def address_kl(address: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """KL of the address posterior from its prior, the seed's formula for u = sqrt(K) w with a standard normal prior, divided by K.

    A unit address has entries of size 1 / sqrt(K); scaled by sqrt(K) they have the unit size the standard normal expects. As the length
    is fixed, the term in the mean is a constant: what is learned from it is the variance.

    Args:
        address: means w (..., K).
        log_variance: of u, (K,).

    Returns:
        (...,), nats per slot.
    """
    K = address.shape[-1]
    return 0.5 * (log_variance.exp() + K * address.square() - 1 - log_variance).mean(-1)


def ben_cohen_inverse(a: torch.Tensor, steps: int) -> torch.Tensor:
    """Moore-Penrose inverse of a (K, C) by the Ben-Israel and Cohen iteration X <- 2 X - X A X.

    Started at A^T / (|A|_1 |A|_inf), which converges for every A; the seed's fixed 5e-4 diverges for a large norm and is far from done
    after three steps for a small one (docs/memory.md).

    Returns:
        (C, K).
    """
    x = a.mT / (a.abs().sum(0).max() * a.abs().sum(1).max())
    for _ in range(steps):
        x = 2 * x - x @ a @ x
    return x


# ------------------------------------------------------------------------------------------------------------------------- state


@dataclass
class MemoryRead:
    """What R memories say to Q queries each.

    Args:
        content: read-out w M, (R, Q, Z).
        variance: predictive variance w Sigma w^T, (R, Q); 1 where nothing was written, near 0 on a written address.
        coefficients: share of every stored item in the read-out, a Sigma W^T / noise for the address a read at, (R, Q, N); 0 on
            empty places.
        statistics: what ScopeNet sees, (R, Q, 9).
    """

    content: torch.Tensor
    variance: torch.Tensor
    coefficients: torch.Tensor
    statistics: torch.Tensor


@dataclass
class MemoryQuery:
    """What B rows ask a memory by: their pictures, or their words where a row has no picture.

    Args:
        keys: of the pictures, (B, C), unit length; zero where a row has none.
        words: of the rows without picture, in the space of contents, unit length, (B, T, C); None if every row has a picture.
        weights: of the words, (B, T), zero on padding and in rows with a picture.
    """

    keys: torch.Tensor
    words: torch.Tensor | None = None
    weights: torch.Tensor | None = None

    @property
    def by_words(self) -> torch.Tensor:
        """Which rows ask in words, (B,)."""
        if self.weights is None:
            return torch.zeros(len(self.keys), dtype=torch.bool, device=self.keys.device)
        return (self.weights > 0).any(1)


@dataclass
class MemoryState:
    """R memories, one per row: a posterior, and a receipt for every stored item.

    Never changed in place: every verb returns a new state, so a failed call leaves the old one as it was.

    Args:
        mean: M (R, K, Z).
        covariance: Sigma (R, K, K).
        log_det: log det Sigma (R,), carried along.
        addresses, contents: receipts, what was written: (R, N, K) and (R, N, Z) float32.
        active: (R, N), which places hold an item.
        uids: (R, N) int64, a random number per item, by which `merge` knows copies.
        times: (R, N) float64, seconds since 1970, UTC.
        token_ids: (R, N, L) int64, the sentence in tokens, -1 behind its end.
        labels: per row and place, a name for the item; empty if none was given.
        noise: variance of the observation noise.
        max_items: most items a row may hold.
        fingerprint: of the model that writes and reads.
    """

    mean: torch.Tensor
    covariance: torch.Tensor
    log_det: torch.Tensor
    addresses: torch.Tensor
    contents: torch.Tensor
    active: torch.Tensor
    uids: torch.Tensor
    times: torch.Tensor
    token_ids: torch.Tensor
    labels: list[list[str]]
    noise: float
    max_items: int
    fingerprint: str

    TENSORS = ("mean", "covariance", "log_det", "addresses", "contents", "active", "uids", "times", "token_ids")

    @classmethod
    def new(
        cls,
        rows: int,
        num_slots: int,
        content_size: int,
        noise: float,
        max_items: int,
        max_content_tokens: int,
        fingerprint: str = "",
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
    ) -> "MemoryState":
        """Empty memories: mean 0, covariance the identity.

        In float64: the rank-one down-dates of a float32 state drift by some 1e-3 over a thousand writes and forgets
        (docs/design.md). Training uses float32, for one batch at a time.
        """
        zeros = lambda *shape, dtype=torch.float32: torch.zeros(rows, *shape, dtype=dtype, device=device)  # noqa: E731
        eye = torch.eye(num_slots, dtype=dtype, device=device)
        return cls(
            mean=zeros(num_slots, content_size, dtype=dtype),
            covariance=eye.expand(rows, -1, -1).clone(),
            log_det=zeros(dtype=dtype),
            addresses=zeros(0, num_slots),
            contents=zeros(0, content_size),
            active=zeros(0, dtype=torch.bool),
            uids=zeros(0, dtype=torch.long),
            times=zeros(0, dtype=torch.float64),
            token_ids=zeros(0, max_content_tokens, dtype=torch.long),
            labels=[[] for _ in range(rows)],
            noise=noise,
            max_items=max_items,
            fingerprint=fingerprint,
        )

    # ---- looking at it

    @property
    def num_rows(self) -> int:
        return len(self.mean)

    @property
    def counts(self) -> torch.Tensor:
        """Items per row, (R,)."""
        return self.active.sum(1)

    @property
    def device(self) -> torch.device:
        return self.mean.device

    @property
    def num_bytes(self) -> dict[str, int]:
        """Bytes of the posterior, which do not grow, and of the receipts, which do."""
        size = lambda *names: sum(getattr(self, n).numel() * getattr(self, n).element_size() for n in names)  # noqa: E731
        return {"posterior": size("mean", "covariance", "log_det"), "receipts": size(*self.TENSORS[3:])}

    def __repr__(self) -> str:
        K, Z = self.mean.shape[1:]
        return f"MemoryState(rows={self.num_rows}, slots={K}, content_size={Z}, items={self.counts.tolist()})"

    def describe(self, processor=None) -> str:
        """What is stored, in words: a line per item, numbered as `forget` and `edit` count.

        Args:
            processor: a processor or tokenizer of the model, to spell out sentences; without one, items go by their label.
        """
        lines = []
        for row in range(self.num_rows):
            places = self._places(row)
            items = f"{len(places)} item{'' if len(places) == 1 else 's'} of at most {self.max_items}"
            lines.append(f"memory {row}: {items}" if self.num_rows > 1 else f"memory: {items}")
            for number, place in enumerate(places):
                when = datetime.fromtimestamp(float(self.times[row, place]), UTC)
                label, ids = self.labels[row][place], self.token_ids[row, place]
                ids = ids[ids >= 0].tolist()
                text = f"{len(ids)} tokens"
                if processor is not None:
                    text = repr(processor.decode(ids, skip_special_tokens=True).strip())
                text = f"{label!r}: {text}" if label and repr(label) != text else text
                lines.append(f"  {number}. {text} (written {when:%Y-%m-%d %H:%M:%S} UTC)")
        return "\n".join(lines)

    def _places(self, row: int) -> list[int]:
        return torch.nonzero(self.active[row]).flatten().tolist()

    def find(self, item: int | str, row: int | None = None) -> tuple[int, int]:
        """Row and place of an item, given by its number in `describe()` or by its label.

        Raises:
            ValueError: it was never written or is forgotten, the label is stored more than once, or `row` is missing.
        """
        if row is None:
            if self.num_rows != 1:
                raise ValueError(f"the memory has {self.num_rows} rows: say in which one with row=.")
            row = 0
        if not 0 <= row < self.num_rows:
            raise ValueError(f"row {row} is not in this memory, which has {self.num_rows}.")
        places = self._places(row)
        if isinstance(item, str):
            found = [p for p in places if self.labels[row][p] == item]
            if len(found) != 1:
                problem = "is not in the memory" if not found else f"is stored {len(found)} times: give its number"
                raise ValueError(f"{item!r} {problem}.")
            return row, found[0]
        if not 0 <= item < len(places):
            raise ValueError(f"item {item} is not in the memory, which holds {len(places)}.")
        return row, places[item]

    # ---- verbs

    def _posterior(self):
        return self.mean, self.covariance, self.log_det

    def write(
        self,
        addresses: torch.Tensor,
        contents: torch.Tensor,
        labels: list[list[str]] | None = None,
        active: torch.Tensor | None = None,
        method: str = "sequential",
        observed: tuple[torch.Tensor, torch.Tensor] | None = None,
        token_ids: torch.Tensor | None = None,
    ) -> "MemoryState":
        """The state after N observations per row.

        Args:
            addresses: unit vectors (R, N, K).
            contents: (R, N, Z).
            labels: what the items are called, per row; default: empty.
            active: (R, N), False for places to leave out; default: all.
            method: `sequential` (Sherman-Morrison, one after the other) or `direct` (all at once).
            token_ids: the sentences (R, N, L), -1 behind their end.
            observed: noisy addresses and contents to write instead, in training; the receipts keep the given ones.

        Raises:
            ValueError: wrong shapes, values that are not finite, a row that would hold more than `max_items`, unknown method.
        """
        R, K, Z = self.mean.shape
        N = addresses.shape[1] if addresses.ndim == 3 else -1
        if addresses.shape != (R, N, K) or contents.shape != (R, N, Z):
            raise ValueError(
                f"a memory of {R} rows, {K} slots and content size {Z} takes addresses ({R}, N, {K}) and contents "
                f"({R}, N, {Z}), got {tuple(addresses.shape)} and {tuple(contents.shape)}."
            )
        for name, value in (("addresses", addresses), ("contents", contents)):
            if not torch.isfinite(value).all():
                raise ValueError(f"memory {name} are not finite: nothing was written.")
        if active is None:
            active = torch.ones(R, N, dtype=torch.bool, device=self.device)
        fullest = int((self.counts + active.sum(1)).max())
        if fullest > self.max_items:
            raise ValueError(f"the memory is full: {fullest} items, at most {self.max_items} fit. Nothing was written.")
        labels = labels or [[""] * N for _ in range(R)]
        if [len(names) for names in labels] != [N] * R or not all(
            isinstance(x, str) for names in labels for x in names
        ):
            raise ValueError(f"labels must be {R} lists of {N} texts.")
        if token_ids is None:
            token_ids = self.token_ids.new_full((R, N, self.token_ids.shape[2]), -1)
        if token_ids.shape != (R, N, self.token_ids.shape[2]):
            raise ValueError(
                f"token_ids must have the shape {(R, N, self.token_ids.shape[2])}, got {tuple(token_ids.shape)}."
            )
        # a place left out keeps nothing
        addresses, contents = (t.float().masked_fill(~active.unsqueeze(-1), 0) for t in (addresses, contents))
        token_ids = token_ids.to(self.device).masked_fill(~active.unsqueeze(-1), -1)
        labels = [[x if on else "" for x, on in zip(*row)] for row in zip(labels, active.tolist())]
        w, z = (t.to(self.mean.dtype) for t in observed or (addresses, contents))
        if method not in ("sequential", "direct"):
            raise ValueError(f"write method {method!r} is not one of sequential, direct.")
        with no_autocast(w):
            if method == "direct":
                mean, covariance, log_det = direct_write(*self._posterior(), w, z, self.noise, active)
            else:
                mean, covariance, log_det = self._posterior()
                for n in range(N):
                    mean, covariance, log_det = sherman_morrison(
                        mean, covariance, log_det, w[:, n], z[:, n], self.noise, active[:, n].to(w.dtype)
                    )
        uids = torch.tensor([[uuid.uuid4().int >> 65 for _ in range(N)] for _ in range(R)], dtype=torch.long)
        now = torch.full((R, N), time.time(), dtype=torch.float64)
        uids, now = uids.to(self.device), now.to(self.device)
        return replace(
            self,
            mean=mean,
            covariance=covariance,
            log_det=log_det,
            addresses=torch.cat([self.addresses, addresses], 1),
            contents=torch.cat([self.contents, contents], 1),
            active=torch.cat([self.active, active], 1),
            uids=torch.cat([self.uids, uids.view(R, N) * active], 1),
            times=torch.cat([self.times, now * active], 1),
            token_ids=torch.cat([self.token_ids, token_ids], 1),
            labels=[[*old, *new] for old, new in zip(self.labels, labels, strict=True)],
        )

    def forget(self, item: int | str, row: int | None = None) -> "MemoryState":
        """The state as if `item` (see `find`) had never been written: the exact down-date from its receipt. With little observation noise,
        where a down-date cancels its own digits, the posterior is made anew of the receipts that are left.
        """
        row, place = self.find(item, row)
        sign = torch.zeros(self.num_rows, dtype=self.mean.dtype, device=self.device)
        sign[row] = -1
        w, z = (t[:, place].to(self.mean.dtype) for t in (self.addresses, self.contents))
        with no_autocast(w):
            mean, covariance, log_det = sherman_morrison(*self._posterior(), w, z, self.noise, sign)
        receipts = {name: getattr(self, name).clone() for name in self.TENSORS[3:]}
        for name, receipt in receipts.items():  # nothing of it stays, even where another row still uses the place
            receipt[row, place] = -1 if name == "token_ids" else 0
        labels = [list(names) for names in self.labels]
        labels[row][place] = ""
        state = replace(self, mean=mean, covariance=covariance, log_det=log_det, labels=labels, **receipts)
        active = state.active
        if self.noise < DOWNDATE_NOISE:
            anew = state._from_receipts()
            state = replace(state, **{name: getattr(anew, name) for name in ("mean", "covariance", "log_det")})
        if not active[row].any():  # nothing left: the prior itself, without a trace of rounding
            state = replace(state, mean=mean.clone(), covariance=covariance.clone(), log_det=state.log_det.clone())
            state.mean[row], state.log_det[row] = 0, 0
            state.covariance[row] = torch.eye(mean.shape[1], dtype=mean.dtype, device=self.device)
        return state._compact()

    def edit(
        self,
        item: int | str,
        content: torch.Tensor,
        label: str = "",
        row: int | None = None,
        token_ids: torch.Tensor | None = None,
    ) -> "MemoryState":
        """The state with another content (Z,), label and sentence (L,) under the address of `item`, which becomes the last one."""
        row, place = self.find(item, row)
        R = self.num_rows
        contents = content.new_zeros(R, 1, content.numel())
        contents[row, 0] = content.flatten()
        active = torch.zeros(R, 1, dtype=torch.bool, device=self.device)
        active[row] = True
        addresses = self.addresses[:, place : place + 1]
        number = self._places(row).index(place)
        labels = [[label if r == row else ""] for r in range(R)]
        if token_ids is not None:
            token_ids = token_ids.view(1, 1, -1).expand(R, -1, -1)
        written = replace(self, max_items=self.max_items + 1)  # for the moment between writing and forgetting
        written = written.write(addresses, contents.to(self.device), labels, active, token_ids=token_ids)
        return replace(written.forget(number, row), max_items=self.max_items)

    def similarity(self, addresses: torch.Tensor) -> torch.Tensor:
        """Cosines of addresses (R, Q, K) with the stored ones, (R, Q, N); 0 on empty places."""
        return (addresses @ self.addresses.to(addresses.dtype).mT).masked_fill(~self.active.unsqueeze(1), 0)

    def draw(self, similarity: torch.Tensor, sharpness: float) -> torch.Tensor:
        """The address that a similarity (R, Q, N) to the stored items points to, (R, Q, K): one step of a modern Hopfield network
        (arXiv 2008.02217, eq. 3), the mean of the stored addresses under softmax(sharpness x similarity), brought back to unit
        length; zero where nothing is stored.
        """
        scores = (sharpness * similarity).masked_fill(~self.active.unsqueeze(1), torch.finfo(similarity.dtype).min)
        return F.normalize(scores.softmax(-1) @ self.addresses.to(similarity.dtype), dim=-1)  # empty places hold zeros

    def read(
        self,
        queries: torch.Tensor,
        sharpness: float = 0.0,
        similarity: torch.Tensor | None = None,
        by_words: torch.Tensor | None = None,
    ) -> MemoryRead:
        """Read with unit addresses (R, Q, K); row r of the queries asks row r of the memory.

        Args:
            queries: unit addresses (R, Q, K).
            sharpness: read the content at the address drawn to the nearest stored ones (see `draw`); 0 at the query's own.
            similarity: of the queries to the stored items (R, Q, N), if it is not that of their addresses.
            by_words: which queries are questions in words, (R, Q, 1); default: none.
        """
        w = queries.to(self.mean.dtype)
        with no_autocast(w):
            similarity = self.similarity(w) if similarity is None else similarity.to(w.dtype)
            variance = ((w @ self.covariance) * w).sum(-1)
            at = self.draw(similarity, sharpness) if sharpness > 0 else w
            content = at @ self.mean
            shares = at @ self.covariance @ self.addresses.to(w.dtype).mT / self.noise
            coefficients = shares.masked_fill(~self.active.unsqueeze(1), 0)
        K, count = self.mean.shape[1], self.counts.to(w.dtype).view(-1, 1, 1)
        # with zeros, however many places are empty
        top = F.pad(similarity, (0, 3)).topk(3, dim=-1).values
        mean = similarity.sum(-1, keepdim=True) / count.clamp(min=1)
        spread = ((similarity - mean) * self.active.unsqueeze(1)).square().sum(-1, keepdim=True) / count.clamp(min=1)
        spread = (spread + 1e-6).sqrt()
        load = torch.cat([(1 + count).log() / math.log(1 + K), count / K], -1).expand(*w.shape[:2], 2)
        kind = torch.zeros_like(mean) if by_words is None else by_words.to(w.dtype)
        statistics = torch.cat([top, mean, spread, variance.unsqueeze(-1), load, kind], -1)
        return MemoryRead(content.float(), variance.float(), coefficients.float(), statistics.float())

    def kl(self) -> torch.Tensor:
        """KL of the posterior from the prior per row, (R,); see `memory_kl`."""
        return memory_kl(*self._posterior())

    # ---- rows

    def _map(self, function) -> "MemoryState":
        return replace(self, **{name: function(getattr(self, name)) for name in self.TENSORS})

    def _from_receipts(self) -> "MemoryState":
        """A state whose posterior is that of this one's receipts, whatever its own is."""
        shape, dtype = (*self.mean.shape, self.noise, self.max_items, self.token_ids.shape[2]), self.mean.dtype
        empty = MemoryState.new(*shape, dtype=dtype, device=self.device)
        return empty.write(self.addresses, self.contents, active=self.active, method="direct")

    def _compact(self) -> "MemoryState":
        """Every row's items in its first places, and no more places than the fullest row needs."""
        widest = int(self.counts.max()) if self.num_rows else 0
        order = (~self.active).long().argsort(dim=1, stable=True)[:, :widest]  # items first, in their order
        if widest == self.active.shape[1] and bool((order == torch.arange(widest, device=order.device)).all()):
            return self
        rows = torch.arange(self.num_rows, device=order.device).unsqueeze(1)
        parts = {name: getattr(self, name)[rows, order] for name in self.TENSORS[3:]}
        labels = [[names[i] for i in places] for names, places in zip(self.labels, order.tolist(), strict=True)]
        return replace(self, **parts, labels=labels)

    def to(self, device: torch.device | str) -> "MemoryState":
        return self._map(lambda t: t.to(device))

    def select(self, rows: list[int] | torch.Tensor) -> "MemoryState":
        """The given rows, in the given order; a row may come more than once.

        Raises:
            TypeError: a mask of booleans.
        """
        if torch.as_tensor(rows).dtype == torch.bool:
            raise TypeError("select takes the numbers of rows, not a mask of booleans.")
        index = torch.as_tensor(rows, dtype=torch.long, device=self.device)
        state = self._map(lambda t: t[index])
        return replace(state, labels=[list(self.labels[i]) for i in index.tolist()])._compact()

    @staticmethod
    def stack(states: list["MemoryState"]) -> "MemoryState":
        """The rows of all states, one after the other.

        Raises:
            ValueError: no states, or states of different models or shapes.
        """
        if not states:
            raise ValueError("stack needs at least one memory.")
        for state in states[1:]:
            states[0]._check_kin(state)
        N = max(state.active.shape[1] for state in states)
        parts = {}
        for name in MemoryState.TENSORS:
            tensors = [getattr(state, name).to(states[0].device) for state in states]
            if name in MemoryState.TENSORS[3:]:
                tensors = [torch.cat([t, t.new_zeros(len(t), N - t.shape[1], *t.shape[2:])], 1) for t in tensors]
            parts[name] = torch.cat(tensors)
        labels = [[*row, *[""] * (N - len(row))] for state in states for row in state.labels]
        return replace(states[0], **parts, labels=labels, max_items=max(state.max_items for state in states))

    def _check_kin(self, other: "MemoryState") -> None:
        if self.fingerprint != other.fingerprint:
            raise ValueError(
                f"memories of different models: fingerprints {self.fingerprint!r} and {other.fingerprint!r}."
            )
        if self.mean.shape[1:] != other.mean.shape[1:] or self.noise != other.noise:
            raise ValueError("memories of different shape or observation noise cannot be joined.")

    def merge(self, other: "MemoryState") -> "MemoryState":
        """What both know, row by row; an item that both hold, because one is a copy of the other, counts once.

        Raises:
            ValueError: memories of different models, shapes or numbers of rows, or too many items together.
        """
        self._check_kin(other)
        if self.num_rows != other.num_rows:
            raise ValueError(f"memories of {self.num_rows} and {other.num_rows} rows cannot be merged.")
        if not other.active.shape[1]:
            return self
        uids = other.uids.to(self.device)
        known = ((uids.unsqueeze(2) == self.uids.unsqueeze(1)) & self.active.unsqueeze(1)).any(2)
        active = other.active.to(self.device) & ~known
        N = self.active.shape[1]
        state = self.write(
            other.addresses.to(self.device),
            other.contents.to(self.device),
            other.labels,
            active,
            "direct",
            token_ids=other.token_ids,
        )
        state.uids[:, N:], state.times[:, N:] = uids * active, other.times.to(self.device) * active
        return state._compact()

    # ---- files

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file, under a temporary name first; a link stays one, and the file it leads to is replaced."""
        path = os.path.realpath(path)
        metadata = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "labels": json.dumps(self.labels),
            "noise": repr(self.noise),
            "max_items": str(self.max_items),
        }
        tensors = {name: getattr(self, name).detach().cpu().contiguous() for name in self.TENSORS}
        temporary = f"{path}.{os.getpid()}.part"
        try:
            with open(temporary, "wb") as file:
                mode = os.fstat(file.fileno()).st_mode  # as a new file has it here: safetensors makes private ones
            save_file(tensors, temporary, metadata)
            os.chmod(temporary, mode)
            os.replace(temporary, path)
        except BaseException:
            if os.path.exists(temporary):
                os.unlink(temporary)
            raise

    @classmethod
    def load(
        cls, path: str | os.PathLike, expected: "MemoryState", device: torch.device | str = "cpu"
    ) -> "MemoryState":
        """Read a file that may come from anywhere.

        Args:
            expected: an empty memory of the model that will read it; shapes, noise, item cap and fingerprint must be its.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not such a file, another version, model or shape, wrong dtypes, values that are not finite or not a
                posterior, too many items, or receipts that do not give the posterior.
        """
        if not os.path.exists(path):
            raise FileNotFoundError(f"memory file {path} does not exist.")
        if not os.path.isfile(path):
            raise ValueError(f"memory file {path} is refused: it is not a file.")
        refuse = lambda why: ValueError(f"memory file {path} is refused: {why}.")  # noqa: E731
        K, Z = expected.mean.shape[1:]
        shapes = {
            "mean": ("F64", (K, Z)),
            "covariance": ("F64", (K, K)),
            "log_det": ("F64", ()),
            "addresses": ("F32", (None, K)),
            "contents": ("F32", (None, Z)),
            "active": ("BOOL", (None,)),
            "uids": ("I64", (None,)),
            "times": ("F64", (None,)),
            "token_ids": ("I64", (None, expected.token_ids.shape[2])),
        }
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise refuse("it is not a memory of MicroVLM")
                if metadata.get("version") != FORMAT_VERSION:
                    raise refuse(f"format version {metadata.get('version')}, this code reads {FORMAT_VERSION}")
                if metadata.get("fingerprint") != expected.fingerprint:
                    raise refuse(
                        f"it was written by another model (fingerprint {metadata.get('fingerprint')}, "
                        f"this model's is {expected.fingerprint})"
                    )
                if (keys := set(file.keys())) != set(shapes):
                    raise refuse(f"its tensors are {', '.join(sorted(keys))}, expected {', '.join(sorted(shapes))}")
                slices = {name: file.get_slice(name) for name in shapes}
                size = slices["addresses"].get_shape()
                R, N = (*size, 0, 0)[:2]
                if not R:
                    raise refuse("it has no rows")
                if N > min(4 * expected.max_items, MAX_FILE_ITEMS):
                    raise refuse(f"it holds {N} places, more than a memory of {expected.max_items} items needs")
                for name, (dtype, shape) in shapes.items():
                    shape = (R, *(N if s is None else s for s in shape))
                    got = slices[name].get_dtype(), tuple(slices[name].get_shape())
                    if got != (dtype, shape):
                        raise refuse(f"{name} is {got[0]} {got[1]}, expected {dtype} {shape}")
                tensors = {name: file.get_tensor(name) for name in shapes}
        except SafetensorError as error:
            raise refuse(f"it is not a whole safetensors file ({error})") from error
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise refuse(f"{name} has values that are not finite")
        try:
            labels = json.loads(metadata.get("labels", ""))
            noise, max_items = float(metadata.get("noise", "")), int(metadata.get("max_items", ""))
        except (ValueError, RecursionError) as error:
            raise refuse(f"its metadata cannot be read ({error})") from error
        if not (
            isinstance(labels, list)
            and len(labels) == R
            and all(isinstance(row, list) and len(row) == N and all(isinstance(x, str) for x in row) for row in labels)
        ):
            raise refuse(f"its labels are not {R} lists of {N} texts")
        if noise != expected.noise:
            raise refuse(f"its observation noise is {noise}, this model's is {expected.noise}")
        if not bool(((tensors["token_ids"] >= -1) & (tensors["token_ids"] < 2**31)).all()):
            raise refuse("it has impossible token ids")
        if not bool(((tensors["times"] >= 0) & (tensors["times"] < LATEST_TIME)).all()):
            raise refuse("an item was written at an impossible time")
        if (most := int(tensors["active"].sum(1).max())) > expected.max_items or max_items < most:
            raise refuse(f"a row holds {most} items, at most {expected.max_items} fit")
        state = cls(
            **tensors, labels=labels, noise=noise, max_items=expected.max_items, fingerprint=expected.fingerprint
        )
        length = (state.addresses.norm(dim=-1) - 1).abs().masked_fill(~state.active, 0)
        if length.numel() and length.max() > 1e-4:
            raise refuse("an address is not of unit length")
        honest = state._from_receipts()
        for name in ("mean", "covariance", "log_det"):
            want, got = getattr(honest, name), getattr(state, name)
            if (want - got).abs().max() > 1e-6 * max(1.0, float(want.abs().max())):
                raise refuse(f"its receipts do not give its {name}")
        return state.to(device)


# ------------------------------------------------------------------------------------------------------------------------ modules


class MemoryKeyEncoder(nn.Module):
    """Pictures -> keys of unit length, (..., C).

    A key is made of vision features alone: never of what is to be stored, or reading would give the label away. Features are
    standardised with training statistics (`calibrate`): raw mean-pooled features share one large direction and barely tell pictures
    apart.
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
        """Features of the vision tower (N, skip + patches, W) -> class token and mean of the patches, (N, 2 W), float32.

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

    S learned queries pool the raw embeddings; a bias on the position starts slot s at token s, and the projection starts as the
    identity where the widths allow: what the decoder reads back are words it knows. One pooled vector for the whole sentence taught a
    decoder nothing in the same time (docs/design.md).
    """

    def __init__(self, config: MicroVLMMemoryConfig, hidden_size: int):
        super().__init__()
        S, L = config.num_content_slots, config.max_content_tokens
        self.slot_queries = nn.Parameter(torch.empty(S, hidden_size))
        self.position_bias = nn.Parameter(torch.empty(S, L))
        self.v_proj = nn.Linear(hidden_size, config.code_size, bias=False)

    def values(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Token embeddings (..., D) -> unit vectors (..., C): rare words weigh as much as common ones."""
        value = self.v_proj(embeddings)
        return value / value.square().sum(-1, keepdim=True).add(1e-12).sqrt()

    def forward(self, embeddings: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        L, T = self.position_bias.shape[1], embeddings.shape[1]
        x, value = embeddings * mask.unsqueeze(-1), self.values(embeddings)
        scores = self.slot_queries @ x.mT / math.sqrt(x.shape[-1])  # (N, S, T)
        scores = F.pad(scores, (0, L - T)) + self.position_bias  # a slot past the end looks at nothing and stays zero
        return scores.softmax(-1)[..., :T] @ (value * mask.unsqueeze(-1))


class EpisodicMemory(nn.Module):
    """Addresses, and the learned parts of writing and reading.

    Args:
        config: K slots, code size C, how to address, noise.
        vision_size: width W of a vision feature.
        hidden_size: text width D.
        vocab_size: of the text model.
    """

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

    def train(self, mode: bool = True):
        """As the parent; what was computed once is dropped: a fused optimizer changes weights without counting up their version."""
        self._inverse = (None,)
        return super().train(mode)

    def address(self, keys: torch.Tensor) -> torch.Tensor:
        """Keys (..., C) -> unit addresses (..., K), float32 inside any autocast.

        `pseudoinverse`: w = k M_ref^T (M_ref M_ref^T + lambda I)^-1, an exact ridge solve by Cholesky; `ben_cohen`: k M_ref^+ by
        iteration; `gaussian`: softmax of -|k - m_i|^2 / (2 tau^2). Then w / |w|, so that the prior variance of every query is 1.
        """
        config = self.config
        with no_autocast(keys):
            k = keys.float()
            if config.addressing == "gaussian":
                reference = self.reference.float()
                distance = k.square().sum(-1, keepdim=True) - 2 * k @ reference.mT + reference.square().sum(-1)
                w = (-distance / (2 * config.address_temperature**2)).softmax(-1)
            else:
                w = k @ self.inverse()
            return F.normalize(w, dim=-1)

    def inverse(self) -> torch.Tensor:
        """The pseudo-inverse of M_ref, (C, K) float32; where no gradient is wanted, computed once for the same M_ref."""
        reference, config = self.reference, self.config
        version = None if reference.is_inference() else reference._version
        key = (
            config.addressing,
            config.address_ridge,
            config.ben_cohen_steps,
            reference.data_ptr(),
            version,
            reference.device,
        )
        if not torch.is_grad_enabled() and getattr(self, "_inverse", (None,))[0] == key:
            return self._inverse[1]
        a = reference.float()
        if config.addressing == "ben_cohen":
            inverse = ben_cohen_inverse(a, config.ben_cohen_steps)
        else:
            gram = a @ a.mT + config.address_ridge * torch.eye(len(a), device=a.device)
            inverse = torch.cholesky_solve(a, torch.linalg.cholesky(gram)).mT
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._inverse = key, inverse
        return inverse

    def ordered(self, keys: torch.Tensor) -> torch.Tensor:
        """Keys (R, E, C) of one episode per row, with what the bidirectional LSTM says of their order, when there is one.

        The same transform on write and on read (a query is an episode of one), and never across rows.
        """
        if self.order is None or not keys.shape[1]:
            return keys
        return F.normalize(keys + in_float32(OrderOutput(self.order), keys), dim=-1)

    def image_keys(self, vision_features: torch.Tensor, skip: int) -> torch.Tensor:
        """Vision features (N, skip + patches, W) -> keys (N, C), float32."""
        return in_float32(self.key_encoder, self.key_encoder.pool(vision_features, skip))

    def written_keys(self, keys: torch.Tensor, gray_keys: torch.Tensor | None) -> torch.Tensor:
        """Keys under which pictures are stored, of unit length (..., C): their own, drawn to those of their grey copies.

        The views that lie farthest from a picture are those without its colours; seeing it once more in grey brings them near,
        and costs a reader nothing.
        """
        if gray_keys is None:
            return keys
        return F.normalize(keys + self.config.gray_weight * gray_keys, dim=-1)

    @torch.no_grad()
    def calibrate_words(self, sentences: list[list[int]], smoothing: float = 0.01) -> None:
        """Weigh every token by how few sentences (token ids) have it, smoothing / (smoothing + share): smooth inverse frequency (Arora
        et al. 2017), so that a question is looked up by "penguin" and not by "is" and "the".
        """
        counts = torch.zeros(len(self.word_weight), dtype=torch.float64)
        for ids in sentences:
            counts[sorted(set(ids))] += 1
        self.word_weight.copy_(smoothing / (smoothing + counts / max(1, len(sentences))))

    def weigh_words(self, ids: torch.Tensor) -> torch.Tensor:
        """Weights of tokens, in the shape of `ids`, float32; 1 for those added to the vocabulary since."""
        known = ids < len(self.word_weight)
        return self.word_weight.float()[ids * known].masked_fill(~known, 1.0)

    def match(self, state: MemoryState, words: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """How much of what a question asks the stored sentences say, (R, Q, N): the weighted mean over its words (R, Q, T, C), weights
        (R, Q, T), of the largest cosine with a content slot (late interaction, arXiv 2004.12832); about 1 where all are said.
        """
        R, Q, T, C = words.shape
        slots = F.normalize(state.contents.float().view(R, -1, C), dim=-1)  # (R, N S, C)
        with no_autocast(words):
            cosines = words.reshape(R, Q * T, C).float() @ slots.mT
        best = cosines.view(R, Q, T, -1, self.config.num_content_slots).amax(-1)  # (R, Q, T, N)
        return (best * weights.unsqueeze(-1)).sum(2) / weights.sum(2, keepdim=True).clamp(min=1e-6)

    def words(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Token embeddings (..., D) -> unit vectors in the space of contents (..., C), float32."""
        return in_float32(WordValues(self.content_encoder), embeddings)

    def contents(self, embeddings: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Token embeddings (N, L, D) with mask (N, L) -> contents (N, S x C), float32."""
        return in_float32(self.content_encoder, embeddings, mask).flatten(1)

    def new_state(self, rows: int, fingerprint: str = "", dtype=torch.float64, device=None) -> MemoryState:
        config = self.config
        size = config.num_content_slots * config.code_size
        return MemoryState.new(
            rows,
            config.num_slots,
            size,
            config.observation_noise,
            config.max_items,
            config.max_content_tokens,
            fingerprint,
            dtype,
            device,
        )

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
        """The state after an episode of E items per row: keys (R, E, C), contents (R, E, S x C).

        In training the address is a sample (learned log-variance) and the content carries observation noise; in eval both are exact.
        """
        if self.order is not None and active is not None and not bool(active.all()):
            raise ValueError("with ordering='lstm' every row's episode must be of the same length.")
        addresses = self.address(self.ordered(keys))
        observed = None
        if self.training:
            noise = math.sqrt(self.config.observation_noise / contents.shape[-1])
            observed = self.sample(addresses), contents + noise * torch.randn_like(contents)
        to = lambda t: None if t is None else t.to(state.device)  # noqa: E731
        observed = None if observed is None else tuple(map(to, observed))
        method = method or self.config.write_method
        return state.write(to(addresses), to(contents), labels, to(active), method, observed, to(token_ids))

    def sample(self, addresses: torch.Tensor) -> torch.Tensor:
        """A draw from the address posterior N(w, diag(exp(log variance)) / K)."""
        std = (0.5 * self.address_log_variance.float()).exp() / math.sqrt(addresses.shape[-1])
        return addresses + std * torch.randn_like(addresses)

    def read(self, state: MemoryState, query: MemoryQuery) -> tuple[MemoryRead, torch.Tensor]:
        """What the state says to a query, B / R neighbouring rows to each of its R rows, and the addresses asked, (R, B / R, K).

        A picture's address is a function of its key. Words have none: they are compared with the stored sentences, and the address
        is that of the sentences they match.
        """
        R, C = state.num_rows, query.keys.shape[-1]
        addresses = self.address(self.ordered(query.keys.view(-1, 1, C))).view(R, -1, self.config.num_slots)
        asked = (self.sample(addresses) if self.training else addresses).to(state.device)
        similarity = by_words = None
        if query.words is not None:
            words, weights = (
                t.view(*asked.shape[:2], *t.shape[1:]).to(state.device) for t in (query.words, query.weights)
            )
            match, by_words = (
                self.match(state, words, weights),
                query.by_words.view(*asked.shape[:2], 1).to(state.device),
            )
            drawn = state.draw(match, WORD_SHARPNESS)
            similarity = torch.where(by_words, match.to(state.mean.dtype), state.similarity(asked.to(state.mean.dtype)))
            asked = torch.where(by_words, drawn, asked)
            addresses = torch.where(by_words, drawn, addresses.to(state.device)).to(addresses.device)
        # the state may live on another device, one that has float64
        read = state.read(asked, self.config.read_sharpness, similarity, by_words)
        return MemoryRead(**{name: value.to(addresses.device) for name, value in vars(read).items()}), addresses


class OrderOutput(nn.Module):
    """The outputs of an LSTM without its state."""

    def __init__(self, lstm: nn.LSTM):
        super().__init__()
        self.lstm = lstm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lstm(x)[0]


class WordValues(nn.Module):
    """`values` of a content encoder as a module of its own."""

    def __init__(self, encoder: MemoryContentEncoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        return self.encoder.values(embeddings)


class MemoryProjection(nn.Module):
    """W_M: a read-out (B, S' x C) -> keys and values of S memory tokens for every decoder layer, (B, layers, 2, heads, S, head_dim).

    With S' = S content slots, slot s becomes token s through one map that all slots share, plus a bias per slot; with S' = 1, the
    seed's single vector, one map makes all S tokens. `kv_rank` factors the map.
    """

    def __init__(self, config: MicroVLMMemoryConfig, num_layers: int, num_heads: int, head_dim: int):
        super().__init__()
        self.num_slots, self.num_tokens = config.num_content_slots, config.num_memory_tokens
        self.shape = (num_layers, 2, num_heads, head_dim)
        per_token = math.prod(self.shape)
        out = per_token * (self.num_tokens // self.num_slots)
        self.down = None
        width = config.code_size
        if config.kv_rank is not None:
            self.down = nn.Linear(width, config.kv_rank, bias=False)
            width = config.kv_rank
        self.up = nn.Linear(width, out, bias=False)
        self.token_bias = nn.Parameter(torch.empty(self.num_tokens, per_token))

    def forward(self, content: torch.Tensor) -> torch.Tensor:
        B = len(content)
        x = content.view(B, self.num_slots, -1)
        # the scale of a read falls with the load; a slot that holds nothing stays small beside those that do
        x = x / (x.square().mean((1, 2), keepdim=True) + 1e-8).sqrt()
        x = self.up(x if self.down is None else self.down(x))
        x = x.view(B, self.num_tokens, -1) + self.token_bias
        return x.view(B, self.num_tokens, *self.shape).permute(0, 2, 3, 4, 1, 5)


class ScopeNet(nn.Module):
    """Does the memory know this query? Context key (..., C) and what the read said (..., 9) -> logit (...).

    The statistics are the three largest similarities of the query to stored items, mean and standard deviation of all of them, the
    predictive variance, the load, and whether it asks in words: the best of many cosines is high by chance, and the more so the more alike the stored items are.
    """

    def __init__(self, config: MicroVLMMemoryConfig):
        super().__init__()
        self.context = (
            nn.Linear(config.code_size, config.scope_hidden_size, bias=False) if config.scope_context else None
        )
        self.statistics = nn.Linear(NUM_SCOPE_STATISTICS, config.scope_hidden_size)
        self.hidden = nn.Linear(config.scope_hidden_size, config.scope_hidden_size)
        self.out = nn.Linear(config.scope_hidden_size, 1)

    def forward(self, key: torch.Tensor, statistics: torch.Tensor) -> torch.Tensor:
        x = self.statistics(statistics)
        if self.context is not None:
            x = x + self.context(key)
        return self.out(F.gelu(self.hidden(F.gelu(x)))).squeeze(-1)


def scope_threshold(threshold: float | list[list[float]], facts: torch.Tensor) -> torch.Tensor:
    """Probability from which a memory of that many facts applies, in the shape of `facts`, float32.

    Args:
        threshold: one for all, or pairs [facts, probability] in rising order; between them the logit is linear in log(1 + facts), beyond
            them constant.
        facts: number of facts in each memory.
    """
    if isinstance(threshold, float):
        return torch.full(facts.shape, threshold, device=facts.device)
    table = torch.tensor(threshold, dtype=torch.float64, device=facts.device)
    x, y, at = table[:, 0].log1p(), table[:, 1].logit(), facts.double().log1p()
    right = torch.searchsorted(x, at).clamp(1, len(x) - 1) if len(x) > 1 else torch.zeros_like(facts)
    left = (right - 1).clamp(min=0)
    share = ((at - x[left]) / (x[right] - x[left]).clamp(min=1e-9)).clamp(0, 1)
    return (y[left] + share * (y[right] - y[left])).sigmoid().float()


@dataclass
class MemoryReadout:
    """What a memory adds to a forward pass of B rows.

    Args:
        key_values: (B, layers, 2, heads, S, head_dim).
        log_gate: added to the attention scores of the memory tokens, (B,): 0 is on, -inf off.
        scope_logits: of ScopeNet, (B,).
        content: read-out (B, S, C).
        address: of the query, (B, K).
        memory_kl, address_kl: means over rows, ().
    """

    key_values: torch.Tensor
    log_gate: torch.Tensor
    scope_logits: torch.Tensor
    content: torch.Tensor
    address: torch.Tensor
    memory_kl: torch.Tensor | None = None
    address_kl: torch.Tensor | None = None

    def repeat_interleave(self, repeats: int) -> "MemoryReadout":
        fields = ("key_values", "log_gate", "scope_logits", "content", "address")
        return replace(self, **{name: getattr(self, name).repeat_interleave(repeats, 0) for name in fields})


__all__ = [
    "EpisodicMemory",
    "MemoryProjection",
    "MemoryQuery",
    "MemoryReadout",
    "MemoryState",
    "ScopeNet",
    "scope_threshold",
]
