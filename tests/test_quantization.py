"""Ternary training computes what BitNet b1.58 (arXiv 2402.17764) says, gradients included."""

import numpy as np
import pytest
import torch
from conftest import tiny_inputs, tiny_model
from microvlm.packing_microvlm import EPS, ternary_quantize
from microvlm.quantization_microvlm import (
    TernaryLinear,
    fake_quantize_activation,
    fake_ternary,
    replace_with_ternary,
)
from torch import nn

LAYERS = r"language_model\.layers\.\d+\..*_proj"


def reference_weight(weight: np.ndarray) -> np.ndarray:
    """Absmean rounding, float64, from the paper's equations (1) to (3)."""
    scale = max(np.abs(weight).mean(), EPS)
    return np.clip(np.rint(weight / scale), -1, 1) * scale


def reference_activation(x: np.ndarray, bits: int) -> np.ndarray:
    """Absmax rounding per token, float64."""
    top = 2 ** (bits - 1) - 1
    scale = top / np.maximum(np.abs(x).max(-1, keepdims=True), EPS)
    return np.clip(np.rint(x * scale), -top - 1, top) / scale


@pytest.mark.parametrize("bits", [8, 4, None])
@pytest.mark.parametrize("ternary_weights", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradients_match_float64(bits, ternary_weights, bias):
    torch.manual_seed(0)
    layer = TernaryLinear(24, 16, bias=bias, ternary_weights=ternary_weights, activation_bits=bits)
    x = torch.randn(3, 5, 24, requires_grad=True)
    g = torch.randn(3, 5, 16)
    y = layer(x)
    y.backward(g)

    w64, x64, g64 = (t.detach().double().numpy() for t in (layer.weight, x, g))
    w_q = reference_weight(w64) if ternary_weights else w64
    x_q = x64 if bits is None else reference_activation(x64, bits)
    b64 = layer.bias.detach().double().numpy() if bias else 0
    np.testing.assert_allclose(y.detach().numpy(), x_q @ w_q.T + b64, rtol=1e-5, atol=1e-6)
    # straight-through: the gradients are those of the rounded product, taken as if rounding were the identity
    np.testing.assert_allclose(x.grad.numpy(), g64 @ w_q, rtol=1e-5, atol=1e-5)
    weight_gradient = np.einsum("bto,bti->oi", g64, x_q)
    np.testing.assert_allclose(layer.weight.grad.numpy(), weight_gradient, rtol=1e-5, atol=1e-5)
    if bias:
        np.testing.assert_allclose(layer.bias.grad.numpy(), g64.sum((0, 1)), rtol=1e-5, atol=1e-5)


def test_weights_take_three_values():
    weight = torch.tensor([[0.0, 0.1, -0.1, 0.9], [-0.9, 2.0, -3.0, 0.2]])  # mean |W| = 0.9
    values, scale = ternary_quantize(weight)
    assert values.tolist() == [[0, 0, 0, 1], [-1, 1, -1, 0]]
    assert scale.item() == pytest.approx(0.9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_are_kept(dtype):
    weight, x = torch.randn(8, 8, dtype=dtype), torch.randn(2, 8, dtype=dtype)
    assert fake_ternary(weight).dtype == fake_quantize_activation(x, 8).dtype == dtype
    assert TernaryLinear(8, 8, dtype=dtype)(x).dtype == dtype
    values, scale = ternary_quantize(weight)
    assert values.dtype == scale.dtype == torch.float32


def test_zeros_stay_zeros():
    assert fake_ternary(torch.zeros(4, 4)).eq(0).all()
    assert fake_quantize_activation(torch.zeros(2, 4), 8).eq(0).all()


def test_a_token_is_rounded_alone():
    x = torch.randn(3, 8)
    together = fake_quantize_activation(torch.cat([x, 1000 * x]), 8)
    assert together[:3].equal(fake_quantize_activation(x, 8))


@pytest.mark.parametrize("shape", [(1, 16), (2, 5, 16)])
def test_equals_the_online_linear_of_transformers(shape):
    from transformers.integrations.bitnet import AutoBitLinear

    torch.manual_seed(0)
    ours = TernaryLinear(16, 8, bias=False)
    theirs = AutoBitLinear(16, 8, bias=False, online_quant=True)
    theirs.weight.data.copy_(ours.weight.data)
    x = torch.randn(shape)
    results = []
    for layer in (ours, theirs):
        y = x.clone().requires_grad_()
        with torch.compiler.set_stance("force_eager"):  # theirs is compiled at run time
            out = layer(y)
            out.square().sum().backward()
        results.append((out.detach(), y.grad, layer.weight.grad))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


class TestReplace:
    def test_matches_whole_names_only(self):
        model = nn.ModuleDict({"a": nn.Linear(2, 3), "ab": nn.Linear(2, 3, bias=False), "c": nn.Embedding(2, 2)})
        weight, bias = model["a"].weight, model["a"].bias
        assert replace_with_ternary(model, ["a"], ternary_weights=False, activation_bits=None) == ["a"]
        assert type(model["a"]) is TernaryLinear and type(model["ab"]) is nn.Linear
        assert model["a"].weight is weight and model["a"].bias is bias
        assert (model["a"].ternary_weights, model["a"].activation_bits) == (False, None)

    def test_no_match_is_refused(self):
        with pytest.raises(ValueError) as error:
            tiny_model(qat_config={"ternary_modules": [LAYERS, "language_model.heads.*"]})
        assert str(error.value) == (
            "qat_config is not valid: ternary_modules: 'language_model.heads.*' matches no linear layer of the model."
        )

    def test_model_computes_with_rounded_weights(self, text_type):
        inputs = tiny_inputs()
        plain, ternary = tiny_model(text_type), tiny_model(text_type, qat_config={"ternary_modules": [LAYERS]})
        assert {n for n, m in ternary.model.named_modules() if isinstance(m, TernaryLinear)} == {
            n for n, m in plain.model.named_modules() if isinstance(m, nn.Linear) and n.startswith("language_model")
        }
        ternary.load_state_dict(plain.state_dict())
        logits = ternary(**inputs).logits
        assert not torch.allclose(logits, plain(**inputs).logits, atol=1e-2)
        # rounding the weights beforehand changes nothing: they are ternary already
        for module in ternary.modules():
            if isinstance(module, TernaryLinear):
                values, scale = ternary_quantize(module.weight.detach())
                module.weight.data.copy_(values * scale)
                module.ternary_weights = False
        torch.testing.assert_close(ternary(**inputs).logits, logits, rtol=1e-4, atol=1e-4)

    def test_training_moves_latent_weights_and_survives_saving(self, tmp_path):
        model = tiny_model("bitnet", qat_config={"ternary_modules": [LAYERS], "activation_bits": 8}).train()
        inputs = tiny_inputs()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(12):
            loss = model(**inputs, labels=inputs["input_ids"]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0]
        model.eval().save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path).eval()
        assert any(isinstance(m, TernaryLinear) for m in loaded.modules())
        assert loaded(**inputs).logits.equal(model(**inputs).logits)
