"""The state of an episodic memory: its posterior, a receipt of every item, and its file.

    write  -> mean M (K, Z), covariance Sigma (K, K)      one of `WRITE_METHODS`
    read   -> content w M, variance w Sigma w^T
    forget -> the down-date of one observation            `sherman_morrison` with sign -1

A receipt is the address and the content of an item. It makes forgetting exact, and a file can be checked by it: the
receipts must give the posterior.
"""

import glob
import json
import os
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from .configuration_microvlm import require
from .memory_posterior_microvlm import (
    WRITE_METHODS,
    Posterior,
    direct_write,
    draw_address,
    memory_kl,
    no_autocast,
    read_statistics,
    sherman_morrison,
)

FORMAT, FORMAT_VERSION = "microvlm-memory", "1"
FILE_TYPES = {torch.float64: "F64", torch.float32: "F32", torch.int64: "I64", torch.bool: "BOOL"}
DOWNDATE_NOISE = 1e-3  # below, a down-date loses digits: at 1e-5 the mean is off by 1e-5 after forgetting 296 of 300
LATEST_TIME = 253402300800.0  # the year 10000, the first that datetime cannot hold


@dataclass
class MemoryRead:
    """The answer of R memories to Q queries each."""

    content: torch.Tensor  # read-out w M, (R, Q, Z)
    variance: torch.Tensor  # w Sigma w^T, (R, Q): 1 where nothing was written, near 0 on a written address
    coefficients: torch.Tensor  # share of every item in the read-out, a Sigma W^T / noise for the address a, (R, Q, N)
    statistics: torch.Tensor  # the input of ScopeNet, (R, Q, 9)


