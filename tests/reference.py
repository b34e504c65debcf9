"""DoRA in float64, written to be read from the paper; imports nothing of ours."""


def row_norm(W, A, B, s):
    """Length of each output row of W + s B A."""
    return (W + s * B @ A).square().sum(1).sqrt()


def linear(x, W, A, B, gain, s, bias=None):
    """Equation 5 with the norm folded into the gain."""
    y = gain * (x @ (W + s * B @ A).T)
    return y if bias is None else y + bias


def linear_exact_dropout(x, dropped, W, A, B, gain, s, bias=None):
    """Dropout on exactly the change of the weight: W x + [g (W + s B A) - W] x~."""
    y = x @ W.T + dropped @ (gain[:, None] * (W + s * B @ A) - W).T
    return y if bias is None else y + bias


def linear_adapter_dropout(x, dropped, W, A, B, gain, s, bias=None):
    """Dropout on the input of the low-rank path alone."""
    y = gain * (x @ W.T + dropped @ (s * B @ A).T)
    return y if bias is None else y + bias
