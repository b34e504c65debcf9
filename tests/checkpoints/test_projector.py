"""A projector that begins by least squares: held to numpy's solution, and to what else of the model stays."""

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="pictures are read by pillow")
from PIL import Image
from seeing_models import ALONE, build

from doralib.checkpoints.projector import fit_projector
from doralib.data.pictures import Picture, open_picture
from doralib.errors import UsageError


@pytest.fixture
def captioned(tmp_path):
    rng, words = np.random.default_rng(0), ["red cat", "one blue dog", "a picture", "yes", "no user", "what is in it"]
    made = []
    for i, caption in enumerate(words * 4):
        file = tmp_path / f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (28, 28, 3), dtype=np.uint8)).save(file)
        made.append((Picture(str(file)), caption))
    return made


@pytest.mark.parametrize("ridge", [1e-3, 0.1, 10.0])
def test_it_is_the_least_squares_of_numpy(captioned, ridge):
    model, processor = build(ALONE["llava"])
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    projector, inputs, words = model.model.multi_modal_projector, [], []
    with torch.no_grad():
        for picture, caption in captioned:
            pixels = processor.image_processor([open_picture(picture)], return_tensors="pt")["pixel_values"]
            states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
            patches = states[model.config.vision_feature_layer][0, 1:]
            inputs.append(projector.act(projector.linear_1(patches)).double().mean(0).numpy())
            ids = processor.tokenizer(f" {caption}", add_special_tokens=False)["input_ids"]
            words.append(model.get_input_embeddings().weight[ids].double().mean(0).numpy())
    x, y = np.stack(inputs), np.stack(words)
    x_mean, y_mean = x.mean(0), y.mean(0)
    weight = np.sqrt(ridge * ((x - x_mean) ** 2).mean() * len(x))
    # a ridge is rows more, whose answers are 0
    rows = np.vstack([x - x_mean, weight * np.eye(x.shape[1])])
    wanted = np.linalg.lstsq(rows, np.vstack([y - y_mean, np.zeros((x.shape[1], y.shape[1]))]), rcond=None)[0]
    ticked = []
    share = fit_projector(
        model, processor, captioned, ridge=ridge, batch_size=7, tick=lambda what, amount, total: ticked.append(amount)
    )
    assert ticked == [7, 7, 7, 3]
    found = projector.linear_2
    np.testing.assert_allclose(found.weight.detach().numpy(), wanted.T, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())
    bias = y_mean - x_mean @ wanted
    np.testing.assert_allclose(found.bias.detach().numpy(), bias, rtol=1e-3, atol=1e-4 * np.abs(bias).max())
    left = ((x - x_mean) @ wanted - (y - y_mean)) ** 2
    assert share == pytest.approx(1 - left.sum() / ((y - y_mean) ** 2).sum(), abs=1e-4)
    after = model.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert {name.rpartition("projector.")[2] for name in changed} == {"linear_2.weight", "linear_2.bias"}


def test_captions_that_teach_nothing_are_refused(captioned):
    model, processor = build(ALONE["llava"])
    same = [(picture, " yes ") for picture, _ in captioned[:3]]
    for given, said in (
        ([], "0 pictures have 0 different ones"),
        (same, "3 pictures have 1 different ones"),
        ([*captioned[:4], (captioned[5][0], " ")], "5 pictures have 4 different ones"),
    ):
        with pytest.raises(UsageError, match=said):
            fit_projector(model, processor, given)
