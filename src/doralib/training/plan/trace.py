"""A training step of a model on the meta device: no values, and every byte that it would hold at once."""

import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

aten = torch.ops.aten
_CHECKS = "TRANSFORMERS_DISABLE_TORCH_CHECK"


@dataclass(frozen=True)
class StepBytes:
    """What a step holds beside the weights and the optimizer's state, all in bytes."""

    kept: int
    """At the end of the forward pass through the blocks: what the backward pass will read."""
    logits: int
    """What the head and the loss add to it."""
    peak: int
    """The most at once, with the gradients that there are at that moment."""
    peak_without_gradients: int

    def plus(self, other: "StepBytes", times: int = 1) -> "StepBytes":
        """The sum with so many times another; -1: the difference."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return StepBytes(*(mine + times * theirs for mine, theirs in pairs))


def trace_step(model: nn.Module, rows: int, tokens: int, labels: int | None) -> StepBytes:
    """Make a step of a model whose parameters are on the meta device.

    Args:
        model: In training mode, adapted.
        tokens: Of each row, padding included.
        labels: Tokens of the batch that count in the loss; the vocabulary head sees no other. None: the model has a
            head that classifies, and a label for each of its outputs.
    """
    ids = torch.zeros(rows, tokens, dtype=torch.long, device="meta")
    marks: dict[str, int] = {}
    head = model.get_output_embeddings() if labels is not None else None  # type: ignore[operator]
    with _watching(model) as watch:
        hook = (
            head.register_forward_pre_hook(_select(labels, marks, watch))
            if head is not None and labels is not None
            else None
        )
        try:
            more = {"use_cache": False} if labels is not None else {}
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits
            if labels is None:
                marks["kept"] = watch.live
            loss = _loss(logits)
            marks.setdefault("kept", watch.live)
            marks["loss"] = watch.live
            loss.backward()
        finally:
            if hook is not None:
                hook.remove()
    return StepBytes(marks["kept"], marks["loss"] - marks["kept"], watch.peak, watch.peak_without)


def trace_loss(model: nn.Module, compute: Callable[[], Tensor]) -> StepBytes:
    """Make a step of any model whose parameters are on the meta device, by what computes its loss.

    Nothing tells its head from the rest, so `logits` is 0.
    """
    with _watching(model) as watch:
        loss = compute()
        kept = watch.live
        loss.backward()
    return StepBytes(kept, 0, watch.peak, watch.peak_without)


def trace_most(model: nn.Module, compute: Callable[[], object]) -> int:
    """The most bytes at once beside the weights, of something that needs no backward pass."""
    with _watching(model) as watch, torch.no_grad():
        compute()
    return watch.peak


@contextmanager
def _watching(model: nn.Module) -> Iterator["_Watch"]:
    """Count every byte that operators make, with the gradients of the parameters apart; these are gone after it."""
    watch = _Watch(each.untyped_storage() for each in (*model.parameters(), *model.buffers()))
    hooks = [p.register_post_accumulate_grad_hook(watch.set_aside) for p in model.parameters() if p.requires_grad]
    # transformers counts tokens of pictures, which have no values here
    said, os.environ[_CHECKS] = os.environ.get(_CHECKS), "1"
    try:
        with watch, _fused_attention():
            yield watch
    finally:
        if said is None:
            del os.environ[_CHECKS]
        else:
            os.environ[_CHECKS] = said
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)


def _select(labels: int, marks: dict[str, int], watch: "_Watch") -> Callable[..., Any]:
    def select(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        marks["kept"] = watch.live
        # a copy, as the selection of labelled rows is
        return (args[0].flatten(0, -2)[:labels].clone()[None], *args[1:])

    return select


def _loss(logits: Tensor) -> Tensor:
    logits_NV = logits.flatten(0, -2).float()
    return nnf.cross_entropy(logits_NV, torch.zeros(len(logits_NV), dtype=torch.long, device="meta"))


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Attention that keeps its inputs, its output and a number for each row, as the fused kernels do.

    The meta device has none of these. A checkpoint's second forward pass sees it too.
    """
    own = nnf.scaled_dot_product_attention
    nnf.scaled_dot_product_attention = _attend
    try:
        yield
    finally:
        nnf.scaled_dot_product_attention = own


def _attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any) -> Any:
    return _Attention.apply(query, key, value, None if attn_mask is None else attn_mask.to(query.dtype))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, mask, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Any:  # noqa: ARG004
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


@cache
def _makes_new(func: Any) -> bool:
    """Whether an operator gives new tensors, and changes none."""
    schema = func._schema
    return not schema.is_mutable and all(each.alias_info is None for each in schema.returns)


class _Shape(NamedTuple):
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def _describe(value: Any) -> Any:
    """A tensor by its shape; another value as itself, with its type, for 1 is not 1.0."""
    if isinstance(value, Tensor):
        return _Shape(value.shape, value.stride(), value.dtype, value.device)
    return type(value), value


def _build(described: Any) -> Any:
    if not isinstance(described, _Shape):
        return described[1]
    return torch.empty_strided(described.size, described.stride, dtype=described.dtype, device=described.device)


class _Watch(TorchDispatchMode):
    """Counts the bytes of all tensors that operators make, from the operator until nobody holds them."""

    def __init__(self, known: Iterable[torch.UntypedStorage]) -> None:
        super().__init__()
        self.live = self.peak = self.peak_without = 0
        self._gradients = 0
        # what an operator makes of tensors of some shapes: its kernels for this device are slow Python. A trace of
        # the tiny SDXL takes 0.66 of the time that it takes without (0.43 to 0.97, 8 rounds in turns)
        self._known: dict[Any, tuple[list[Any], TreeSpec]] = {}
        # views of the weights are no new memory
        self._held = {storage._cdata: weakref.ref(storage) for storage in known}

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            # what is asked of values (is no row padded? is a gain tiny?) is answered as for a usual batch
            dtype = args[0].dtype
            return False if dtype is torch.bool else 1.0 if dtype.is_floating_point else 1
        if func is aten.equal.default and args[0].is_meta:
            return True
        made = self._make(func, args, kwargs or {})
        for each in tree_leaves(made):
            if isinstance(each, Tensor) and each.is_meta:
                self._add(each.untyped_storage())
        return made

    def set_aside(self, p: Tensor) -> None:
        """Count a parameter's gradient apart from now on."""
        self._gradients += 0 if p.grad is None else p.grad.nbytes

    def _make(self, func: Any, args: Any, kwargs: Any) -> Any:
        if not _makes_new(func):
            return func(*args, **kwargs)
        given, form = tree_flatten((args, kwargs))
        key = (func, form, *map(_describe, given))
        try:
            known = self._known.get(key)
        except TypeError:
            # it takes something else than tensors and numbers
            return func(*args, **kwargs)
        if known is None:
            made = func(*args, **kwargs)
            leaves, form = tree_flatten(made)
            if all(each.is_meta for each in (*leaves, *given) if isinstance(each, Tensor)):
                self._known[key] = ([_describe(each) for each in leaves], form)
            return made
        return tree_unflatten([_build(each) for each in known[0]], known[1])

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._held:
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            self.live -= size
            self._held.pop(key, None)

        self._held[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)
        self.peak_without = max(self.peak_without, self.live - self._gradients)
