"""Put adapters on a model in place, switch them, read and write them, take them off or fold them in."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import files
from .bank import Bank, DoraBank, bank_for, other_banks
from .bases import open_base
from .config import DoraConfig
from .convolutions import DoraConv
from .dequantised import Merging
from .embeddings import DoraEmbedding
from .errors import DoraError, UsageError
from .formats import Given, to_peft
from .formats.storage import one_part, read_any
from .layers import DoraLinear, TrainedCopy
from .magnitudes import DoraMagnitude
from .quantised import keep_readable
from .state import AdapterState, LayerAdapter
from .targets import adaptable, choose, magnitudes, matching, refuse

Model = TypeVar("Model", bound=nn.Module)
_OWN_SETTINGS = "doralib_config.json"


@dataclass
class _Adapted:
    """What `adapt` did to a model."""

    config: DoraConfig
    frozen: dict[str, bool]
    """Whether each parameter was trainable before, by its name then."""
    biases: dict[str, Tensor] = field(default_factory=dict)
    """Values of trained biases before training, by their name in the adapted model."""


def adapt(model: Model, config: DoraConfig) -> Model:
    """Wrap the target layers in place and freeze everything else; the model itself is returned.

    With method "full" nothing is wrapped: the targets' weights, or all, are set to train.

    Raises:
        UsageError: if a target is misspelt, tied, already adapted or not linear; all problems at once, and the model
            is left as it was.
    """
    if hasattr(model, "_doralib"):
        raise UsageError("this model is adapted already; doralib.remove(model) takes the adapter off")
    if config.method == "full":
        return _train_in_full(model, config)
    chosen = choose(model, config)
    whole = matching(model, config.modules_to_save, "modules_to_save") if config.modules_to_save else []
    return _wrap(model, config, chosen, whole)


def remove(model: Model) -> Model:
    """Take the adapter off in place: the model as it was before `adapt`."""
    adapted = _adapted(model)
    for name, value in adapted.biases.items():
        model.get_parameter(name).data.copy_(value)
    _unwrap(model, lambda _, layer: layer.base_layer)
    _restore(model, adapted)
    return model


def merge(model: Model, *, dequantise: bool = False) -> Model:
    """Fold the adapter in, in place: ``g ∘ (W + s B A)``, summed in float32, cast once; quantised: see `Merging`."""
    adapted = _adapted(model)
    merging = Merging(model, dequantise)
    _unwrap(model, merging.merged)
    merging.finish()
    _restore(model, adapted)
    return model


def disable(model: nn.Module) -> None:
    """Let the model compute as if it had no adapter; `enable` switches back."""
    _switch(model, enabled=False)


def enable(model: nn.Module) -> None:
    """Let the adapter take part again."""
    _switch(model, enabled=True)


@contextmanager
def disabled(model: Model) -> Iterator[Model]:
    """The base model's own outputs, inside a with block."""
    disable(model)
    try:
        yield model
    finally:
        enable(model)


