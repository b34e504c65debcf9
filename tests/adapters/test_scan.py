"""How often a model is looked at: once for each thing that is done with it, whatever its size."""

import importlib
import pkgutil
from collections import Counter

import pytest
from torch import nn

import doralib
from doralib.adapters.scan import Scan
from doralib.config import DoraConfig
from doralib.errors import UsageError
from doralib.layers.base import registry as bases

CONFIG = DoraConfig(r=1, target_modules="all-linear")


class Model(nn.Module):
    """A hundred layers and a head, which counts how often it is asked for its head."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(100))
        self.score = nn.Linear(3, 2)
        self.asked = 0

    def get_output_embeddings(self):
        self.asked += 1
        return self.score


@pytest.fixture
def opened(monkeypatch):
    """How often each module is opened, wherever a module of doralib asks for it."""
    counts, real = Counter(), bases.open_base

    def count(module):
        counts[module] += 1
        return real(module)

    for found in pkgutil.walk_packages(doralib.__path__, "doralib."):
        if found.name.startswith(("doralib.adapters.", "doralib.layers.")):
            module = importlib.import_module(found.name)
            if hasattr(module, "open_base"):
                monkeypatch.setattr(module, "open_base", count)
    return counts


def test_all_linear_asks_for_the_head_once():
    model = doralib.adapt(Model(), CONFIG)
    assert model.asked == 1
    assert type(model.score) is nn.Linear


CHANGES = [{}, {"method": "dvora"}, {"bias": "all"}, {"modules_to_save": ("score",)}]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_every_layer_is_opened_once_to_adapt_load_and_add(opened, changes, tmp_path):
    model, config = Model(), CONFIG.model_copy(update=changes)
    doralib.save_adapter(doralib.adapt(model, config), tmp_path)
    assert len(opened) > 100
    assert set(opened.values()) == {1}
    for other in (Model(), model):
        # onto a plain model, and into one that is adapted
        opened.clear()
        doralib.load_adapter(other, tmp_path)
        assert set(opened.values()) == {1}
    # beside the first
    opened.clear()
    doralib.load_adapter(model, tmp_path, "again")
    assert set(opened.values()) == {1}
    opened.clear()
    doralib.add_adapter(model, "fresh", config)
    assert set(opened.values()) == {1}


def test_a_scan_shows_the_base_model_whatever_adapters_it_has():
    model = Model()
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    doralib.adapt(model, DoraConfig(r=1, target_modules=("0", "1"), modules_to_save=("score",)))
    doralib.add_adapter(model, "other", DoraConfig(r=1, target_modules=("1", "2")))
    found = Scan(model)
    assert found.modules == modules
    assert all(found.parameters[name] is p for name, p in parameters.items())
    assert found.parameters.keys() == parameters.keys()


def test_a_part_that_was_adapted_alone_is_refused():
    model = Model()
    doralib.adapt(model.layers, DoraConfig(r=1, target_modules=("7",)))
    with pytest.raises(UsageError, match=r"layers\.7 is adapted already"):
        doralib.adapt(model, CONFIG)
