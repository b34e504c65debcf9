"""Layers that a model never calls: its code hands their weight to another function, as the source of it says."""

import ast
import functools
import inspect
import operator
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Bypass:
    """How the weight of a layer is read past the layer, and so past an adapter on it."""

    where: str
    """The method that reads it, ``Class.method``."""
    always: bool
    """Nothing that runs in training, or nothing that runs in evaluation, calls the layer."""
    whole: bool
    """The weight is an argument as it is: that of a fused kernel, which runs on some machines and not on others."""

    def __str__(self) -> str:
        if self.always:
            return f"{self.where} reads its weight without calling it, so an adapter on it does nothing"
        return f"{self.where} also reads its weight without calling it; where it does, an adapter on it does nothing"


def find_bypassed(modules: Mapping[str, nn.Module]) -> dict[str, Bypass]:
    """The layers whose weight is read by the forward pass of a module around them, by name.

    Branches that settings of the model decide are followed as they are set; those that inputs decide are all followed.
    Where a module has no source nothing is known of it.
    """
    found: dict[str, Bypass] = {}
    for name, module in modules.items():
        if not module._modules or not _mentions_weight(type(module)):  # type: ignore[arg-type]
            continue
        modes = [_Reader(module, training=training).read() for training in (True, False)]
        for path in dict.fromkeys(path for mode in modes for path in mode.reads):
            reads = [mode.reads[path] for mode in modes if path in mode.reads]
            always = any(path in mode.reads and path not in mode.called for mode in modes)
            for layer in _expand(modules, f"{name}.{path}".lstrip(".")):
                found[layer] = Bypass(reads[0].where, always, any(read.whole for read in reads))
    return found


def _expand(modules: Mapping[str, nn.Module], path: str) -> list[str]:
    """The modules that a path means, in which ``*`` stands for every one in a list."""
    names = [""]
    for part in path.split("."):
        names = [f"{name}.{child}".lstrip(".") for name in names for child in _children(modules, name, part)]
    return [name for name in names if name in modules]


def _children(modules: Mapping[str, nn.Module], name: str, part: str) -> list[str]:
    if part != "*":
        return [part]
    return list(modules[name]._modules) if name in modules else []


@functools.cache
def _mentions_weight(kind: type[nn.Module]) -> bool:
    """Whether any method of a class could read a weight; most classes need no closer look."""
    own = (cls for cls in kind.__mro__ if cls not in (nn.Module, object))
    functions = (inspect.unwrap(each) for cls in own for each in vars(cls).values() if isinstance(each, FunctionType))
    return any({"weight", "forward"} & set(function.__code__.co_names) for function in functions)


@functools.cache
def _parse(function: Callable[..., Any]) -> ast.FunctionDef | None:
    try:
        node = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    return node if isinstance(node, ast.FunctionDef) else None


@dataclass(frozen=True)
class _Read:
    where: str
    whole: bool


