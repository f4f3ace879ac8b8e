"""The episodic memory against the textbook: ridge regression, Gaussians, exact forgetting, files from anywhere."""

import copy
import json
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import IMAGE_ID, tiny_inputs, tiny_model
from huggingface_hub.errors import StrictDataclassError
from microvlm.addressing_microvlm import address_keys, ben_cohen_inverse
from microvlm.configuration_microvlm import MicroVLMConfig, MicroVLMMemoryConfig
from microvlm.memory_microvlm import MemoryQuery, ScopeNet, scope_threshold
from microvlm.memory_posterior_microvlm import (
    address_kl,
    direct_write,
    draw_address,
    memory_kl,
    sherman_morrison,
)
from microvlm.memory_state_microvlm import MemoryState
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributions import MultivariateNormal, Normal, kl_divergence

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
TIGHT = {"rtol": 1e-9, "atol": 1e-9}
MEMORY = {"num_slots": 16, "code_size": 32, "num_memory_tokens": 6, "max_content_tokens": 16}
MEMORY |= {"key_hidden_size": 32, "scope_hidden_size": 16, "observation_noise": 0.1}
K, C, Z = 16, 32, 6 * 32
NAN = torch.full((2, 1, K), torch.nan)
NO_MEMORY = "this model has no episodic memory: build it with config.use_memory=True."
FACT = "a fact to write is one image and its words."
TYPED = (
    "a sentence has a control token between its words: write it as text, by tokenizer(..., split_special_tokens=True)."
)
FULL = "the memory is full: {} items, at most {} fit. Nothing was written."


def memory_model(**memory):
    return tiny_model("qwen2", use_memory=True, memory_config=MEMORY | memory)


@pytest.fixture(scope="module")
def model():
    """For tests that leave its weights alone."""
    return memory_model()


