"""The layer around its base's own output: `functional.compose` with less kept."""

import pytest
import torch
from adapted import move
from torch import nn

import doralib
from doralib import functional as F
from doralib.config import DoraConfig
from doralib.kernels.around import compose

SHAPES = [(5, 7), (2, 3, 7), (1, 7), (0, 7), (4100, 3)]


def draw(shape, dtype=torch.float64, *, biased=True):
    base, lora = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    gain_O = (1 + 0.3 * torch.randn(shape[-1], dtype=torch.float64)).to(F.sum_dtype(dtype))
    given = base, lora, gain_O, torch.randn(shape[-1], dtype=dtype) if biased else None
    return [t if t is None else t.requires_grad_() for t in given]


def gradients(function, given, dy):
    wanted = [t for t in given if t is not None and t.requires_grad]
    return torch.autograd.grad(function(*given), wanted, dy)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_are_the_formulas(shape, biased):
    given, dy = draw(shape, biased=biased), torch.randn(shape, dtype=torch.float64)
    assert torch.equal(compose(*given), F.compose(*given))
    for ours, formula in zip(gradients(compose, given, dy), gradients(F.compose, given, dy), strict=True):
        torch.testing.assert_close(ours, formula, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("left", range(4))
def test_a_gradient_that_nobody_wants_is_left_out(left):
    given, dy = draw((5, 7)), torch.randn(5, 7, dtype=torch.float64)
    given[left].requires_grad_(False)
    for ours, formula in zip(gradients(compose, given, dy), gradients(F.compose, given, dy), strict=True):
        torch.testing.assert_close(ours, formula, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_other_dtypes_round_no_more_than_the_formula(dtype):
    given, dy = draw((40, 7), dtype), torch.randn(40, 7, dtype=dtype)
    assert torch.equal(compose(*given), F.compose(*given))
    exact = gradients(F.compose, [t.detach().double().requires_grad_() for t in given], dy.double())
    for ours, formula, right in zip(gradients(compose, given, dy), gradients(F.compose, given, dy), exact, strict=True):
        assert ours.dtype == formula.dtype
        error, theirs = ((t.double() - right).norm() / right.norm() for t in (ours, formula))
        assert error < max(1.5 * theirs, 4 * torch.finfo(dtype).eps)


def test_it_has_no_second_derivative():
    given = draw((5, 7))
    (dbase, *_) = torch.autograd.grad(compose(*given).square().sum(), given, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dbase.sum().backward()


class Own(nn.Module):
    """A storage that is known by its call alone."""

    def __init__(self, O, I):
        super().__init__()
        self.in_features, self.out_features, self.bias = I, O, None
        self.register_buffer("packed", torch.randint(-8, 8, (O, I), dtype=torch.int8))

    def forward(self, x):
        return x @ (self.packed.to(x.dtype) / 8).T


@pytest.mark.parametrize(("method", "kept"), [("lora", 0), ("dora", 1)])
def test_a_step_keeps_one_tensor_of_the_outputs_size(method, kept):
    N, O, I = 50, 24, 16
    model = nn.Sequential(Own(O, I))
    doralib.adapt(model, DoraConfig(method=method, r=2, target_modules=("0",)))
    move(model)
    found = {}

    def pack(t):
        found[t.untyped_storage().data_ptr()] = t.shape
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(torch.randn(N, I).requires_grad_())
    assert [*found.values()].count((N, O)) == kept
    y.sum().backward()
