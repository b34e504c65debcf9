"""A fast module is used on a device only once its numbers there are right; these stand in for one."""

import types

import pytest
import torch

from doralib import functional as F
from doralib.kernels import eager
from doralib.kernels import selfcheck as trial


def module(dora_linear=eager.dora_linear, norm=None):
    def fresh_row_norm(W, a, b, s, seen_a, seen_sb, n):
        return F.dense_row_norm(W, a, b, s)

    return types.SimpleNamespace(dora_linear=dora_linear, fresh_row_norm=norm or fresh_row_norm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_right_numbers_pass(dtype):
    assert trial.passes(module(), torch.device("cpu"), dtype)
    with torch.inference_mode():
        assert trial.passes(module(), torch.device("cpu"), dtype)


def wrong_scale(x, W, a, b, g, s, bias):
    return eager.dora_linear(x, W, a, b, g, 2 * s, bias)


def no_gain_gradient(x, W, a, b, g, s, bias):
    return eager.dora_linear(x, W, a, b, g.detach() + 0 * g, s, bias)


def not_a_number(x, W, a, b, g, s, bias):
    return eager.dora_linear(x, W, a, b, g, s, bias) * float("nan")


def no_compiler(*_):
    raise RuntimeError("0 active drivers ([])")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (wrong_scale, "output, dx"),
        (no_gain_gradient, "in dgain"),
        (not_a_number, "output"),
        (no_compiler, "0 active drivers"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wrong_numbers_are_said_and_not_used(fault, message, dtype):
    with pytest.warns(UserWarning, match=message):
        assert not trial.passes(module(fault), torch.device("cpu"), dtype)


def test_a_wrong_norm_is_said():
    with pytest.warns(UserWarning, match="in norm"):
        assert not trial.passes(module(norm=lambda W, *_: W.norm(dim=1)), torch.device("cpu"), torch.float32)


def test_a_real_module_without_a_gpu_falls_back():
    """Triton is there and no GPU is: the trial says so instead of raising."""
    fused = pytest.importorskip("doralib.kernels.fused", exc_type=ImportError)
    with pytest.warns(UserWarning, match="not used"):
        assert not trial.passes(fused, torch.device("cpu"), torch.float32)