def observations(rows, items, slots=K, size=8, seed=0):
    """Unit addresses (rows, items, slots) and contents (rows, items, size), float32."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, items, slots, generator=g)
    return F.normalize(w, dim=-1), torch.randn(rows, items, size, generator=g)


def new_state(rows=1, slots=K, size=8, noise=0.1, max_items=64):
    return MemoryState.new(rows, slots, size, noise, max_items, 5, "model")


def written(rows=1, items=3, seed=0, **kwargs):
    state = new_state(rows, **kwargs)
    w, z = observations(rows, items, state.mean.shape[1], state.mean.shape[2], seed)
    labels = [[f"{r}-{seed}-{n}" for n in range(items)] for r in range(rows)]
    tokens = torch.arange(rows * items * 5).view(rows, items, 5) + 100 * seed
    return state.write(w, z, labels, token_ids=tokens)


def ridge(w, z, noise, prior_variance=1.0):
    """Bayesian linear regression by the normal equations, float64: mean, covariance, log det of one memory."""
    w, z = w.double(), z.double()
    precision = torch.eye(w.shape[1]).double() / prior_variance + w.mT @ w / noise
    covariance = precision.inverse()
    return covariance @ w.mT @ z / noise, covariance, -torch.logdet(precision)


def posterior(state):
    return state.mean, state.covariance, state.log_det


def assert_is_ridge(got, w, z, noise, tolerance=1e-9):
    for row in range(len(w)):
        for a, b in zip(got, ridge(w[row], z[row], noise)):
            assert (a[row] - b).abs().max() <= tolerance * b.abs().max()


def assert_same_state(a, b):
    for name in MemoryState.TENSORS:
        x, y = getattr(a, name), getattr(b, name)
        assert x.dtype == y.dtype and x.equal(y), name
    for name in ("labels", "noise", "max_items", "fingerprint"):
        assert getattr(a, name) == getattr(b, name), name


def assert_close_state(a, b, **tolerance):
    for x, y in zip(posterior(a), posterior(b)):
        torch.testing.assert_close(x, y, **(tolerance or TIGHT))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@contextmanager
def unchanged(*states):
    before = copy.deepcopy(states)
    yield
    for state, old in zip(states, before):
        assert_same_state(state, old)


@contextmanager
def refused(message, *states):
    """A ValueError of exactly this message, and the states as they were."""
    with unchanged(*states):
        with pytest.raises(ValueError) as error:
            yield
    assert str(error.value) == message


class TestPosterior:
    def test_every_way_of_writing_is_ridge_regression(self):
        w, z = observations(3, 7, 8, 5)
        w, z = w.double(), z.double()
        start = posterior(new_state(3, 8, 5))
        one_by_one, backwards = start, start
        for n in range(7):
            one_by_one = sherman_morrison(*one_by_one, w[:, n], z[:, n], 0.1)
            backwards = sherman_morrison(*backwards, w[:, 6 - n], z[:, 6 - n], 0.1)
        for got in (one_by_one, backwards, direct_write(*start, w, z, 0.1)):
            assert_is_ridge(got, w, z, 0.1)
        # in two parts: the second starts from a posterior that is no prior
        half = direct_write(*direct_write(*start, w[:, :3], z[:, :3], 0.1), w[:, 3:], z[:, 3:], 0.1)
        assert_is_ridge(half, w, z, 0.1)

    @pytest.mark.parametrize("method", ["sequential", "direct"])
    def test_inactive_places(self, method):
        state, (w, z) = written(3, 2), observations(3, 4, seed=1)
        active = torch.tensor([[True, False, True, True], [False] * 4, [False, True, False, False]])
        after = state.write(w, z, active=active, method=method)
        for row in (0, 2):
            alone = state.select([row]).write(w[row, active[row]][None], z[row, active[row]][None])
            assert_close_state(after.select([row]), alone)
        assert after.mean[1].equal(state.mean[1]) and after.covariance[1].equal(state.covariance[1])
        torch.testing.assert_close(after.log_det[1], state.log_det[1], **TIGHT)
        assert method == "direct" or after.log_det[1].equal(state.log_det[1])
        assert after.counts.tolist() == [5, 2, 3]

    def test_sign_per_row(self):
        w, z = (x.double() for x in observations(3, 1))
        before = posterior(written(3, 2))
        once = sherman_morrison(*before, w[:, 0], z[:, 0], 0.1)
        mixed = sherman_morrison(*once, w[:, 0], z[:, 0], 0.1, torch.tensor([1.0, 0.0, -1.0]).double())
        twice = sherman_morrison(*once, w[:, 0], z[:, 0], 0.1)
        for got, a, b, c in zip(mixed, twice, once, before):
            torch.testing.assert_close(got[0], a[0], **TIGHT)
            assert got[1].equal(b[1])
            torch.testing.assert_close(got[2], c[2], **TIGHT)

    def test_memory_kl(self):
        """Against the full Gaussian over the K x Z entries of M."""
        w, z = observations(2, 3, 4, 3)
        rows = [ridge(w[row], z[row], 0.3) for row in range(2)]
        got = memory_kl(*(torch.stack(x) for x in zip(*rows)))
        prior = MultivariateNormal(torch.zeros(12).double(), torch.eye(12).double())
        for row, (mean, covariance, _) in enumerate(rows):
            full = MultivariateNormal(mean.flatten(), torch.kron(covariance.contiguous(), torch.eye(3).double()))
            assert got[row].item() == pytest.approx(kl_divergence(full, prior).item() / 12, rel=1e-9)
        assert got.min() > 0.1 and new_state(2).kl().abs().max() == 0

    def test_address_kl(self):
        w = observations(2, 3)[0]
        log_variance = torch.linspace(-6, 1, K)
        posterior = Normal(math.sqrt(K) * w.double(), (0.5 * log_variance.double()).exp())
        expected = kl_divergence(posterior, Normal(torch.zeros(K).double(), 1.0)).sum(-1) / K
        torch.testing.assert_close(address_kl(w, log_variance).double(), expected, rtol=1e-5, atol=1e-6)


class TestForgetting:
    def test_one_in_the_middle(self):
        w, z = observations(1, 5)
        state = new_state().write(w, z, [list("abcde")]).forget("c")
        rest = [0, 1, 3, 4]
        assert_is_ridge(posterior(state), w[:, rest], z[:, rest], 0.1)
        assert state.labels == [list("abde")] and state.addresses.equal(w[:, rest]) and state.contents.equal(z[:, rest])
        assert_close_state(state, new_state().write(w[:, rest], z[:, rest]))

    def test_last_one_leaves_the_prior_itself(self):
        state = written(2, 3)
        for _ in range(3):
            state = state.forget(0, row=1)
        empty = new_state(2)
        for got, want in zip(posterior(state), posterior(empty)):
            assert got[1].equal(want[1]) and not got[0].equal(want[0])
        assert state.counts.tolist() == [3, 0]

    def test_by_number_label_and_row(self):
        state = written(2, 3)
        assert_same_state(state.forget(1, row=1), state.forget("1-0-1", row=1))
        other = state.forget(1, row=1)
        for got, want in zip(posterior(other.select([0])), posterior(state.select([0]))):
            assert got.equal(want)
        assert other.forget(1, row=1).describe().count("1-0-2") == 0  # numbers close up

    @pytest.mark.parametrize("slots", [16, 32])
    @pytest.mark.parametrize("noise", [0.1, 0.01])
    def test_after_a_thousand_writes_and_forgets(self, slots, noise, tmp_path):
        g = torch.Generator().manual_seed(slots)
        draw = lambda high: int(torch.randint(high, (1,), generator=g))  # noqa: E731
        state, live = (empty := new_state(1, slots, 8, noise, 48)), []
        w, z = observations(1, 1000, slots, 8, seed=2)
        for step in range(1000):
            if live and (len(live) == 48 or draw(100) < 45):
                number = draw(len(live))
                state = state.forget(number)
                live.pop(number)
            else:
                state = state.write(w[:, [step]], z[:, [step]])
                live.append(step)
        assert len(live) > 20 and state.counts.tolist() == [len(live)]
        while len(live) > 4:
            number = draw(len(live))
            state = state.forget(number)
            live.pop(number)
        fresh = empty.write(w[:, live], z[:, live])
        for got, want in zip(posterior(state), posterior(fresh)):
            assert (got - want).abs().max() < 1e-4 * want.abs().max()
        assert_is_ridge(posterior(state), w[:, live], z[:, live], noise, 1e-4)
        assert state.addresses.equal(w[:, live]) and state.contents.equal(z[:, live])
        state.save(tmp_path / "memory")
        assert_same_state(MemoryState.load(tmp_path / "memory", empty), state)

    @pytest.mark.parametrize("noise", [0.1, 0.01])
    def test_ten_thousand_writes(self, noise):
        state, (w, z) = new_state(1, 16, 4, noise, 10_000), observations(1, 10_000, 16, 4)
        for start in range(0, 10_000, 500):
            state = state.write(w[:, start : start + 500], z[:, start : start + 500])
        assert all(x.isfinite().all() for x in posterior(state))
        torch.linalg.cholesky(state.covariance)
        assert state.covariance.equal(state.covariance.mT)
        torch.testing.assert_close(state.log_det, torch.logdet(state.covariance), rtol=1e-6, atol=1e-6)
        assert_is_ridge(posterior(state), w, z, noise, 1e-6)


class TestAddress:
    @pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
    def test_ben_cohen_inverse(self, scale):
        a = scale * torch.randn(8, 12, generator=torch.Generator().manual_seed(0)).double()
        expected = torch.linalg.pinv(a)
        torch.testing.assert_close(ben_cohen_inverse(a, 40), expected, rtol=1e-8, atol=1e-8 / scale)
        assert (ben_cohen_inverse(a, 3) - expected).abs().max() > 1e-3 / scale  # so the steps matter

    def keys(self, *shape):
        return F.normalize(torch.randn(*shape, C, generator=torch.Generator().manual_seed(1)), dim=-1)

    def memory(self, **config):
        memory = memory_model(**config).model.memory
        with torch.no_grad():
            memory.reference.copy_(torch.randn(K, C, generator=torch.Generator().manual_seed(2)))
        return memory

    def test_pseudoinverse_and_ben_cohen(self):
        keys, iteration = self.keys(3, 4), self.memory(addressing="ben_cohen")
        inverse = torch.linalg.pinv(iteration.reference.detach().double())
        expected = F.normalize(keys.double() @ inverse, dim=-1).float()
        for memory in (iteration, self.memory(address_ridge=1e-5)):
            torch.testing.assert_close(memory.address(keys), expected, **CLOSE)

    def test_ridge(self):
        """w minimises |k - w M|^2 + lambda |w|^2: least squares with sqrt(lambda) I below."""
        memory, keys = self.memory(address_ridge=3.0), self.keys(5)
        stacked = torch.cat([memory.reference.detach().mT, math.sqrt(3.0) * torch.eye(K)]).double()
        right = torch.cat([keys.mT, torch.zeros(K, 5)]).double()
        expected = F.normalize(torch.linalg.lstsq(stacked, right).solution.mT, dim=-1).float()
        torch.testing.assert_close(memory.address(keys), expected, **CLOSE)

    def test_gaussian(self):
        memory, keys = self.memory(addressing="gaussian", address_temperature=2.0), self.keys(2, 3)
        distance = torch.cdist(keys.double(), memory.reference.detach().double()).square()
        expected = F.normalize((-distance / 8).softmax(-1), dim=-1).float()
        torch.testing.assert_close(memory.address(keys), expected, rtol=1e-4, atol=1e-5)

    def test_waves(self):
        memory, keys = self.memory(addressing="waves", address_temperature=0.5), self.keys(2, 3)
        phase = keys.double() @ memory.reference.detach().double().mT * math.sqrt(max(K, C)) / 0.5
        expected = F.normalize(math.sqrt(2) * torch.cos(phase - math.pi / 4), dim=-1).float()
        torch.testing.assert_close(memory.address(keys), expected, rtol=1e-4, atol=1e-5)

    def test_many_waves_are_a_gaussian_kernel(self):
        generator = torch.Generator().manual_seed(0)
        reference = torch.randn(20000, 16, generator=generator) / math.sqrt(20000)  # as frequencies N(0, 1)
        config = MicroVLMMemoryConfig(num_slots=20000, code_size=16, addressing="waves", address_temperature=0.7)
        keys = F.normalize(torch.randn(8, 16, generator=generator), dim=-1)
        address = F.normalize(address_keys(keys, reference, config), dim=-1)
        kernel = (-torch.cdist(keys, keys).square() / (2 * 0.7**2)).exp()
        torch.testing.assert_close(address @ address.mT, kernel, rtol=0, atol=0.03)

    @pytest.mark.parametrize("addressing", ["pseudoinverse", "ben_cohen", "gaussian", "waves"])
    @torch.no_grad()
    def test_every_mode(self, addressing):
        memory, keys = self.memory(addressing=addressing), self.keys(2, 3)
        address = memory.address(keys)
        assert address.shape == (2, 3, K) and address.dtype == torch.float32
        torch.testing.assert_close(address.norm(dim=-1), torch.ones(2, 3), rtol=0, atol=1e-5)
        torch.testing.assert_close(memory.address(keys[1, 2]), address[1, 2], **CLOSE)
        state = memory.write(memory.new_state(2), keys, torch.randn(2, 3, Z))
        assert memory.address(keys).equal(address) and state.addresses.equal(address)
        torch.testing.assert_close(memory.read(state, MemoryQuery(keys.flatten(0, 1)))[1], address, **CLOSE)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert memory.address(keys).equal(address)
        rounded = copy.deepcopy(memory)
        rounded.reference.copy_(memory.reference.bfloat16())
        got = memory.bfloat16().address(keys)
        assert got.dtype == torch.float32 and got.equal(rounded.address(keys))


class TestEpisodicMemory:
    def episode(self, rows=2, items=3):
        return observations(rows, items, C, Z, seed=3)

    @torch.no_grad()
    def test_eval_is_exact(self, model):
        memory, (keys, contents) = model.model.memory, self.episode()
        a, b = (memory.write(memory.new_state(2), keys, contents) for _ in range(2))
        assert all(x.equal(y) for x, y in zip(posterior(a), posterior(b)))
        assert not a.uids.equal(b.uids) and len(a.uids.unique()) == 6
        assert a.contents.equal(contents) and a.mean.dtype == torch.float64
        assert_is_ridge(posterior(a), memory.address(keys), contents, 0.1)
        assert_close_state(a, memory.write(memory.new_state(2), keys, contents, method="direct"))
        read, addresses = memory.read(a, MemoryQuery(keys.flatten(0, 1)))
        torch.testing.assert_close(addresses, a.addresses, rtol=0, atol=1e-6)
        assert read.content.equal(memory.read(a, MemoryQuery(keys.flatten(0, 1)))[0].content)
        assert read.content.shape == (2, 3, Z) and read.variance.shape == (2, 3) and read.statistics.shape == (2, 3, 9)

    @torch.no_grad()
    def test_training_is_noisy(self):
        memory, (keys, contents) = memory_model().model.memory, self.episode()
        clean = memory.write(memory.new_state(2), keys, contents)
        memory.train()
        torch.manual_seed(0)
        a, b = (memory.write(memory.new_state(2), keys, contents) for _ in range(2))
        assert not torch.allclose(a.mean, b.mean, atol=1e-3) and not torch.allclose(a.mean, clean.mean, atol=1e-3)
        for state in (a, b):
            assert state.addresses.equal(clean.addresses) and state.contents.equal(contents)
        first, second = (memory.read(clean, MemoryQuery(keys.flatten(0, 1))) for _ in range(2))
        torch.testing.assert_close(first[1], clean.addresses, rtol=0, atol=1e-6)
        assert not torch.allclose(first[0].statistics, second[0].statistics, atol=1e-3)

    @torch.no_grad()
    def test_words_are_matched_with_stored_sentences(self, model):
        """The weighted mean over a question's words of the largest cosine with a content slot, against a loop in
        float64."""
        memory = model.model.memory
        contents, words = torch.randn(2, 3, Z), F.normalize(torch.randn(2, 2, 4, C), dim=-1)
        weights = torch.rand(2, 2, 4)
        weights[0, 0, 2:] = 0
        active = torch.tensor([[True, True, True], [True, True, False]])
        state = memory.write(memory.new_state(2), torch.randn(2, 3, C), contents, active=active)
        got = memory.match(state, words, weights)
        for r in range(2):
            for q in range(2):
                for n in range(3):
                    slots = F.normalize(contents[r, n].double().view(-1, C), dim=-1)
                    best = [float((slots @ word.double()).max()) for word in words[r, q]]
                    expected = sum(a * float(b) for a, b in zip(best, weights[r, q])) / float(weights[r, q].sum())
                    expected = expected if active[r, n] else 0.0
                    assert got[r, q, n].item() == pytest.approx(expected, abs=1e-5)

    @torch.no_grad()
    def test_rows_with_and_without_picture(self, model):
        """A row with words reads where they point, one without where its key does, each as if it were alone."""
        memory, (keys, contents) = model.model.memory, self.episode()
        state = memory.write(memory.new_state(2), keys, contents)
        words, weights = torch.zeros(4, 6, C), torch.zeros(4, 6)
        words[2] = contents[1, 2].view(6, C) / contents[1, 2].view(6, C).norm(
            dim=-1, keepdim=True
        )  # says what is stored
        weights[2] = 1.0
        asked = torch.stack([keys[0, 0], keys[0, 1], torch.zeros(C), keys[1, 1]])
        read, addresses = memory.read(state, MemoryQuery(asked, words, weights))
        alone = memory.read(state, MemoryQuery(asked))[0]
        for r, q in ((0, 0), (0, 1), (1, 1)):
            torch.testing.assert_close(read.content[r, q], alone.content[r, q], **CLOSE)
            torch.testing.assert_close(read.statistics[r, q], alone.statistics[r, q], **CLOSE)
        assert F.cosine_similarity(addresses[1, 0], state.addresses[1, 2], dim=0) > 0.999
        assert F.cosine_similarity(read.content[1, 0], contents[1, 2], dim=0) > 0.99
        assert read.statistics[1, 0, 0].item() == pytest.approx(1.0, abs=1e-5)
        assert read.statistics[..., 8].tolist() == [[0, 0], [1, 0]]

    def test_words_weigh_by_how_few_sentences_have_them(self):
        memory = memory_model().model.memory
        memory.calibrate_words([[5, 5, 6], [5, 7]], smoothing=0.5)
        expected = torch.tensor([0.5 / 1.5, 0.5, 0.5, 1.0, 1.0])
        ids = torch.tensor([5, 6, 7, 8, len(memory.word_weight) + 3])
        torch.testing.assert_close(memory.weigh_words(ids), expected)

    def test_noise_has_the_learned_size(self):
        memory = memory_model().model.memory
        with torch.no_grad():
            memory.address_log_variance.copy_(torch.linspace(-4, 0, K))
        drawn = memory.sample(torch.ones(20_000, K)).detach() - 1
        expected = torch.linspace(-4, 0, K).mul(0.5).exp() / math.sqrt(K)
        torch.testing.assert_close(drawn.std(0), expected, rtol=0.05, atol=0)
        assert drawn.mean(0).abs().max() < 0.01

    @torch.no_grad()
    def test_order(self, model):
        memory, (keys, contents) = memory_model(ordering="lstm").model.memory, self.episode()
        got = memory.ordered(keys)
        assert not torch.allclose(got, keys, atol=1e-2)
        assert not torch.allclose(memory.ordered(keys.flip(1)).flip(1), got, atol=1e-3)  # the order matters
        torch.testing.assert_close(got.norm(dim=-1), torch.ones(2, 3), rtol=0, atol=1e-5)
        other = keys.clone()
        other[1] = keys[0].flip(0)
        torch.testing.assert_close(memory.ordered(other)[0], got[0], rtol=0, atol=1e-6)
        assert memory.ordered(keys[:, :0]).shape == (2, 0, C)
        state = memory.write(memory.new_state(2), keys[:, :1], contents[:, :1])  # a query is an episode of one
        torch.testing.assert_close(
            memory.read(state, MemoryQuery(keys.flatten(0, 1)))[1][:, 0], state.addresses[:, 0], rtol=0, atol=1e-6
        )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert memory.ordered(keys).equal(got)
        assert memory.bfloat16().ordered(keys).dtype == torch.float32
        assert model.model.memory.ordered(keys) is keys

    @torch.no_grad()
    def test_float32_whatever_the_module(self):
        """Keys and contents, in autocast and from weights in bfloat16."""
        memory = memory_model().model.memory
        vision, words, mask = torch.randn(2, 17, 24), torch.randn(2, 5, 32), torch.ones(2, 5).bool()
        run = lambda: (memory.image_keys(vision, 1), memory.words(words), memory.contents(words, mask))  # noqa: E731
        expected = run()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert all(a.equal(b) for a, b in zip(run(), expected))
        memory.bfloat16()
        for got, want in zip(run(), expected):
            assert got.dtype == torch.float32
            torch.testing.assert_close(got, want, rtol=0.1, atol=0.05)

    @pytest.mark.parametrize("context", [True, False])
    def test_scope_net(self, context):
        scope = ScopeNet(MicroVLMMemoryConfig(**MEMORY, scope_context=context))
        key, statistics = torch.randn(2, 3, C), torch.randn(2, 3, 9)
        logits = scope(key, statistics)
        assert logits.shape == (2, 3) and scope(key[0, 0], statistics[0, 0]).shape == ()
        assert scope(-key, statistics).equal(logits) != context
        assert not torch.allclose(scope(key, statistics + 1), logits)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"observation_noise": 0.0},
            "field 'observation_noise':\n    ValueError: Value must be greater than 0, got 0.0.",
        ),
        (
            {"read_sharpness": -1.0},
            "field 'read_sharpness':\n    ValueError: Value must be greater or equal to 0, got -1.0.",
        ),
        ({"gray_weight": -0.5}, "field 'gray_weight':\n    ValueError: Value must be greater or equal to 0, got -0.5."),
        ({"scope_threshold": 1.0}, "scope_threshold must be between 0 and 1, got 1.0."),
        (
            {"scope_threshold": [[1, 0.5], [4, 0.0]]},
            "scope_threshold must be between 0 and 1, got [[1, 0.5], [4, 0.0]].",
        ),
        (
            {"scope_threshold": [[4, 0.5], [4, 0.6]]},
            "scope_threshold must be in rising order of facts, got [[4, 0.5], [4, 0.6]].",
        ),
        ({"scope_threshold": [[0.5]]}, "scope_threshold must be a number or pairs [facts, probability], got [[0.5]]."),
        ({"scope_threshold": [0.5]}, "Field 'scope_threshold' with value [0.5] doesn't match any type in"),
        (
            {"observation_noise": math.nan},
            "field 'observation_noise':\n    ValueError: Value must be greater than 0, got nan.",
        ),
        (
            {"gray_weight": math.inf},
            "field 'gray_weight':\n    ValueError: Value must be greater or equal to 0, got inf.",
        ),
        ({"scope_threshold": [[math.nan, 0.5]]}, "scope_threshold must be in rising order of facts, got [[nan, 0.5]]."),
        ({"scope_threshold": []}, "scope_threshold must be a number or pairs [facts, probability], got []."),
        (
            {"addressing": "hash"},
            "Field 'addressing' expected one of ('pseudoinverse', 'ben_cohen', 'gaussian', 'waves'), got hash",
        ),
    ],
)
def test_config_values_are_checked(change, message):
    with pytest.raises(StrictDataclassError) as error:
        MicroVLMMemoryConfig(**change)
    assert message in str(error.value)
    with pytest.raises(ValueError, match="^memory_config is not valid: ") as error:
        MicroVLMConfig(memory_config=change)
    assert message in str(error.value)


class TestState:
    def test_empty(self):
        state = new_state(2)
        read = state.read(observations(2, 3)[0])
        assert read.content.eq(0).all() and read.content.shape == (2, 3, 8)
        torch.testing.assert_close(read.variance, torch.ones(2, 3))
        assert read.coefficients.shape == (2, 3, 0) and state.counts.tolist() == [0, 0]
        queries = observations(2, 3)[0]
        assert draw_address(state.addresses, state.active, state.similarity(queries), 40.0).eq(0).all()
        assert state.read(queries, sharpness=40.0).content.eq(0).all()
        torch.testing.assert_close(read.statistics, torch.tensor([0, 0, 0, 0, 1e-3, 1, 0, 0, 0]).expand(2, 3, 9))
        assert state.describe() == "memory 0: 0 items of at most 64\nmemory 1: 0 items of at most 64"
        assert repr(state) == "MemoryState(rows=2, slots=16, content_size=8, items=[0, 0])"

    @pytest.mark.parametrize("noise", [0.1, 1.0])
    def test_one_item(self, noise):
        w, z = observations(2, 1)
        read = new_state(2, noise=noise).write(w, z).read(w)
        share = 1 / (1 + noise)
        torch.testing.assert_close(read.content, z * share)
        torch.testing.assert_close(read.variance, torch.full((2, 1), noise * share))
        torch.testing.assert_close(read.coefficients, torch.full((2, 1, 1), share))
        expected = [1, 0, 0, 1, 1e-3, noise * share, math.log(2) / math.log(1 + K), 1 / K, 0]
        torch.testing.assert_close(read.statistics, torch.tensor(expected).expand(2, 1, 9))

    def test_many_items(self):
        """Kernel ridge regression: c = q W^T (W W^T + noise I)^-1, content c Z, variance 1 - c W q^T."""
        (w, z), q = observations(2, 20), observations(2, 4, seed=1)[0]
        read = new_state(2).write(w, z).read(q)
        w, z, q = w.double(), z.double(), q.double()
        gram = w @ w.mT + 0.1 * torch.eye(20).double()
        c = torch.linalg.solve(gram, w @ q.mT).mT
        torch.testing.assert_close(read.coefficients.double(), c, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(read.content.double(), c @ z, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(read.variance.double(), 1 - (c * (q @ w.mT)).sum(-1), rtol=1e-4, atol=1e-6)
        cosines = q @ w.mT
        top = cosines.sort(-1, descending=True)[0][..., :3]
        expected = torch.cat([top, cosines.mean(-1, keepdim=True), cosines.std(-1, correction=0, keepdim=True)], -1)
        torch.testing.assert_close(read.statistics[..., :5].double(), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(read.statistics[..., 5], read.variance)

    def test_drawn_address(self):
        """softmax(beta q W^T) W, brought to unit length, in float64; places that are empty weigh nothing."""
        (w, z), q = observations(2, 20), observations(2, 4, seed=1)[0]
        active = torch.ones(2, 20, dtype=torch.bool)
        active[0, 7:] = False
        state = new_state(2).write(w, z, active=active)
        similarity = state.similarity(q)
        got = draw_address(state.addresses, state.active, similarity.double(), 6.0)
        assert similarity[0, :, 7:].eq(0).all()
        for row, n in ((0, 7), (1, 20)):
            stored, asked = w[row, :n].double(), q[row].double()
            weight = torch.exp(6.0 * asked @ stored.T)
            drawn = (weight / weight.sum(1, keepdim=True)) @ stored
            torch.testing.assert_close(similarity[row, :, :n].double(), asked @ stored.T, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(got[row], drawn / drawn.norm(dim=1, keepdim=True), rtol=1e-5, atol=1e-6)

    def test_sharp_read(self):
        """The content is that of the drawn address, what ScopeNet sees is of the query."""
        (w, z), q = observations(2, 20), observations(2, 4, seed=1)[0]
        state = new_state(2).write(w, z)
        plain, sharp = state.read(q), state.read(q, sharpness=30.0)
        there = state.read(draw_address(state.addresses, state.active, state.similarity(q.double()), 30.0))
        torch.testing.assert_close(sharp.content, there.content, **CLOSE)
        torch.testing.assert_close(sharp.coefficients, there.coefficients, **CLOSE)
        assert sharp.statistics.equal(plain.statistics) and sharp.variance.equal(plain.variance)
        assert not torch.allclose(sharp.content, plain.content, atol=1e-3)

    def test_a_sharp_read_finds_the_nearest_fact(self):
        """With little noise a query near a stored address brings that item's content alone, the linear read a
        mixture."""
        w, z = observations(1, 12)
        state = new_state(1, noise=1e-4).write(w, z)
        near = F.normalize(w + 0.25 * observations(1, 12, seed=1)[0], dim=-1)
        error = lambda read: ((read.content - z).norm(dim=-1) / z.norm(dim=-1)).max()  # noqa: E731
        assert error(state.read(near, sharpness=100.0)) < 0.02 < 0.2 < error(state.read(near))

    def test_similarity_of_another_kind(self):
        """It takes the place of the cosines: in what draws the address and in what ScopeNet sees."""
        (w, z), q = observations(2, 5), observations(2, 3, seed=1)[0]
        state, given = new_state(2).write(w, z), torch.rand(2, 3, 5)
        got = state.read(q, 30.0, given)
        torch.testing.assert_close(
            got.content, state.read(draw_address(state.addresses, state.active, given.double(), 30.0)).content, **CLOSE
        )
        torch.testing.assert_close(got.statistics[..., 0], given.amax(-1))
        torch.testing.assert_close(got.statistics[..., 3], given.mean(-1))
        assert got.variance.equal(state.read(q).variance)

    def test_what_is_forgotten_draws_nothing(self):
        w, z = observations(1, 3)
        less = new_state(1).write(w, z).forget(1)
        never = new_state(1).write(w[:, [0, 2]], z[:, [0, 2]])
        for sharpness in (0.0, 50.0):
            torch.testing.assert_close(
                less.read(w, sharpness).content, never.read(w, sharpness).content, rtol=1e-6, atol=1e-7
            )

    @pytest.mark.parametrize("table", [0.3, [[1, 0.2], [15, 0.5], [255, 0.8]], [[4, 0.6]]])
    def test_threshold(self, table):
        """Between the pairs the logit is linear in log(1 + facts), beyond them constant."""
        facts = torch.tensor([0, 1, 3, 15, 63, 255, 4000])
        got = scope_threshold(table, facts)
        if isinstance(table, float):
            assert got.eq(0.3).all()
        elif len(table) == 1:
            torch.testing.assert_close(got, torch.full((7,), 0.6))
        else:
            logit = lambda p: math.log(p / (1 - p))  # noqa: E731
            between = [logit(0.2) + (logit(0.5) - logit(0.2)) / 3, logit(0.5) + (logit(0.8) - logit(0.5)) / 2]
            wanted = [0.2, 0.2, 1 / (1 + math.exp(-between[0])), 0.5, 1 / (1 + math.exp(-between[1])), 0.8, 0.8]
            torch.testing.assert_close(got, torch.tensor(wanted))

    def test_a_mask_is_no_list_of_rows(self):
        with pytest.raises(TypeError, match="^select takes the numbers of rows, not a mask of booleans.$"):
            written(2).select(torch.tensor([True, False]))

    @pytest.mark.parametrize("noise", [1e-2, 1e-4, 1e-6])
    def test_a_memory_that_has_forgotten_loads(self, noise, tmp_path):
        """With little noise, too: 40 written into 16 slots, 36 forgotten."""
        state = written(1, 40, slots=16, noise=noise)
        for _ in range(36):
            state = state.forget(0)
        state.save(tmp_path / "memory")
        loaded = MemoryState.load(tmp_path / "memory", new_state(slots=16, noise=noise))
        mean, covariance, _ = ridge(loaded.addresses[0], loaded.contents[0], noise)
        torch.testing.assert_close(loaded.mean[0], mean, rtol=1e-6, atol=1e-6)

    def test_select(self):
        state = written(3, 2).forget(1, row=0)
        got = state.select([2, 0, 2])
        assert got.counts.tolist() == [2, 1, 2] and got.labels[0] == got.labels[2] == ["2-0-0", "2-0-1"]
        for new, old in enumerate([2, 0, 2]):
            for name in MemoryState.TENSORS:
                assert getattr(got, name)[new].equal(getattr(state, name)[old]), name
        again = got.forget(0, row=0)  # the copies are apart
        assert again.counts.tolist() == [1, 1, 2] and again.mean[2].equal(got.mean[2])
        assert state.select(torch.tensor([0])).addresses.shape[1] == 1  # places that are empty in all rows go

    def test_stack(self):
        parts = [written(1, 2), written(2, 4, seed=1), new_state(1)]
        state = MemoryState.stack(parts)
        assert state.counts.tolist() == [2, 4, 4, 0] and state.num_rows == 4
        for row, part in ((0, parts[0]), (1, parts[1].select([0])), (2, parts[1].select([1])), (3, parts[2])):
            assert_same_state(state.select([row]), part)
        assert_close_state(state.forget("0-1-2", row=1).select([1]), parts[1].forget(2, row=0).select([0]))

    def test_merge(self):
        (w, z), base = observations(1, 3, seed=1), written(1, 2)
        a, b = base.write(w[:, :1], z[:, :1], [["a"]]), base.write(w[:, 1:], z[:, 1:], [["b", "c"]])
        merged = a.merge(b)
        assert merged.labels == [["0-0-0", "0-0-1", "a", "b", "c"]] and merged.counts.tolist() == [5]
        assert_close_state(merged, base.write(w, z))
        assert merged.uids.tolist() == [a.uids[0].tolist() + b.uids[0, 2:].tolist()]
        assert merged.times[0, 3:].equal(b.times[0, 2:]) and merged.token_ids[:, 3:].equal(b.token_ids[:, 2:])
        for copies in (merged.merge(b), merged.merge(a), a.merge(b).merge(merged), merged.merge(merged)):
            assert copies.counts.tolist() == [5]
            assert_close_state(copies, merged)
        assert_close_state(b.merge(a), merged)
        assert_same_state(a.merge(new_state()), a)
        twins = MemoryState.stack([a, b]).merge(MemoryState.stack([b, a]))
        assert twins.counts.tolist() == [5, 5]
        assert_close_state(twins.select([1]), merged)

    def test_edit(self):
        state, z = written(1, 4), torch.randn(8)
        got = state.edit("0-0-1", z, "new", token_ids=torch.tensor([7, 8, 9, -1, -1]))
        assert got.counts.tolist() == [4] and sorted(got.labels[0]) == ["0-0-0", "0-0-2", "0-0-3", "new"]
        _, place = got.find("new")
        assert got.contents[0, place].equal(z) and got.addresses[0, place].equal(state.addresses[0, 1])
        assert got.token_ids[0, place].tolist() == [7, 8, 9, -1, -1]
        assert_close_state(got, state.forget(1).write(state.addresses[:, [1]], z.view(1, 1, -1)))
        contents = state.contents.clone()
        contents[0, 1] = z
        assert_is_ridge(posterior(got), state.addresses, contents, 0.1)

    def test_edit_leaves_the_others(self):
        """Under orthogonal addresses nothing else moves; nor does another row, and a full memory can be edited."""
        w, z = torch.linalg.qr(torch.randn(2, K, 4))[0].mT.contiguous(), torch.randn(2, 4, 8)
        state = new_state(2, max_items=4).write(w, z)
        got = state.edit(2, torch.ones(8), row=1)
        assert got.counts.tolist() == [4, 4] and got.max_items == 4
        read = got.read(w).content
        torch.testing.assert_close(read[1, [0, 1, 3]], z[1, [0, 1, 3]] / 1.1)
        torch.testing.assert_close(read[1, 2], torch.ones(8) / 1.1)
        for a, b in zip(posterior(got), posterior(state)):
            assert a[0].equal(b[0])
        assert got.select([0]).contents.equal(state.select([0]).contents)

    def test_to(self):
        state = written(2, 2).to("meta")
        assert {getattr(state, name).device.type for name in MemoryState.TENSORS} == {"meta"}
        state = written(2, 2)
        assert_same_state(state.to("cpu"), state)

    def test_describe(self):
        state = written(1, 2)
        state.labels[0][1] = ""
        state.token_ids[0, 0, 3:] = -1
        state.times[:] = 86400.0
        when = "(written 1970-01-02 00:00:00 UTC)"
        assert state.describe() == f"memory: 2 items of at most 64\n  0. '0-0-0': 3 tokens {when}\n  1. 5 tokens {when}"

        def words(ids, skip_special_tokens=False):
            return " ".join(str(i) for i in ids if i or not skip_special_tokens)

        spell = SimpleNamespace(decode=words)  # 0 is special
        lines = f"  0. '0-0-0': '1 2' {when}\n  1. '5 6 7 8 9' {when}"
        assert state.describe(spell) == f"memory: 2 items of at most 64\n{lines}"

    def test_no_verb_changes_the_old_state(self, tmp_path):
        a, b = written(2, 3), written(2, 2, seed=1)
        with unchanged(a, b):
            w, z = observations(2, 2, seed=2)
            results = [
                a.write(w, z, [["x", "y"]] * 2),
                a.write(w, z, method="direct"),
                a.forget(0, row=1),
                a.forget(0, row=1).forget(0, row=1).forget(0, row=1),
                a.edit(0, z[0, 0], "new", row=0),
                a.merge(b),
                a.merge(a),
                a.select([1, 0]),
                MemoryState.stack([a, b]),
                a.to("cpu"),
            ]
            a.read(w), a.kl(), a.describe(), a.save(tmp_path / "memory")
        assert all(not state.mean.equal(a.mean) for state in results[:6])

    SHAPES = "a memory of 2 rows, 16 slots and content size 8 takes addresses (2, N, 16) and contents (2, N, 8), got "
    STRANGER = "memories of different models: fingerprints 'model' and 'x'."
    NOT_KIN = "memories of different shape or observation noise cannot be joined."

    @pytest.mark.parametrize(
        "verb, message",
        [
            (lambda s: s.forget(3, row=0), "item 3 is not in the memory, which holds 3."),
            (lambda s: s.forget(-1, row=0), "item -1 is not in the memory, which holds 3."),
            (lambda s: s.forget("1-0-0", row=0), "'1-0-0' is not in the memory."),
            (lambda s: s.forget("", row=0), "'' is stored 2 times: give its number."),
            (lambda s: s.forget(0), "the memory has 2 rows: say in which one with row=."),
            (lambda s: s.forget(0, row=2), "row 2 is not in this memory, which has 2."),
            (lambda s: s.forget(0, row=0).forget("0-0-0", row=0), "'0-0-0' is not in the memory."),
            (lambda s: s.edit(7, torch.ones(8), row=1), "item 7 is not in the memory, which holds 3."),
            (lambda s: s.edit(0, torch.ones(8)), "the memory has 2 rows: say in which one with row=."),
            (lambda s: s.edit(0, torch.ones(8) / 0, row=1), "memory contents are not finite: nothing was written."),
            (lambda s: s.edit(0, torch.ones(9), row=1), SHAPES + "(2, 1, 16) and (2, 1, 9)."),
            (lambda s: s.write(torch.ones(1, 1, K), torch.ones(2, 1, 8)), SHAPES + "(1, 1, 16) and (2, 1, 8)."),
            (lambda s: s.write(torch.ones(2, K), torch.ones(2, 1, 8)), SHAPES + "(2, 16) and (2, 1, 8)."),
            (lambda s: s.write(NAN, torch.ones(2, 1, 8)), "memory addresses are not finite: nothing was written."),
            (lambda s: s.write(*observations(2, 2)), FULL.format(5, 4)),
            (
                lambda s: s.write(NAN[:, :0], NAN[:, :0, :8], method="x"),
                "write method 'x' is not one of sequential, direct.",
            ),
            (lambda s: s.merge(written(2, 2, 1)), FULL.format(5, 4)),
            (lambda s: s.merge(written(1)), "memories of 2 and 1 rows cannot be merged."),
            (lambda s: s.merge(written(2, noise=0.2)), NOT_KIN),
            (lambda s: MemoryState.stack([s, new_state(size=9)]), NOT_KIN),
            (lambda s: s.merge(replace(s, fingerprint="x")), STRANGER),
            (lambda s: MemoryState.stack([s, replace(s, fingerprint="x")]), STRANGER),
            (lambda s: MemoryState.stack([]), "stack needs at least one memory."),
        ],
    )
    def test_exact_messages(self, verb, message):
        state = written(2, 3, max_items=4)
        state.labels[0][1:] = ["", ""]
        with refused(message, state):
            verb(state)


def tamper(path: Path, metadata: dict | None = None, drop: str = "", **tensors) -> None:
    """Change tensors and metadata of a saved memory."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() | (metadata or {})
    old = {name: tensor.clone() for name, tensor in load_file(path).items() if name != drop}
    save_file(old | {name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)


def spoil(tensor, value):
    """The tensor with another first value."""
    tensor.view(-1)[0] = value
    return tensor


class TestFiles:
    NAMES = sorted(MemoryState.TENSORS)
    LABELS = "its labels are not 2 lists of 3 texts"

    def load(self, path, **expected):
        return MemoryState.load(path, new_state(**expected))

    def test_round_trip(self, tmp_path, monkeypatch):
        state = written(2, 3).forget(1, row=0)
        state.labels[0][0] = 'a "quoted" näme \u2028 日本'
        state.save(tmp_path / "memory.safetensors")
        assert_same_state(self.load(tmp_path / "memory.safetensors"), state)
        monkeypatch.chdir(tmp_path)
        state.save("here")
        assert_same_state(self.load(str(tmp_path / "here")), state)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["here", "memory.safetensors"]
        new_state(2).save("here")  # an empty one over an old one
        assert_same_state(self.load("here"), new_state(2))

    def test_a_file_is_as_new_files_are_and_a_link_stays_one(self, tmp_path):
        (tmp_path / "other").touch()
        (tmp_path / "link").symlink_to("memory")
        for state in (written(), new_state(2)):
            state.save(tmp_path / "link")
            assert (tmp_path / "link").readlink() == Path("memory")
            assert_same_state(self.load(tmp_path / "memory"), state)
            assert (tmp_path / "memory").stat().st_mode == (tmp_path / "other").stat().st_mode

    def test_a_failed_save_leaves_the_old_file(self, tmp_path, monkeypatch):
        def broken(handle):
            raise OSError("disk full")

        state, path = written(), tmp_path / "memory"
        state.save(path)
        before = path.read_bytes()
        monkeypatch.setattr("os.fsync", broken)
        with pytest.raises(OSError, match="disk full"):
            state.forget(0).save(path)
        assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["memory"]

    def test_it_is_on_the_disk_before_it_has_its_name(self, tmp_path, monkeypatch):
        steps = []
        for name in ("fsync", "replace"):
            real = getattr(os, name)
            monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (steps.append(name), real(*args)))
        written().save(tmp_path / "memory")
        assert steps == ["fsync", "replace"]

    def test_threads_that_save_to_one_path(self, tmp_path):
        states = [written(seed=seed) for seed in range(8)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda state: state.save(tmp_path / "memory"), states * 10))
        mean = self.load(tmp_path / "memory").mean
        assert any(torch.equal(mean, state.mean) for state in states)
        assert [p.name for p in tmp_path.iterdir()] == ["memory"]

    def test_what_a_killed_process_has_left_goes(self, tmp_path):
        old, fresh, other = (tmp_path / f"{name}.part" for name in ("memory.0123abcd", "memory.4567cdef", "my.file"))
        for path in (old, fresh, other):
            path.touch()
        for path in (old, other):
            os.utime(path, (0, 0))
        written().save(tmp_path / "memory")
        assert not old.exists() and fresh.exists() and other.exists()

    def test_a_folder_is_refused(self, tmp_path):
        with pytest.raises(ValueError) as error:
            self.load(tmp_path)
        assert str(error.value) == f"memory file {tmp_path} is refused: it is not a file."

    def test_no_such_file(self, tmp_path):
        with pytest.raises(FileNotFoundError) as error:
            self.load(tmp_path / "memory")
        assert str(error.value) == f"No such file or directory: {tmp_path / 'memory'}"

    @pytest.mark.parametrize("damage", [slice(0), slice(99), slice(-10), slice(1, None)])
    def test_not_safetensors(self, tmp_path, damage):
        path = tmp_path / "memory"
        written().save(path)
        path.write_bytes(path.read_bytes()[damage])
        why = re.escape(f"memory file {path} is refused: it is not a whole safetensors file (")
        with pytest.raises(ValueError, match=f"^{why}.+\\)\\.$"):
            self.load(path)

    def refuse(self, path, why, changed, **kwargs):
        written(2, 3).save(path)
        self.load(path)
        tamper(path, **changed)
        with refused(f"memory file {path} is refused: {why}."):
            self.load(path, **kwargs)

    @pytest.mark.parametrize(
        "metadata, why",
        [
            ({"format": "pt"}, "it is not a memory of MicroVLM"),
            ({"version": "2"}, "format version 2, this code reads 1"),
            ({"fingerprint": "x"}, "it was written by another model (fingerprint x, this model's is model)"),
            ({"labels": '[["a", "b", "c"]]'}, LABELS),
            ({"labels": '[["a", "b", "c"], ["d"]]'}, LABELS),
            ({"labels": '[["a", "b", "c"], ["d", "e", 6]]'}, LABELS),
            ({"labels": '{"a": 1, "b": 2}'}, LABELS),
            ({"noise": "0.2"}, "its observation noise is 0.2, this model's is 0.1"),
            ({"noise": "nan"}, "its observation noise is nan, this model's is 0.1"),
        ],
    )
    def test_metadata(self, tmp_path, metadata, why):
        self.refuse(tmp_path / "memory", why, {"metadata": metadata})

    @pytest.mark.parametrize("metadata", [{"labels": "[["}, {"noise": "small"}, {"max_items": "many"}, {"noise": ""}])
    def test_unreadable_metadata(self, tmp_path, metadata):
        written().save(tmp_path / "memory")
        tamper(tmp_path / "memory", metadata)
        with pytest.raises(ValueError, match=r"is refused: its metadata cannot be read \(.+\)\.$"):
            self.load(tmp_path / "memory")

    def test_other_tensors(self, tmp_path):
        expected = f"expected {', '.join(self.NAMES)}"
        fewer = ", ".join(name for name in self.NAMES if name != "times")
        self.refuse(tmp_path / "memory", f"its tensors are {fewer}, {expected}", {"drop": "times"})
        more = ", ".join([*self.NAMES, "zebra"])
        self.refuse(tmp_path / "memory", f"its tensors are {more}, {expected}", {"zebra": torch.ones(1)})

    @pytest.mark.parametrize(
        "name, damage, why",
        [
            ("mean", lambda x: x.float(), "mean is F32 (2, 16, 8), expected F64 (2, 16, 8)"),
            ("uids", lambda x: x.int(), "uids is I32 (2, 3), expected I64 (2, 3)"),
            ("active", lambda x: x.long(), "active is I64 (2, 3), expected BOOL (2, 3)"),
            ("covariance", lambda x: x[:, 1:], "covariance is F64 (2, 15, 16), expected F64 (2, 16, 16)"),
            ("log_det", lambda x: x[:1], "log_det is F64 (1,), expected F64 (2,)"),
            ("token_ids", lambda x: x[..., 1:], "token_ids is I64 (2, 3, 4), expected I64 (2, 3, 5)"),
            ("addresses", lambda x: x[0, 0, 0], "it has no rows"),
            ("contents", lambda x: spoil(x, torch.nan), "contents has values that are not finite"),
            ("mean", lambda x: spoil(x, torch.nan), "mean has values that are not finite"),
            ("times", lambda x: spoil(x, torch.inf), "times has values that are not finite"),
            ("addresses", lambda x: spoil(x, 0.9), "an address is not of unit length"),
            ("addresses", lambda x: 2 * x, "an address is not of unit length"),
            ("addresses", lambda x: -x, "its receipts do not give its mean"),
            ("contents", lambda x: -x, "its receipts do not give its mean"),
            ("active", lambda x: spoil(x, False), "its receipts do not give its mean"),
            ("mean", lambda x: spoil(x, x[0, 0, 0] + 1e-3), "its receipts do not give its mean"),
            ("covariance", lambda x: 0.99 * x, "its receipts do not give its covariance"),
            ("covariance", lambda x: -x, "its receipts do not give its covariance"),
            ("log_det", lambda x: x + 1e-3, "its receipts do not give its log_det"),
            ("uids", lambda x: spoil(x, x[0, 1]), "two items have one uid"),
            ("token_ids", lambda x: spoil(x, 2**31), "it has impossible token ids"),
            ("token_ids", lambda x: torch.tensor([-1, 3, 3, 3, 3]).expand_as(x), "it has impossible token ids"),
        ],
    )
    def test_tensors(self, tmp_path, name, damage, why):
        self.refuse(tmp_path / "memory", why, {name: damage(getattr(written(2, 3), name))})

    def test_too_many_items(self, tmp_path):
        self.refuse(tmp_path / "memory", "a row holds 3 items, at most 2 fit", {}, max_items=2)
        written(1, 9).save(path := tmp_path / "memory")
        with refused(f"memory file {path} is refused: it holds 9 places, more than a memory of 2 items needs."):
            self.load(path, max_items=2)