def config_of(model: nn.Module) -> DoraConfig:
    """The settings the model was adapted with."""
    return _adapted(model).config


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """What training changes, by name."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def state_of(model: nn.Module) -> AdapterState:
    """The adapter of a model; views of its parameters, not copies."""
    config = config_of(model)
    layers: dict[str, LayerAdapter] = {}
    extra: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, DoraLinear):
            layers[name] = module.state()
        elif isinstance(module, TrainedCopy):
            extra |= {f"{name}.{key}": p.detach() for key, p in module.trained.named_parameters()}
    extra |= {_plain(name): model.get_parameter(name).detach() for name in _adapted(model).biases}
    if config.method == "full":
        extra = {name: p.detach() for name, p in trainable(model)}
    return AdapterState(layers, extra, _model_name(model))


@torch.no_grad()
def load_into(model: nn.Module, state: AdapterState) -> None:
    """Copy an adapter's values into a model adapted in the same layers.

    Raises:
        DoraError: listing every layer that is missing, too many or of another shape; nothing is changed then.
    """
    into = state_of(model)
    pairs = {**_tensors(into)}
    given = _tensors(state)
    problems = [f"{name}: the adapter has no such tensor" for name in pairs.keys() - given.keys()]
    problems += [f"{name}: the model has no such tensor" for name in given.keys() - pairs.keys()]
    problems += [
        f"{name}: {tuple(given[name].shape)} in the adapter, {tuple(pairs[name].shape)} in the model"
        for name in pairs.keys() & given.keys()
        if given[name].shape != pairs[name].shape
    ]
    modules = dict(model.named_modules())
    problems += [
        f"{name}: turns its rows, but only their lengths are adapted in the model"
        for name, adapter in state.layers.items()
        if isinstance(modules.get(name), DoraMagnitude) and all(factor.any() for factor in adapter.factors)
    ]
    problems += other_banks(into, state)
    if problems:
        raise DoraError(_listed("the adapter does not fit this model", sorted(problems)))
    for name, tensor in pairs.items():
        tensor.copy_(given[name])
    for name, adapter in state.layers.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, DoraLinear)
        layer.scale = adapter.scale


def save_adapter(model: nn.Module, path: str | Path) -> None:
    """Write the adapter into a folder that PEFT reads as it is; each file is replaced whole or not at all.

    Besides PEFT's two files, ``doralib_config.json`` keeps what PEFT has no word for (dropout_mode, detach_norm).
    """
    config, folder = config_of(model), Path(path)
    if config.method == "full":
        raise UsageError("full fine-tuning has no adapter: save the model itself with model.save_pretrained(path)")
    tensors, settings = to_peft(config, state_of(model))
    folder.mkdir(parents=True, exist_ok=True)
    files.write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    files.write_json(folder / "adapter_config.json", settings)
    files.write_json(folder / _OWN_SETTINGS, config.model_dump(mode="json"))


def read_adapter(path: str | Path, model: nn.Module | None = None) -> tuple[DoraConfig, AdapterState]:
    """An adapter's file or folder, in any known format, as settings and state; what had to be assumed is a warning.

    Args:
        model: The base model, for formats that need its names or its heads.

    Raises:
        UsageError: if there is no adapter, or its format needs to know more.
        DoraError: if its files are damaged or do not belong together.
    """
    found = one_part(read_any(path, Given() if model is None else _known(model))[1])
    for note in found.notes:
        warnings.warn(f"{path}: {note}", stacklevel=3)
    own = Path(path) / _OWN_SETTINGS
    return DoraConfig(**files.read_json(own)) if own.exists() else found.config, found.state


def _known(model: nn.Module) -> Given:
    to_dict: Callable[[], dict[str, Any]] = getattr(getattr(model, "config", None), "to_dict", dict)
    settings = to_dict()
    return Given(shapes={name: tuple(shape) for name, shape in adaptable(model).items()}, config=settings)


def load_adapter(model: Model, path: str | Path) -> Model:
    """Adapt a plain model from the file's own settings, or fill a model that is adapted in the same layers.

    The file may be of any format that ``doralib convert`` reads.

    Raises:
        DoraError: if the adapter belongs to another model: every name and shape that does not fit.
    """
    config, state = read_adapter(path, model)
    shapes = adaptable(model)
    narrowed = {name: layer.narrowed(shapes.get(name, ())) for name, layer in state.layers.items()}
    state = replace(state, layers=narrowed)
    if not hasattr(model, "_doralib"):
        linear = {name: m for name, m in model.named_modules() if name in state.layers}
        absent = sorted(state.layers.keys() - linear.keys())
        if absent:
            raise DoraError(_listed(f"{path} is an adapter of another model; this one has no", absent))
        refuse(model, list(linear), _shapes_that_fit(path, state, model))
        whole = matching(model, config.modules_to_save, "modules_to_save") if config.modules_to_save else []
        _wrap(model, config, list(linear), whole)
    load_into(model, state)
    return model


def _wrap(model: Model, config: DoraConfig, chosen: list[str], whole: list[str]) -> Model:
    """Every wrapper is made before the first is put in, so that a refusal changes nothing."""
    _refuse_whole(model, chosen, whole)
    biases = _bias_names(model, config, chosen)
    adapted = _Adapted(config, {name: p.requires_grad for name, p in model.named_parameters()})
    model.requires_grad_(False)
    try:
        wrappers = _wrappers(model, config, chosen, whole)
    except DoraError:
        for name, p in model.named_parameters():
            p.requires_grad_(adapted.frozen[name])
        raise
    keep_readable(model)
    for name, wrapper in wrappers.items():
        _put(model, name, wrapper.train(model.get_submodule(name).training))
    for name in biases:
        bias = model.get_parameter(name).requires_grad_(True)
        adapted.biases[name] = bias.detach().clone()
    model._doralib = adapted  # type: ignore[assignment]
    return model


def _wrappers(
    model: nn.Module, config: DoraConfig, chosen: list[str], whole: list[str]
) -> dict[str, DoraLinear | TrainedCopy]:
    alone = set(magnitudes(model, config))
    bank = bank_for([model.get_submodule(name) for name in chosen], config)
    wrappers: dict[str, DoraLinear | TrainedCopy] = {
        name: _adapted_layer(model.get_submodule(name), name, config, bank, alone=name in alone) for name in chosen
    }
    return wrappers | {name: TrainedCopy(model.get_submodule(name)) for name in whole}


_LAYERS: dict[str, type[DoraLinear]] = {
    "convolution": DoraConv,
    "transposed_convolution": DoraConv,
    "embedding": DoraEmbedding,
}


def _adapted_layer(module: nn.Module, name: str, config: DoraConfig, bank: Bank | None, *, alone: bool) -> DoraLinear:
    if alone:
        return DoraMagnitude(module, 1, 1.0, config)
    if bank is not None:
        return DoraBank(module, bank, config)
    base = open_base(module)
    layer = DoraLinear if base is None else _LAYERS.get(base.kind, DoraLinear)
    return layer(module, config.rank_of(name), config.scale_of(name), config)


def _train_in_full(model: Model, config: DoraConfig) -> Model:
    frozen = {name: p.requires_grad for name, p in model.named_parameters()}
    wanted = config.target_modules
    chosen = [""] if wanted is None else choose(model, config) if wanted == "all-linear" else []
    chosen = chosen or matching(model, wanted or (), "target_modules")
    model.requires_grad_(False)
    for name in chosen:
        model.get_submodule(name).requires_grad_(True)
    model._doralib = _Adapted(config, frozen)  # type: ignore[assignment]
    return model


def _refuse_whole(model: nn.Module, chosen: list[str], whole: list[str]) -> None:
    owners: dict[int, set[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for p in module.parameters(recurse=False):
            owners.setdefault(id(p), set()).add(name)
    problems = [f"{name} is in target_modules too" for name in whole if name in chosen]
    for name in whole:
        inside = {name, *(f"{name}.{n}" for n, _ in model.get_submodule(name).named_modules())}
        for p in model.get_submodule(name).parameters():
            if others := owners[id(p)] - inside:
                problems.append(f"{name} is tied to {', '.join(sorted(others))}; a copy of it would break the tie")
    if problems:
        raise UsageError("modules_to_save: " + "; ".join(dict.fromkeys(problems)))


def _bias_names(model: nn.Module, config: DoraConfig, chosen: list[str]) -> list[str]:
    """The biases to train, by their name in the adapted model."""
    if config.bias == "none":
        return []
    owned = {f"{name}.bias": f"{name}.base_layer.bias" for name in chosen}
    biases = {n: p for n, p in model.named_parameters() if n.endswith("bias") and (config.bias == "all" or n in owned)}
    if small := [name for name, p in biases.items() if p.dtype.itemsize < 4]:
        raise UsageError(
            f"bias: {config.bias!r} trains {small[0]} in {biases[small[0]].dtype}, where small steps are lost; "
            "load the model in float32"
        )
    return [owned.get(name, name) for name in biases]


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _wrapped(model: nn.Module) -> list[tuple[str, DoraLinear | TrainedCopy]]:
    return [(name, m) for name, m in model.named_modules() if isinstance(m, DoraLinear | TrainedCopy)]


def _unwrap(model: nn.Module, plain: Callable[[str, DoraLinear | TrainedCopy], nn.Module]) -> None:
    """Every plain layer is made before the first is put back."""
    replaced = [(name, plain(name, wrapper).train(wrapper.training)) for name, wrapper in _wrapped(model)]
    for name, module in replaced:
        _put(model, name, module)


def _restore(model: nn.Module, adapted: _Adapted) -> None:
    for name, p in model.named_parameters():
        p.requires_grad_(adapted.frozen[name])
    del model._doralib


def _switch(model: nn.Module, *, enabled: bool) -> None:
    adapted = _adapted(model)
    if adapted.config.method == "full":
        raise UsageError("full fine-tuning changes the weights themselves; there is no adapter to switch")
    wrapped = _wrapped(model)
    if all(wrapper.enabled == enabled for _, wrapper in wrapped):
        return
    for _, wrapper in wrapped:
        wrapper.enabled = enabled
    for name, other in adapted.biases.items():
        bias = model.get_parameter(name)
        adapted.biases[name], bias.data = bias.data, other


def _adapted(model: nn.Module) -> _Adapted:
    adapted = getattr(model, "_doralib", None)
    if not isinstance(adapted, _Adapted):
        raise UsageError("this model has no adapter; put one on with doralib.adapt or doralib.load_adapter")
    return adapted


def _tensors(state: AdapterState) -> dict[str, Tensor]:
    parts = {
        f"{layer}.{field}": tensor
        for layer, adapter in state.layers.items()
        for field, tensor in adapter.tensors().items()
    }
    return {**parts, **state.extra}


def _shapes_that_fit(path: str | Path, state: AdapterState, model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The layers of a model that can be adapted, once every adapted shape is right."""
    linear = adaptable(model)
    wrong = [
        f"{name}: {adapter.shape} in the adapter, {linear[name]} in the model"
        for name, adapter in state.layers.items()
        if name in linear and linear[name] != adapter.shape
    ]
    for name, adapter in state.layers.items():
        base = open_base(model.get_submodule(name))
        if base is not None and base.kind != adapter.kind:
            wrong.append(f"{name}: {_words(adapter.kind)} in the adapter, {_words(base.kind)} in the model")
    if wrong:
        raise DoraError(_listed(f"{path} is an adapter of another model; these shapes differ", wrong))
    return linear


def _words(kind: str) -> str:
    return kind.replace("_", " ")


def _plain(name: str) -> str:
    return name.replace(".base_layer.", ".")


def _model_name(model: nn.Module) -> str | None:
    return getattr(model, "name_or_path", None) or None


def _listed(what: str, lines: list[str]) -> str:
    more = [f"... and {len(lines) - 20} more"] if len(lines) > 20 else []
    return "\n  ".join([f"{what}:", *lines[:20], *more])
