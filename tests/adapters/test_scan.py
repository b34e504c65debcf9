"""How often a model is looked at: once for each thing that is done with it, whatever its size."""

from torch import nn

import doralib
from doralib.config import DoraConfig


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


def test_all_linear_asks_for_the_head_once():
    model = doralib.adapt(Model(), DoraConfig(r=1, target_modules="all-linear"))
    assert model.asked == 1
    assert type(model.score) is nn.Linear