def fact(inputs, row):
    return {name: value[[row]] for name, value in inputs.items()}


@torch.no_grad()
def nudge(model, name):
    (dict(model.model.named_parameters()) | dict(model.model.named_buffers()))[name].add_(1)


class TestVerbs:
    def test_write(self, model):
        facts = tiny_inputs(3, 10)
        with unchanged(empty := model.new_memory()):
            together = model.write_memory(empty, **facts, labels=list("abc"))
        one_by_one, apart = model.new_memory(), model.write_memory(model.new_memory(3), **facts, labels=list("abc"))
        for row, label in enumerate("abc"):
            one_by_one = model.write_memory(one_by_one, **fact(facts, row), labels=[label])
            alone = model.write_memory(**fact(facts, row))
            assert_close_state(apart.select([row]), alone, **CLOSE)
            assert apart.labels[row] == [label] and alone.labels == [[""]]
        assert_close_state(together, one_by_one, **CLOSE)
        assert together.labels == one_by_one.labels == [list("abc")]
        assert together.token_ids.equal(one_by_one.token_ids) and together.uids.unique().numel() == 3
        words = facts["input_ids"][facts["input_ids"] != IMAGE_ID].view(3, 10)
        assert together.token_ids[0].equal(F.pad(F.pad(words, (0, 1), value=0), (0, 5), value=-1))  # with the end token
        assert together.mean.shape == (1, K, Z) and together.fingerprint == model.memory_fingerprint()
        assert abs(together.times[0, 0].item() - one_by_one.times[0, 2].item()) < 600

    @torch.no_grad()
    def test_address_and_content(self, model):
        """The address is the picture's and the content the words', each alone."""
        facts = tiny_inputs(2, 10)
        state = model.write_memory(model.new_memory(2), **facts)
        words = tiny_inputs(2, 10, seed=1)
        other = model.write_memory(model.new_memory(2), **(words | {"pixel_values": facts["pixel_values"]}))
        assert other.addresses.equal(state.addresses) and not torch.allclose(other.contents, state.contents, atol=0.1)
        other = model.write_memory(model.new_memory(2), **(facts | {"pixel_values": words["pixel_values"]}))
        assert other.contents.equal(state.contents) and not torch.allclose(other.addresses, state.addresses, atol=0.01)
        memory, pixels = model.model.memory, facts["pixel_values"]
        gray = pixels.mean(1, keepdim=True).repeat(1, 3, 1, 1)
        images = [model.get_image_features(x, return_dict=True) for x in (pixels, gray)]
        keys = [memory.image_keys(image.last_hidden_state, 1) for image in images]
        expected = memory.address(F.normalize(keys[0] + 0.5 * keys[1], dim=-1))
        torch.testing.assert_close(state.addresses[:, 0], expected, **CLOSE)
        given = {name: value for name, value in facts.items() if name != "pixel_values"}
        encoded = {"image": images[0], "gray": images[1]}
        other = model.write_memory(model.new_memory(2), **given, mm_encoder_outputs=encoded)
        torch.testing.assert_close(other.addresses, state.addresses, **CLOSE)
        del encoded["gray"]
        with refused("mm_encoder_outputs lacks `gray`: a key to write needs the images in grey, too."):
            model.write_memory(**given, mm_encoder_outputs=encoded)
        plain = memory_model(gray_weight=0.0)
        other = plain.write_memory(plain.new_memory(2), **given, mm_encoder_outputs=encoded)
        torch.testing.assert_close(other.addresses[:, 0], memory.address(keys[0]), **CLOSE)

    @pytest.mark.parametrize("filler", [1, 77])
    def test_padding(self, model, filler):
        facts = tiny_inputs(2, 10)
        state = model.write_memory(model.new_memory(2), **facts)
        padded = facts | {
            "input_ids": F.pad(facts["input_ids"], (4, 0), value=filler),
            "attention_mask": F.pad(facts["attention_mask"], (4, 0)),
        }
        other = model.write_memory(model.new_memory(2), **padded)
        for name in ("addresses", "contents", "token_ids", "mean", "covariance"):
            assert getattr(other, name).equal(getattr(state, name)), name

    @torch.no_grad()
    def test_read(self, model):
        facts = tiny_inputs(3, 10)
        apart = model.write_memory(model.new_memory(3), **facts)
        shared = model.write_memory(**facts)
        with unchanged(apart, shared):
            own, common = (model(**facts, memory=memory, memory_gate="on") for memory in (apart, shared))
        torch.testing.assert_close(own.memory_content.flatten(1), apart.contents[:, 0] / 1.1, **CLOSE)
        image = model.get_image_features(facts["pixel_values"]).last_hidden_state
        asked = model.model.memory.address(model.model.memory.image_keys(image, 1))
        expected = shared.read(asked[None], sharpness=40.0).content[0]
        torch.testing.assert_close(common.memory_content.flatten(1), expected, **CLOSE)
        assert own.memory_content.shape == (3, 6, C) and own.scope_probability.shape == (3,)
        torch.testing.assert_close(own.memory_kl, apart.kl().mean().float(), **CLOSE)
        assert not torch.allclose(own.logits, model(**facts).logits, atol=1e-2)
        off = model(**facts, memory=apart, memory_gate="off").logits
        torch.testing.assert_close(off, model(**facts).logits, **CLOSE)

    @torch.no_grad()
    def test_forgotten_is_as_never_written(self, model):
        facts = tiny_inputs(3, 10)
        state = model.write_memory(**facts, labels=list("abc"))
        never = model.write_memory(**{name: value[[0, 2]] for name, value in facts.items()})
        forgotten = model.forget(state, "b")
        assert_close_state(forgotten, never, **CLOSE)
        a, b = (model(**facts, memory=memory, memory_gate="on").logits for memory in (forgotten, never))
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
        assert_same_state(model.forget(state, 1), forgotten)

    def test_edit(self, model):
        facts, words = tiny_inputs(3, 10), tiny_inputs(1, 7, seed=5)
        state = model.write_memory(**facts, labels=list("abc"))
        with unchanged(state):
            got = model.edit_memory(state, "b", words["input_ids"], label="B")
        pixels = {"pixel_values": facts["pixel_values"][[1]]}
        expected = model.write_memory(model.forget(state, "b"), **(words | pixels), labels=["B"])
        assert_close_state(got, expected, **CLOSE)
        assert got.labels == expected.labels == [["a", "c", "B"]] and got.token_ids.equal(expected.token_ids)
        text_only = words["input_ids"][words["input_ids"] != IMAGE_ID][None]
        assert model.edit_memory(state, 1, text_only).mean.equal(got.mean)

    def test_words_of_the_default_prompt_are_stored(self):
        model = tiny_model(use_memory=True, memory_config=MEMORY, default_prompt_ids=[9, IMAGE_ID, 50, 51, 8])
        inputs = tiny_inputs(1, 7)
        inputs["input_ids"][0, -5:] = torch.tensor([20, 50, 21, 51, 22])
        words = inputs["input_ids"][inputs["input_ids"] != IMAGE_ID].tolist()
        assert model.write_memory(**inputs).token_ids[0, 0, : len(words)].tolist() == words
        asked = model.model.get_text_mask(inputs["input_ids"], None)  # a question has the prompt around it
        assert 50 not in inputs["input_ids"][asked] and 20 in inputs["input_ids"][asked]

    @pytest.mark.parametrize(
        "inputs, message",
        [
            ({"input_ids": torch.full((2, 15), IMAGE_ID)}, "row 0 has no words: " + FACT),
            ({"attention_mask": torch.zeros(2, 15)}, "row 0 has no words: " + FACT),
            ({"input_ids": torch.full((2, 15), 9)}, "row 0 has 0 images: " + FACT),
            ({"input_ids": torch.tensor([[*[IMAGE_ID] * 10, *range(5, 10)]] * 2)}, "row 0 has 2 images: " + FACT),
            ({"pixel_values": None}, "the text has placeholders, but there are no images: give pixel_values."),
            ({"pixel_values": torch.ones(3, 3, 32, 32)}, "The text has placeholders for 2 images, 3 were given."),
            (tiny_inputs(2, 16), "row 0 has 16 tokens of words, at most 15 can be stored."),
            ({"input_ids": torch.tensor([[*[IMAGE_ID] * 5, 7, 0, *range(5, 13)]] * 2)}, TYPED),
            ({"labels": ["a"]}, "1 labels for 2 facts."),
            (tiny_inputs(3, 10), "the memory has 2 rows, the batch 3: they must agree, or be one."),
        ],
    )
    def test_what_is_no_fact(self, model, inputs, message):
        memory = model.write_memory(model.new_memory(2), **tiny_inputs(2, 15))  # 15 words and their end just fit
        with refused(message, memory):
            model.write_memory(memory, **(tiny_inputs(2, 10) | inputs))

    def test_exact_messages(self, model):
        state = model.write_memory(**tiny_inputs(3, 10), labels=["a", "b", "b"])
        ids = tiny_inputs(2, 16)["input_ids"]
        for message, verb in (
            ("item 3 is not in the memory, which holds 3.", lambda: model.forget(state, 3)),
            ("'cat' is not in the memory.", lambda: model.forget(state, "cat")),
            ("'b' is stored 2 times: give its number.", lambda: model.forget(state, "b")),
            ("item 0 is not in the memory, which holds 0.", lambda: model.forget(model.new_memory(), 0)),
            ("'cat' is not in the memory.", lambda: model.edit_memory(state, "cat", ids[:1, :9])),
            ("an item is edited to one sentence, got 2.", lambda: model.edit_memory(state, 0, ids)),
            ("row 0 has 16 tokens of words, at most 15 can be stored.", lambda: model.edit_memory(state, 0, ids[:1])),
            ("row 0 has no words: " + FACT, lambda: model.edit_memory(state, 0, torch.tensor([[0, IMAGE_ID]]))),
        ):
            with refused(message, state):
                verb()

    def test_full(self):
        model, facts = memory_model(max_items=2), tiny_inputs(2, 10)
        state = model.write_memory(**facts)
        with refused(FULL.format(3, 2), state):
            model.write_memory(state, **fact(facts, 0))
        assert model.edit_memory(state, 0, facts["input_ids"][:1]).counts.tolist() == [2]
        assert model.write_memory(model.forget(state, 0), **fact(facts, 0)).counts.tolist() == [2]

    @torch.no_grad()
    def test_content_that_is_not_finite(self):
        model = memory_model()
        model.get_input_embeddings().weight.fill_(torch.nan)
        memory = model.new_memory()
        with refused("memory contents are not finite: nothing was written.", memory):
            model.write_memory(memory, **tiny_inputs(2, 10))

    def test_memory_of_another_model(self, model, tmp_path):
        other, facts = memory_model(), tiny_inputs(2, 10)
        nudge(other, "memory.reference")
        state, own, theirs = other.write_memory(**facts), model.memory_fingerprint(), other.memory_fingerprint()
        assert own != theirs
        message = f"the memory was written by another model: its fingerprint is {theirs}, this model's {own}."
        for verb in (
            lambda: model.write_memory(state, **facts),
            lambda: model.forget(state, 0),
            lambda: model.edit_memory(state, 0, facts["input_ids"][:1]),
        ):
            with refused(message, state):
                verb()
        state.save(path := tmp_path / "memory")
        assert_same_state(other.load_memory(path), state)
        why = f"it was written by another model (fingerprint {theirs}, this model's is {own})"
        with refused(f"memory file {path} is refused: {why}."):
            model.load_memory(path)

    def test_a_file_says_what_its_contents_say(self, model, tmp_path):
        path, facts = tmp_path / "memory", tiny_inputs(2, 10)
        state = model.write_memory(model.new_memory(2), **facts)
        without = replace(state, token_ids=torch.full_like(state.token_ids, -1))
        for good in (state, without, model.new_memory()):
            good.save(path)
            assert_same_state(model.load_memory(path), good)
        for changed, why in (
            (lambda ids: spoil(ids, model.config.text_config.vocab_size), "it has token ids beyond the vocabulary"),
            (lambda ids: spoil(ids, 10 + ids[0, 0, 0] % 7), "a sentence is not what its content says"),
            (lambda ids: ids.flip(0), "a sentence is not what its content says"),
        ):
            replace(state, token_ids=changed(state.token_ids.clone())).save(path)
            with refused(f"memory file {path} is refused: {why}."):
                model.load_memory(path)

    def test_model_without_memory(self, model, tmp_path):
        plain, facts = tiny_model(), tiny_inputs(2, 10)
        state = model.write_memory(**facts)
        for verb in (
            lambda: plain.new_memory(),
            lambda: plain.write_memory(**facts),
            lambda: plain.forget(state, 0),
            lambda: plain.edit_memory(state, 0, facts["input_ids"][:1]),
            lambda: plain.load_memory(tmp_path / "memory"),
        ):
            with refused(NO_MEMORY, state):
                verb()