@dataclass(repr=False)
class MemoryRows:
    """The tensors of R memories, one per row, and what can be done with rows."""

    # the posterior
    mean: torch.Tensor  # M (R, K, Z)
    covariance: torch.Tensor  # Sigma (R, K, K)
    log_det: torch.Tensor  # log det Sigma (R,)
    # what was written, in N places per row
    addresses: torch.Tensor  # (R, N, K) float32
    contents: torch.Tensor  # (R, N, Z) float32
    active: torch.Tensor  # (R, N), whether a place holds an item
    uids: torch.Tensor  # (R, N) int64, a random number per item, by which `merge` knows copies
    times: torch.Tensor  # (R, N) float64, seconds since 1970, UTC
    token_ids: torch.Tensor  # (R, N, L) int64, the sentence in tokens, padded with -1
    labels: list[list[str]]  # per row and place, a name for the item, or an empty text
    noise: float  # variance of the observation noise
    max_items: int  # most items a row may hold
    fingerprint: str  # of the model that writes and reads

    POSTERIOR = ("mean", "covariance", "log_det")
    RECEIPTS = ("addresses", "contents", "active", "uids", "times", "token_ids")
    TENSORS = POSTERIOR + RECEIPTS

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
    ) -> "MemoryRows":
        """Make empty memories: mean 0, covariance the identity.

        In float64: a float32 state drifts by some 1e-3 over a thousand writes and down-dates. Training uses float32,
        for one batch at a time.
        """

        def zeros(*shape, dtype=torch.float32):
            return torch.zeros(rows, *shape, dtype=dtype, device=device)

        return cls(
            mean=zeros(num_slots, content_size, dtype=dtype),
            covariance=torch.eye(num_slots, dtype=dtype, device=device).expand(rows, -1, -1).clone(),
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
    def posterior(self) -> Posterior:
        return self.mean, self.covariance, self.log_det

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
        """Bytes of the posterior, whose size is fixed, and of the receipts."""
        groups = {"posterior": self.POSTERIOR, "receipts": self.RECEIPTS}
        return {group: sum(getattr(self, name).nbytes for name in names) for group, names in groups.items()}

    def __repr__(self) -> str:
        K, Z = self.mean.shape[1:]
        return f"MemoryState(rows={self.num_rows}, slots={K}, content_size={Z}, items={self.counts.tolist()})"

    def describe(self, processor=None) -> str:
        """List the items, one line each, with the numbers that `forget` and `edit` take.

        Args:
            processor: a processor or tokenizer of the model, to spell out sentences; default: labels and counts.
        """
        lines = []
        for row in range(self.num_rows):
            # how many, then each
            places = self.places(row)
            items = f"{len(places)} item{'' if len(places) == 1 else 's'} of at most {self.max_items}"
            lines.append(f"memory {row}: {items}" if self.num_rows > 1 else f"memory: {items}")
            items = (describe_item(self, row, place, processor) for place in places)
            lines += [f"  {number}. {item}" for number, item in enumerate(items)]
        return "\n".join(lines)

    def places(self, row: int) -> list[int]:
        """Places of a row that hold an item, in the order of their numbers."""
        return torch.nonzero(self.active[row]).flatten().tolist()

    def find(self, item: int | str, row: int | None = None) -> tuple[int, int]:
        """Find the row and place of an item by its number in `describe()` or by its label."""
        # row
        R, row = self.num_rows, 0 if row is None and self.num_rows == 1 else row
        require(row is not None, f"the memory has {R} rows: say in which one with row=.")
        require(0 <= row < R, f"row {row} is not in this memory, which has {R}.")
        # place, by label or by number
        places = self.places(row)
        if isinstance(item, str):
            matches = [place for place in places if self.labels[row][place] == item]
            require(len(matches) > 0, f"{item!r} is not in the memory.")
            require(len(matches) == 1, f"{item!r} is stored {len(matches)} times: give its number.")
            return row, matches[0]
        require(0 <= item < len(places), f"item {item} is not in the memory, which holds {len(places)}.")
        return row, places[item]

    # ---- rows

    def _map(self, function) -> "MemoryRows":
        return replace(self, **{name: function(getattr(self, name)) for name in self.TENSORS})

    def _compact(self) -> "MemoryRows":
        """Move every row's items to its first places, and drop places that no row needs."""
        widest = int(self.counts.max()) if self.num_rows else 0
        order = (~self.active).long().argsort(dim=1, stable=True)[:, :widest]  # items first, in their order
        if widest == self.active.shape[1] and bool((order == torch.arange(widest, device=order.device)).all()):
            return self
        rows = torch.arange(self.num_rows, device=order.device).unsqueeze(1)
        receipts = {name: getattr(self, name)[rows, order] for name in self.RECEIPTS}
        labels = [[names[i] for i in places] for names, places in zip(self.labels, order.tolist(), strict=True)]
        return replace(self, **receipts, labels=labels)

    def to(self, device: torch.device | str) -> "MemoryRows":
        return self._map(lambda t: t.to(device))

    def select(self, rows: list[int] | torch.Tensor) -> "MemoryRows":
        """Return the given rows, in the given order; a row may come more than once."""
        if torch.as_tensor(rows).dtype == torch.bool:
            raise TypeError("select takes the numbers of rows, not a mask of booleans.")
        index = torch.as_tensor(rows, dtype=torch.long, device=self.device)
        labels = [list(self.labels[i]) for i in index.tolist()]
        return replace(self._map(lambda t: t[index]), labels=labels)._compact()

    @staticmethod
    def stack(states: list["MemoryRows"]) -> "MemoryRows":
        """Return the rows of all states, one after the other; the states must be of one model."""
        require(len(states) > 0, "stack needs at least one memory.")
        for state in states[1:]:
            check_kin(states[0], state)
        # receipts of the same number of places
        N = max(state.active.shape[1] for state in states)
        tensors = {}
        for name in MemoryRows.TENSORS:
            parts = [getattr(state, name).to(states[0].device) for state in states]
            if name in MemoryRows.RECEIPTS:
                parts = [torch.cat([t, t.new_zeros(len(t), N - t.shape[1], *t.shape[2:])], 1) for t in parts]
            tensors[name] = torch.cat(parts)
        labels = [[*row, *[""] * (N - len(row))] for state in states for row in state.labels]
        return replace(states[0], **tensors, labels=labels, max_items=max(state.max_items for state in states))


@dataclass(repr=False)
class MemoryState(MemoryRows):
    """R memories, one per row: a posterior, and a receipt of every item.

    Never changed in place: every verb returns a new state, so a failed call leaves the old one as it was.
    """

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
        """Return the state after N observations per row; what does not fit is a ValueError.

        Args:
            addresses, contents: unit vectors (R, N, K), and (R, N, Z).
            labels: names of the items, per row; default: empty.
            active: (R, N), False for places to leave out; default: all.
            method: a key of `WRITE_METHODS`; the posterior is the same.
            observed: noisy addresses and contents to write instead, in training; the receipts hold the exact ones.
            token_ids: the sentences (R, N, L), padded with -1.
        """
        # defaults for what is left out, and one check of all
        shape = (self.num_rows, addresses.shape[1] if addresses.ndim == 3 else -1)
        labels = labels or [[""] * shape[1] for _ in range(shape[0])]
        if token_ids is None:
            token_ids = self.token_ids.new_full((*addresses.shape[:2], self.token_ids.shape[2]), -1)
        if active is None:
            active = torch.ones(addresses.shape[:2], dtype=torch.bool, device=self.device)
        check_episode(self, shape, addresses, contents, labels, active, token_ids)
        require(method in WRITE_METHODS, f"write method {method!r} is not one of {', '.join(WRITE_METHODS)}.")
        # receipts: a place left out holds nothing
        addresses, contents = (t.float().masked_fill(~active.unsqueeze(-1), 0) for t in (addresses, contents))
        uids = torch.tensor([[uuid.uuid4().int >> 65 for _ in row] for row in labels], dtype=torch.long, device="cpu")
        times = torch.full(shape, time.time(), dtype=torch.float64, device="cpu")
        receipts = {
            "addresses": addresses,
            "contents": contents,
            "active": active,
            "uids": uids.view(shape).to(self.device) * active,
            "times": times.to(self.device) * active,
            "token_ids": token_ids.to(self.device).masked_fill(~active.unsqueeze(-1), -1),
        }
        labels = [[x if on else "" for x, on in zip(*row)] for row in zip(labels, active.tolist())]
        # posterior
        w, z = (t.to(self.mean.dtype) for t in observed or (addresses, contents))
        with no_autocast(w):
            posterior = WRITE_METHODS[method](*self.posterior, w, z, self.noise, active)
        return replace(
            self,
            **dict(zip(self.POSTERIOR, posterior)),
            **{name: torch.cat([getattr(self, name), receipt], 1) for name, receipt in receipts.items()},
            labels=[[*old, *new] for old, new in zip(self.labels, labels, strict=True)],
        )

    def forget(self, item: int | str, row: int | None = None) -> "MemoryState":
        """Return the state as if `item` (see `find`) had never been written.

        The exact down-date from its receipt; with little observation noise, where a down-date loses digits, the
        posterior is computed again from the other receipts.
        """
        row, place = self.find(item, row)
        # down-date
        sign = torch.zeros(self.num_rows, dtype=self.mean.dtype, device=self.device)
        sign[row] = -1
        w, z = (t[:, place].to(self.mean.dtype) for t in (self.addresses, self.contents))
        with no_autocast(w):
            posterior = sherman_morrison(*self.posterior, w, z, self.noise, sign)
        # nothing of the receipt stays, even where another row still uses the place
        receipts = {name: getattr(self, name).clone() for name in self.RECEIPTS}
        for name, receipt in receipts.items():
            receipt[row, place] = -1 if name == "token_ids" else 0
        labels = [list(names) for names in self.labels]
        labels[row][place] = ""
        state = replace(self, **dict(zip(self.POSTERIOR, posterior)), labels=labels, **receipts)
        if self.noise < DOWNDATE_NOISE:
            state = replace(state, **dict(zip(self.POSTERIOR, state.posterior_of_receipts())))
        # an empty row is the prior itself, without a trace of rounding
        if not state.active[row].any():
            state.mean[row], state.log_det[row] = 0, 0
            state.covariance[row] = torch.eye(state.mean.shape[1], dtype=state.mean.dtype, device=self.device)
        return state._compact()

    def edit(
        self,
        item: int | str,
        content: torch.Tensor,
        label: str = "",
        row: int | None = None,
        token_ids: torch.Tensor | None = None,
    ) -> "MemoryState":
        """Return the state with another content (Z,) and sentence (L,) for `item`, which becomes the last one."""
        row, place = self.find(item, row)
        # an episode of one item, in this row alone
        contents = content.new_zeros(self.num_rows, 1, content.numel())
        contents[row, 0] = content.flatten()
        active = torch.zeros(self.num_rows, 1, dtype=torch.bool, device=self.device)
        active[row] = True
        labels = [[label if r == row else ""] for r in range(self.num_rows)]
        if token_ids is not None:
            token_ids = token_ids.view(1, 1, -1).expand(self.num_rows, -1, -1)
        # write under the old address, then forget the old item: for a moment there is one more
        roomy = replace(self, max_items=self.max_items + 1)
        addresses = self.addresses[:, place : place + 1]
        state = roomy.write(addresses, contents.to(self.device), labels, active, token_ids=token_ids)
        return replace(state.forget(self.places(row).index(place), row), max_items=self.max_items)

    def similarity(self, addresses: torch.Tensor) -> torch.Tensor:
        """Cosines of addresses (R, Q, K) with the stored ones, (R, Q, N); 0 on empty places."""
        return (addresses @ self.addresses.to(addresses.dtype).mT).masked_fill(~self.active.unsqueeze(1), 0)

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
            sharpness: read at the address drawn to the nearest items, see `draw_address`; 0 at the query's own.
            similarity: of the queries to the items (R, Q, N); default: that of their addresses.
            by_words: whether a query is a question in words, (R, Q, 1); default: none is.
        """
        w = queries.to(self.mean.dtype)
        with no_autocast(w):
            similarity = self.similarity(w) if similarity is None else similarity.to(w.dtype)
            variance = ((w @ self.covariance) * w).sum(-1)
            # the address to read at, what lies there, and from which items it comes
            at = draw_address(self.addresses, self.active, similarity, sharpness) if sharpness > 0 else w
            content = at @ self.mean
            shares = at @ self.covariance @ self.addresses.to(w.dtype).mT / self.noise
            coefficients = shares.masked_fill(~self.active.unsqueeze(1), 0)
        statistics = read_statistics(similarity, variance, self.active, self.mean.shape[1], by_words)
        return MemoryRead(content.float(), variance.float(), coefficients.float(), statistics.float())

    def kl(self) -> torch.Tensor:
        """KL of the posterior from the prior per row, (R,); see `memory_kl`."""
        return memory_kl(*self.posterior)

    def posterior_of_receipts(self) -> Posterior:
        """Compute the posterior from the receipts alone."""
        prior = torch.eye(self.mean.shape[1], dtype=self.mean.dtype, device=self.device).expand_as(self.covariance)
        prior = torch.zeros_like(self.mean), prior, torch.zeros_like(self.log_det)
        w, z = (t.to(self.mean.dtype) for t in (self.addresses, self.contents))
        with no_autocast(w):
            return direct_write(*prior, w, z, self.noise, self.active)

    def merge(self, other: "MemoryState") -> "MemoryState":
        """Return the items of both, row by row; an item and its copy count once."""
        check_kin(self, other)
        rows = self.num_rows, other.num_rows
        require(rows[0] == rows[1], f"memories of {rows[0]} and {rows[1]} rows cannot be merged.")
        if not other.active.shape[1]:
            return self
        # items of the other that are no copies
        other = other.to(self.device)
        known = ((other.uids.unsqueeze(2) == self.uids.unsqueeze(1)) & self.active.unsqueeze(1)).any(2)
        active, N = other.active & ~known, self.active.shape[1]
        state = self.write(
            other.addresses, other.contents, other.labels, active, method="direct", token_ids=other.token_ids
        )
        # copies keep their number and their time
        state.uids[:, N:], state.times[:, N:] = other.uids * active, other.times * active
        return state._compact()

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file, whole or not at all; a link stays a link to the new file."""
        metadata = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "labels": json.dumps(self.labels),
            "noise": repr(self.noise),
            "max_items": str(self.max_items),
        }
        tensors = {name: getattr(self, name).detach().cpu().contiguous() for name in self.TENSORS}
        # a new file, on the disk before it has the name
        path = os.path.realpath(path)
        temporary = f"{path}.{uuid.uuid4().hex[:8]}.part"
        try:
            with open(temporary, "xb") as file:
                file.write(to_bytes(tensors, metadata))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
        # what killed processes have left
        for part in glob.glob(f"{glob.escape(path)}.*.part"):
            with suppress(OSError):  # another process was first
                if time.time() - os.path.getmtime(part) > 3600:
                    os.unlink(part)

    @classmethod
    def load(
        cls, path: str | os.PathLike, expected: "MemoryState", device: torch.device | str = "cpu"
    ) -> "MemoryState":
        """Read a file that may come from anywhere; a ValueError says what does not fit.

        Args:
            expected: an empty memory of the model that will read it: its shapes, noise, `max_items` and fingerprint.
        """
        refused = f"memory file {path} is refused"
        require(os.path.isfile(path) or not os.path.exists(path), f"{refused}: it is not a file.")
        try:
            with safe_open(path, "pt") as file:
                check_header(file, expected)  # first: no tensor is read of a file that does not fit
                state = state_of(file, expected)
            check_content(state, expected)
        except (SafetensorError, ValueError) as error:
            why = error if isinstance(error, ValueError) else f"it is not a whole safetensors file ({error})"
            raise ValueError(f"{refused}: {why}.") from error
        return replace(state, max_items=expected.max_items).to(device)


