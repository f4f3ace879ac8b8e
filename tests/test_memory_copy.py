"""The pointer to the slots of a memory, against float64, and what it says of any text."""

import torch
import torch.nn.functional as F
from conftest import VOCAB, tiny_inputs, tiny_model
from microvlm.configuration_microvlm import MicroVLMMemoryConfig
from microvlm.memory_microvlm import NEAREST, MemoryContentEncoder, MemoryCopy, MemoryWords

S, C, D, V = 5, 6, 8, 40
CONFIG = MicroVLMMemoryConfig(num_memory_tokens=S, max_content_tokens=S, code_size=16, content_size=C, copy_size=4)
SLOTS = {"num_slots": 16, "code_size": 32, "num_memory_tokens": 16, "max_content_tokens": 16, "copy_size": 8}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pointer() -> MemoryCopy:
    copy = MemoryCopy(CONFIG, D)
    for i, parameter in enumerate(copy.parameters()):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(i))
    return copy


@torch.no_grad()
def test_against_float64():
    copy, hidden, logits = pointer(), randn(2, 3, D), randn(2, 3, V, seed=1)
    content, values = randn(2, S, C, seed=2), F.normalize(randn(V, C, seed=3), dim=-1)
    words = MemoryWords.of(content, values)
    got = copy(hidden, logits, torch.tensor([0.5, 1.0]).log(), *vars(words).values())
    # every step by hand, one row and position at a time
    own = {name: p.double() for name, p in copy.named_parameters()}
    for b in range(2):
        for t in range(3):
            h, said = hidden[b, t].double(), torch.zeros(V, dtype=torch.float64)
            query = own["query.weight"] @ h + own["query.bias"]
            none = torch.zeros(C, dtype=torch.float64)
            before = [
                (none, none),
                (content[b, 0].double(), none),
                *zip(content[b, 1:-1].double(), content[b].double()),
            ]
            keys = [own["previous.weight"] @ torch.cat(pair) + own["place"][s] for s, pair in enumerate(before)]
            scores = [query @ key / 2 for key in keys]
            for share, z in zip(torch.stack(scores).softmax(0), content[b].double()):
                cosines = values.double() @ (z / z.norm())
                nearest = cosines.argsort(descending=True)[:NEAREST]
                said[nearest] += share * (own["log_sharpness"].exp() * cosines[nearest]).softmax(0)
            gate = (own["gate.weight"] @ h + own["gate.bias"]).sigmoid() * (0.5, 1.0)[b]
            expected = ((1 - gate) * logits[b, t].double().softmax(0) + gate * said).log()
            torch.testing.assert_close(got[b, t].double(), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_row_that_is_off_keeps_its_logits():
    copy, logits = pointer(), randn(2, 3, V)
    words = MemoryWords.of(randn(2, S, C), F.normalize(randn(V, C), dim=-1))
    got = copy(randn(2, 3, D), logits, torch.tensor([0.0, -torch.inf]), *vars(words).values())
    assert got[1].equal(logits[1]) and not got[0].equal(logits[0])


@torch.no_grad()
def test_in_training_an_open_row_may_hide_the_decoders_words():
    copy, hidden = pointer(), randn(2, 3, D)
    words = MemoryWords.of(randn(2, S, C), F.normalize(randn(V, C), dim=-1))
    gates = torch.tensor([0.0, -0.5])

    def said(logits):
        return copy(hidden, logits, gates, *vars(words).values())

    copy.dropout = 1.0
    hidden_words, other = said(randn(2, 3, V)), said(randn(2, 3, V, seed=1))
    assert hidden_words[0].equal(other[0]) and not hidden_words[1].equal(other[1])
    uniform = said(torch.zeros(2, 3, V))
    assert hidden_words[0].equal(uniform[0])
    copy.eval()
    assert not said(randn(2, 3, V))[0].equal(uniform[0])


@torch.no_grad()
def test_a_slot_holds_a_token():
    encoder = MemoryContentEncoder(CONFIG, C)
    embeddings, mask = randn(2, 4, C), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    content = encoder(embeddings, mask)
    assert content.shape == (2, S, C) and [n for n, _ in encoder.named_parameters()] == ["v_proj.weight"]
    torch.testing.assert_close(content[0, :4], encoder(embeddings[0]))
    assert content[1, :2].equal(encoder(embeddings)[1, :2])
    assert content[0, 4:].eq(0).all() and content[1, 2:].eq(0).all()


@torch.no_grad()
def test_any_tokens_come_back_in_the_nearest_words_of_the_slots():
    model = tiny_model(use_memory=True, memory_config=SLOTS).eval()
    inputs = tiny_inputs(3, 12)
    memory = model.write_memory(**inputs)
    outputs = model.ask_memory(
        memory, "on", inputs["input_ids"], None, model.model.encode_images(inputs["pixel_values"])
    )
    for row, ids in enumerate(memory.token_ids[0]):
        length = int((ids >= 0).sum())
        assert outputs.words.tokens[row, :length, 0].equal(ids[:length])
    assert int(memory.token_ids.max()) < VOCAB


def test_the_vocabulary_is_mapped_once_and_again_after_a_change():
    model = tiny_model(use_memory=True, memory_config=SLOTS).eval()
    memory, embeddings = model.model.memory, model.get_input_embeddings()
    with torch.no_grad():
        kept = memory.vocabulary(embeddings)
        assert memory.vocabulary(embeddings) is kept
        embeddings.weight[3] += 1
        changed = memory.vocabulary(embeddings)
    assert (changed != kept).any(1).nonzero().flatten().tolist() == [3]
    assert memory.vocabulary(embeddings).requires_grad


@torch.no_grad()
def test_a_gate_that_is_changed_after_the_read_counts():
    model, inputs = tiny_model(use_memory=True, memory_config=SLOTS).eval(), tiny_inputs(2, 12)
    image = model.model.encode_images(inputs["pixel_values"])
    readout = model.ask_memory(model.write_memory(**inputs), "on", inputs["input_ids"], None, image)
    plain, on = model(**inputs).logits, model(**inputs, memory_readout=readout, use_cache=False).logits
    readout.log_gate = torch.tensor([0.0, -torch.inf])
    got = model(**inputs, memory_readout=readout, use_cache=False).logits
    torch.testing.assert_close(got[0], on[0])
    torch.testing.assert_close(got[1], plain[1])


def test_gradients_reach_all_of_it():
    model, inputs = tiny_model(use_memory=True, memory_config=SLOTS), tiny_inputs(2, 12)
    memory = model.eval().write_memory(**inputs)
    model.train()
    model(**inputs, labels=inputs["input_ids"], memory=memory, memory_gate="on").loss.backward()
    without = [name for name, p in model.model.memory_copy.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without