@dataclass
class _Reader(ast.NodeVisitor):
    """Follows a module's forward pass through its methods, and keeps what is called and what weights are read."""

    module: nn.Module
    training: bool
    reads: dict[str, _Read] = field(default_factory=dict)
    """By the layer's path below the module."""
    called: set[str] = field(default_factory=set)
    names: dict[str, str] = field(default_factory=dict)
    """Local variables that hold the module itself (an empty path) or one below it."""
    seen: set[tuple[Callable[..., Any], tuple[tuple[str, str], ...]]] = field(default_factory=set)
    at: tuple[Callable[..., Any], type | None] = (len, None)
    """The function that is followed now, and the class that it is of."""

    def read(self) -> "_Reader":
        self._follow_method("forward", type(self.module).__mro__)
        return self

    def _follow_method(self, name: str, classes: Iterable[type]) -> None:
        for cls in classes:
            if name in vars(cls):
                function = inspect.unwrap(vars(cls)[name])
                if cls is not nn.Module and isinstance(function, FunctionType):
                    self._follow(function, cls, {next(iter(inspect.signature(function).parameters), "self"): ""})
                return

    def _follow(self, function: Callable[..., Any], cls: type | None, names: dict[str, str]) -> None:
        node, key = _parse(function), (function, tuple(sorted(names.items())))
        if node is None or key in self.seen or len(self.seen) > 100:
            return
        self.seen.add(key)
        before, self.names, self.at = (self.names, self.at), names, (function, cls)
        self._visit_block(node.body)
        self.names, self.at = before

    def _visit_block(self, nodes: Iterable[ast.stmt]) -> None:
        for node in nodes:
            self.visit(node)
            if isinstance(node, ast.Return | ast.Raise):
                return
            if isinstance(node, ast.If):
                decided = self._decide(node.test)
                taken = [] if decided is None else node.body if decided else node.orelse
                if taken and isinstance(taken[-1], ast.Return | ast.Raise):
                    return

    def visit_If(self, node: ast.If) -> None:
        self.visit(node.test)
        decided = self._decide(node.test)
        for branch, nodes in ((True, node.body), (False, node.orelse)):
            if decided in (branch, None):
                self._visit_block(nodes)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        decided = self._decide(node.test)
        self.visit(node.test)
        for branch, value in ((True, node.body), (False, node.orelse)):
            if decided in (branch, None):
                self.visit(value)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        for target in node.targets:
            self._name(target, node.value)

    def visit_For(self, node: ast.For) -> None:
        self.visit(node.iter)
        loops = [node.iter]
        targets: list[ast.expr] = [node.target]
        if (
            isinstance(node.iter, ast.Call)
            and isinstance(node.iter.func, ast.Name)
            and isinstance(node.target, ast.Tuple)
        ):
            skip = {"enumerate": 1, "zip": 0}.get(node.iter.func.id)
            loops, targets = (list(node.iter.args), node.target.elts[skip:]) if skip is not None else ([], [])
        for loop, target in zip(loops, targets, strict=False):
            path = self._path(loop)
            if isinstance(target, ast.Name) and path is not None:
                self.names[target.id] = f"{path}.*"
        self._visit_block(node.body)
        self._visit_block(node.orelse)

    def visit_Compare(self, node: ast.Compare) -> None:
        if not all(isinstance(each, ast.Is | ast.IsNot) for each in node.ops):
            self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr == "weight":
            self._keep_read(node, whole=False)
        elif not (_is_weight(node.value) and node.attr in _FACTS) and not _is_write_to_data(node):
            self.visit(node.value)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "hasattr", "getattr"):
            return
        arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
        self._visit_callee(node)
        for argument in arguments:
            path = self._path(argument)
            if path is not None and self._is_module(path):
                self.called.add(path)  # whoever gets the layer may call it
            elif _is_weight(argument):
                self._keep_read(argument, whole=True)  # type: ignore[arg-type]
            else:
                self.visit(argument)

    def _visit_callee(self, node: ast.Call) -> None:
        callee, path = node.func, self._path(node.func)
        if isinstance(callee, ast.Attribute) and isinstance(callee.value, ast.Call):
            inner = callee.value.func
            if isinstance(inner, ast.Name) and inner.id == "super" and self.at[1] is not None:
                order = type(self.module).__mro__
                return self._follow_method(callee.attr, order[order.index(self.at[1]) + 1 :])
        if path is not None and self._is_module(path.removesuffix(".forward")):
            self.called.add(path.removesuffix(".forward"))
        elif path is not None and path.isidentifier() and hasattr(type(self.module), path):
            self._follow_method(path, type(self.module).__mro__)
        elif isinstance(callee, ast.Name):
            self._follow_function(callee.id, node)
        else:
            self.visit(callee)
        return None

    def _follow_function(self, name: str, node: ast.Call) -> None:
        """Into a function that gets the module itself."""
        function = inspect.unwrap(getattr(self.at[0], "__globals__", {}).get(name) or len)
        if not isinstance(function, FunctionType) or function.__module__ == "torch":
            return
        parameters = list(inspect.signature(function).parameters)
        given = {
            **dict(zip(parameters, node.args, strict=False)),
            **{each.arg: each.value for each in node.keywords if each.arg},
        }
        names = {parameter: "" for parameter, value in given.items() if self._path(value) == ""}
        if names:
            self._follow(function, None, names)

    def _keep_read(self, node: ast.Attribute, *, whole: bool) -> None:
        path = self._path(node.value)
        if path and self._is_module(path):
            where = f"{type(self.module).__name__}.{self.at[0].__name__}"
            if path not in self.reads or whole:
                self.reads[path] = _Read(where, whole)
        elif path is None:
            self.visit(node.value)

    def _name(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for each, its in zip(target.elts, value.elts, strict=False):
                self._name(each, its)
        elif isinstance(target, ast.Name):
            self.names.pop(target.id, None)
            path = self._path(value)
            if path is not None and (not path or self._is_module(path)):
                self.names[target.id] = path

    def _path(self, node: ast.expr) -> str | None:
        """Where below the module an expression leads, or None where it is of something else."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        if isinstance(node, ast.Attribute):
            path = self._path(node.value)
            return None if path is None else f"{path}.{node.attr}".lstrip(".")
        if isinstance(node, ast.Subscript):
            path = self._path(node.value)
            if path is None:
                return None
            index = node.slice.value if isinstance(node.slice, ast.Constant) else "*"
            return f"{path}.{index!s}"
        if (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) == "getattr"
            and isinstance(node.args[1], ast.Constant)
        ):
            path = self._path(node.args[0])
            return None if path is None else f"{path}.{node.args[1].value!s}".lstrip(".")
        return None

    def _is_module(self, path: str) -> bool:
        modules = [self.module]
        for part in path.split("."):
            modules = [
                inner
                for module in modules
                for inner in (module._modules.values() if part == "*" else [module._modules.get(part)])
                if inner is not None
            ]
        return bool(modules)

    def _decide(self, test: ast.expr) -> bool | None:
        """What a condition is that follows from the module's own settings; None where anything else has a say."""
        if isinstance(test, ast.BoolOp):
            sides, ends = [self._decide(each) for each in test.values], isinstance(test.op, ast.Or)
            return ends if ends in sides else None if None in sides else not ends
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            inner = self._decide(test.operand)
            return None if inner is None else not inner
        try:
            return bool(self._value(test))
        except Exception:  # noqa: BLE001  what cannot be told here is told by nobody before the model runs
            return None

    def _value(self, node: ast.expr) -> Any:
        """Raise whatever stands in the way where an expression is not of the module's settings alone."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name) and self.names.get(node.id) == "":
            return self.module
        if isinstance(node, ast.Attribute):
            owner = self._value(node.value)
            return self.training if owner is self.module and node.attr == "training" else getattr(owner, node.attr)
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            compare = _COMPARE[type(node.ops[0])]
            return compare(self._value(node.left), self._value(node.comparators[0]))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
            known: dict[str, Callable[..., Any]] = {"hasattr": hasattr, "getattr": getattr, "len": len}
            return known[node.func.id](*map(self._value, node.args))
        raise ValueError(ast.dump(node))


# what is asked of a weight and is no use of its numbers
_FACTS = frozenset(
    {"dtype", "device", "shape", "size", "ndim", "dim", "numel", "requires_grad", "is_meta", "is_cuda", "data_ptr"}
)
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda one, many: one in many,
    ast.NotIn: lambda one, many: one not in many,
}


def _is_weight(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "weight"


def _is_write_to_data(node: ast.Attribute) -> bool:
    """Whether it is ``weight.data.clamp_`` or the like, which changes the weight and makes nothing of it."""
    value = node.value
    return (
        node.attr.endswith("_")
        and isinstance(value, ast.Attribute)
        and value.attr == "data"
        and _is_weight(value.value)
    )