def describe_item(state: MemoryState, row: int, place: int, processor=None) -> str:
    """Describe an item by its label, its sentence and its time."""
    # label, sentence and time
    when = datetime.fromtimestamp(float(state.times[row, place]), UTC)
    label, ids = state.labels[row][place], state.token_ids[row, place]
    ids = ids[ids >= 0].tolist()
    text = f"{len(ids)} tokens"
    if processor is not None:
        text = repr(processor.decode(ids, skip_special_tokens=True).strip())
    text = f"{label!r}: {text}" if label and repr(label) != text else text
    return f"{text} (written {when:%Y-%m-%d %H:%M:%S} UTC)"


def check_episode(state: MemoryState, shape: tuple, addresses, contents, labels, active, token_ids) -> None:
    """Raise a ValueError unless an episode of (R, N) items fits into a state."""
    # shapes
    (R, N), (K, Z), L = shape, state.mean.shape[1:], state.token_ids.shape[2]
    require(
        addresses.shape == (R, N, K) and contents.shape == (R, N, Z),
        f"a memory of {R} rows, {K} slots and content size {Z} takes addresses ({R}, N, {K}) and contents "
        f"({R}, N, {Z}), got {tuple(addresses.shape)} and {tuple(contents.shape)}.",
    )
    # values
    require(bool(torch.isfinite(addresses).all()), "memory addresses are not finite: nothing was written.")
    require(bool(torch.isfinite(contents).all()), "memory contents are not finite: nothing was written.")
    fullest, most = int((state.counts + active.sum(1)).max()), state.max_items
    require(fullest <= most, f"the memory is full: {fullest} items, at most {most} fit. Nothing was written.")
    # names and sentences
    require(are_labels(labels, R, N), f"labels must be {R} lists of {N} texts.")
    ids = tuple(token_ids.shape)
    require(ids == (R, N, L), f"token_ids must have the shape {(R, N, L)}, got {ids}.")


