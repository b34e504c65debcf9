"""Chronos-2 fine-tuned by its own `fit`, as docs/forecast.md has it: PEFT's DoRA layers, by doralib's kernels."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import doralib.peft

chronos = pytest.importorskip("chronos", reason="chronos-forecasting is not installed")
pytestmark = pytest.mark.interop
PAGE = Path(__file__).parents[2] / "docs" / "forecast.md"


def tiny_pipeline():
    from chronos.chronos2.config import Chronos2CoreConfig
    from chronos.chronos2.model import Chronos2Model

    torch.manual_seed(0)
    asked = {"context_length": 32, "output_patch_size": 4, "input_patch_size": 4, "input_patch_stride": 4}
    asked |= {
        "quantiles": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
        "use_reg_token": True,
        "use_arcsinh": True,
        "max_output_patches": 4,
    }
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    config = Chronos2CoreConfig(**sizes, chronos_config=asked, architectures=["Chronos2Model"])
    return chronos.Chronos2Pipeline(Chronos2Model(config).eval())


def test_the_page_s_example_trains_the_layers_that_are_accelerated(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    pipeline, taken = tiny_pipeline(), []
    accelerate = doralib.peft.accelerate

    def count(model):
        found = accelerate(model)
        taken.append(sum("doralib_fast" in layer.__dict__ for layer in found.modules()))
        return found

    monkeypatch.setattr(doralib.peft, "accelerate", count)
    monkeypatch.setattr(chronos.Chronos2Pipeline, "from_pretrained", lambda *_, **__: pipeline)
    series = [np.sin(np.arange(48) / 3 + k) * (k + 1) for k in range(4)]
    (code,) = re.findall(r"^```py\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    fewer = code.replace("num_steps=1000", "num_steps=3, batch_size=4").replace("1e-4", "1e-2")
    names = {"series": series}
    exec(compile(fewer, "forecast.md", "exec"), names)
    # q, k, v and o over time, and over the series of a group, of two layers
    assert taken == [16]
    tuned = names["tuned"]
    # it comes as it trained, with dropout
    tuned.model.eval()
    lengths = [p for name, p in tuned.model.named_parameters() if "lora_magnitude_vector" in name]
    assert len(lengths) == taken[0]
    context = torch.tensor(np.stack(series)[:, None], dtype=torch.float32)
    before, after = (each.predict(context, prediction_length=12)[0] for each in (pipeline, tuned))
    assert not torch.allclose(before, after, atol=1e-4)
    fast = tuned.predict(context, prediction_length=12)[0]
    doralib.peft.restore(tuned.model)
    torch.testing.assert_close(tuned.predict(context, prediction_length=12)[0], fast, atol=1e-4, rtol=1e-3)