class TestFingerprint:
    def test_what_counts(self):
        model = memory_model()
        seen = [model.memory_fingerprint()]
        assert re.fullmatch("[0-9a-f]{32}", seen[0]) and memory_model().memory_fingerprint() == seen[0]
        for name in ("language_model.layers.0.mlp.up_proj.weight", "memory_projection.up.weight", "scope.out.weight"):
            nudge(model, name)
            assert model.memory_fingerprint() == seen[0], name
        for name in ("memory.reference", "memory.key_encoder.feature_mean", "language_model.embed_tokens.weight"):
            nudge(model, name)
            assert model.memory_fingerprint() not in seen, name
            seen.append(model.memory_fingerprint())

    def test_dtype_does_not_count(self):
        model = memory_model().bfloat16()
        rounded = model.memory_fingerprint()
        assert model.float().memory_fingerprint() == rounded == memory_model().memory_fingerprint()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_survives_saving(self, tmp_path, dtype):
        model = memory_model().bfloat16()
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
        assert loaded.dtype == dtype and loaded.memory_fingerprint() == model.memory_fingerprint()

    def test_version_of_transformers_does_not_count(self, monkeypatch):
        before = memory_model().memory_fingerprint()
        monkeypatch.setattr("transformers.configuration_utils.__version__", "99.0.0")
        assert memory_model().memory_fingerprint() == before