def are_labels(labels, rows: int, items: int) -> bool:
    """Whether `labels` is a list of R lists of N texts."""
    lists = isinstance(labels, list) and len(labels) == rows and all(isinstance(row, (list, tuple)) for row in labels)
    return lists and all(len(row) == items and all(isinstance(label, str) for label in row) for row in labels)


def check_kin(state: MemoryState, other: MemoryState) -> None:
    """Raise a ValueError unless two states are of one model."""
    a, b = state.fingerprint, other.fingerprint
    require(a == b, f"memories of different models: fingerprints {a!r} and {b!r}.")
    same = state.mean.shape[1:] == other.mean.shape[1:] and state.noise == other.noise
    require(same, "memories of different shape or observation noise cannot be joined.")


# ----------------------------------------------------------------------------------------------------------------- file


def check_header(file, expected: MemoryState) -> None:
    """Refuse an open file whose format, fingerprint, names, types or shapes do not fit."""
    metadata = file.metadata() or {}
    version, theirs, own = metadata.get("version"), metadata.get("fingerprint"), expected.fingerprint
    # of this format and this model
    require(metadata.get("format") == FORMAT, "it is not a memory of MicroVLM")
    require(version == FORMAT_VERSION, f"format version {version}, this code reads {FORMAT_VERSION}")
    require(theirs == own, f"it was written by another model (fingerprint {theirs}, this model's is {own})")
    names, wanted = sorted(file.keys()), sorted(MemoryState.TENSORS)
    require(names == wanted, f"its tensors are {', '.join(names)}, expected {', '.join(wanted)}")
    # number of rows and places, by which all other shapes are known
    R, N = (*file.get_slice("addresses").get_shape(), 0, 0)[:2]
    require(R > 0, "it has no rows")
    fits = N <= 4 * expected.max_items
    require(fits, f"it holds {N} places, more than a memory of {expected.max_items} items needs")
    # type and shape of each tensor
    for name in MemoryState.TENSORS:
        like, tensor = getattr(expected, name), file.get_slice(name)
        lead = (R, N) if name in MemoryState.RECEIPTS else (R,)
        wanted = FILE_TYPES[like.dtype], (*lead, *like.shape[len(lead) :])
        stored = tensor.get_dtype(), tuple(tensor.get_shape())
        require(stored == wanted, "{} is {} {}, expected {} {}", name, *stored, *wanted)


def state_of(file, expected: MemoryState) -> MemoryState:
    """Read an open file whose header fits."""
    metadata = file.metadata()
    try:
        labels, noise = json.loads(metadata.get("labels", "")), float(metadata.get("noise", ""))
        max_items = int(metadata.get("max_items", ""))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its metadata cannot be read ({error})") from error
    tensors = {name: file.get_tensor(name) for name in MemoryState.TENSORS}
    return MemoryState(**tensors, labels=labels, noise=noise, max_items=max_items, fingerprint=expected.fingerprint)


def check_content(state: MemoryState, expected: MemoryState) -> None:
    """Refuse content that cannot be used; last and strictest, its receipts must give its posterior."""
    for name in state.TENSORS:
        tensor = getattr(state, name)
        finite = not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
        require(finite, f"{name} has values that are not finite")
    # metadata
    R, N = state.active.shape
    require(are_labels(state.labels, R, N), f"its labels are not {R} lists of {N} texts")
    theirs, own = state.noise, expected.noise
    require(theirs == own, f"its observation noise is {theirs}, this model's is {own}")
    # values that a tokenizer or a calendar cannot take
    ids = state.token_ids
    known = ((ids >= -1) & (ids < 2**31)).all() and (ids[..., 1:] < 0).logical_or(ids[..., :-1] >= 0).all()
    require(bool(known), "it has impossible token ids")
    for uids, active in zip(state.uids, state.active):
        require(len(uids[active].unique()) == active.sum(), "two items have one uid")
    past = ((state.times >= 0) & (state.times < LATEST_TIME)).all()
    require(bool(past), "an item was written at an impossible time")
    # items, and the posterior that they give
    fullest, most = int(state.counts.max()), min(expected.max_items, state.max_items)
    require(fullest <= most, f"a row holds {fullest} items, at most {expected.max_items} fit")
    length = (state.addresses.norm(dim=-1) - 1).abs().masked_fill(~state.active, 0)
    require(bool((length <= 1e-4).all()), "an address is not of unit length")
    for name, exact in zip(state.POSTERIOR, state.posterior_of_receipts()):
        error = (exact - getattr(state, name)).abs().max()
        require(bool(error <= 1e-6 * max(1.0, float(exact.abs().max()))), f"its receipts do not give its {name}")