class TestCorners:
    """Rows that share places, low precision around, and files made to do harm."""

    def test_what_a_row_reads_does_not_depend_on_its_neighbours(self):
        """Nor what ScopeNet sees of it, also where all cosines are negative."""
        few, many = written(1, 2), written(1, 6, seed=1)
        q = -F.normalize(few.addresses.sum(1, keepdim=True), dim=-1)
        alone, stacked = few.read(q), MemoryState.stack([few, many]).read(q.expand(2, -1, -1))
        for name in ("content", "variance", "statistics"):
            torch.testing.assert_close(getattr(stacked, name)[:1], getattr(alone, name))

    @pytest.mark.parametrize("verb", [MemoryState.forget, lambda s, n, row: s.edit(n, torch.ones(8), row=row)])
    def test_nothing_of_what_is_forgotten_stays(self, verb, tmp_path):
        """Not even where another row still needs the place."""
        state = written(2, 2)
        address, content, tokens = state.addresses[0, 1], state.contents[0, 1], state.token_ids[0, 1]
        got = verb(state, 1, row=0)
        assert not any(row.equal(content) for row in got.contents.flatten(0, 1))
        assert not any(row.equal(tokens) for row in got.token_ids.flatten(0, 1))
        assert "0-0-1" not in json.dumps(got.labels)
        assert verb is not MemoryState.forget or not any(row.equal(address) for row in got.addresses.flatten(0, 1))

    @pytest.mark.parametrize("method", ["sequential", "direct"])
    def test_float32_state_in_autocast(self, method):
        """Of training: the posterior keeps its precision."""
        (w, z), state = observations(2, 12), MemoryState.new(2, K, 8, 0.1, 64, 5, dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = state.write(w, z, method=method)
            read = got.read(w)
        assert got.mean.dtype == torch.float32
        assert_is_ridge(posterior(got), w, z, 0.1, 1e-4)
        torch.testing.assert_close(read.content, new_state(2).write(w, z).read(w).content, **CLOSE)

    def test_what_is_saved_can_be_loaded(self, tmp_path):
        """Edits scatter the items of many rows over many places."""
        state = written(12, 2, max_items=2)
        for row in range(12):
            state = state.edit(0, torch.ones(8), row=row)
        state.save(tmp_path / "memory")
        assert_same_state(MemoryState.load(tmp_path / "memory", new_state(max_items=2)), state)

    @pytest.mark.parametrize("rows, labels", [(0, "[]"), (1, "[" * 100_000)])
    def test_hostile_files(self, tmp_path, rows, labels):
        state, path = written(), tmp_path / "memory"
        state.save(path)
        tamper(path, {"labels": labels}, **{name: getattr(state, name)[:rows] for name in MemoryState.TENSORS})
        with pytest.raises(ValueError, match="is refused: "):
            MemoryState.load(path, new_state())

    @pytest.mark.parametrize("time", [-1e18, 1e300])
    def test_impossible_times(self, tmp_path, time):
        """Refused, or told: what was loaded can be described."""
        state = written()
        state.save(tmp_path / "memory")
        tamper(tmp_path / "memory", times=torch.full_like(state.times, time))
        try:
            loaded = MemoryState.load(tmp_path / "memory", new_state())
        except ValueError as error:
            assert "is refused: " in str(error)
        else:
            assert loaded.describe()
