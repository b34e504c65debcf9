"""Scores of forecasts against cases worked out by hand, and forecasts against closed forms."""

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from scipy import stats

from doralib.data.forecaster import describe_forecaster, forecast
from doralib.data.series import TimeSeries
from doralib.data.windows import Origin, stack_pasts
from doralib.errors import DoraError, UsageError
from doralib.evaluation.evaluate import evaluate
from doralib.evaluation.rows import read_examples
from doralib.evaluation.task_file import load_tasks
from doralib.evaluation.task_media import ForecastTask

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "head_dim": 8}
LENGTHS = {"context_length": 24, "horizon_length": 6, "patch_length": 4}
PATCHES = {"context_length": 24, "prediction_length": 6, "patch_length": 4, "patch_stride": 4, "d_model": 16}


def make(name, **changes):
    torch.manual_seed(0)
    config = {
        "TimesFm2_5": lambda: transformers.TimesFm2_5Config(
            **{**SIZES, **LENGTHS, "num_key_value_heads": 2, "output_quantile_len": 6, **changes}
        ),
        "TimesFm": lambda: transformers.TimesFmConfig(**SIZES, **LENGTHS, **changes),
        "PatchTST": lambda: transformers.PatchTSTConfig(
            **PATCHES, num_hidden_layers=2, num_attention_heads=2, ffn_dim=16, **changes
        ),
        "PatchTSMixer": lambda: transformers.PatchTSMixerConfig(**PATCHES, num_layers=2, **changes),
    }[name]()
    kind = "ModelForPrediction" if name.startswith("Times") else "ForPrediction"
    return getattr(transformers, f"{name}{kind}")(config).eval()


NAMES = ("TimesFm2_5", "TimesFm", "PatchTST", "PatchTSMixer")


@pytest.fixture(scope="module")
def models():
    return {name: make(name) for name in NAMES}


def series(values, name="a"):
    times = pd.date_range("2020-01-01", periods=len(values), freq="MS")
    return TimeSeries(name, np.array(values, dtype=float), times, pd.DateOffset(months=1))


def ask(model, pasts, context=24, batch_size=8):
    return forecast(model, pasts, [1] * len(pasts), context, batch_size, lambda _: None)


def waves(lengths=(24, 24, 13, 20)):
    return [50 * i + (i + 1) * np.sin(np.arange(length) * (i + 1) / 4) for i, length in enumerate(lengths)]


@pytest.mark.parametrize("name", NAMES)
def test_a_forecast_depends_on_no_other_of_its_batch_and_on_no_unit(models, name):
    model, pasts = models[name], waves()
    whole = ask(model, pasts)
    for past, want in zip(pasts, whole, strict=True):
        np.testing.assert_allclose(ask(model, [past])[0], want, rtol=1e-3, atol=1e-3)
        (other,) = ask(model, [past * 1e4 - 7e5])
        np.testing.assert_allclose((other + 7e5) / 1e4, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_a_forecast_is_that_of_the_model_itself(models, name):
    """On a whole past of about the unit that the model makes of it."""
    model, past = models[name], waves()[1] - 50
    given = torch.tensor(past, dtype=torch.float32)
    with torch.no_grad():
        if name.startswith("Times"):
            options = {"forecast_context_len": 24, "truncate_negative": False} if "2_5" in name else {"freq": [1]}
            output = model(past_values=[given], **options)
            want = [output.mean_predictions[0][:, None], output.full_predictions[0][:, 1:]]
        else:
            want = [model(past_values=given[None, :, None]).prediction_outputs[0]]
    np.testing.assert_allclose(ask(model, [past])[0], torch.cat(want, 1).numpy(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_whose_last_layers_are_zero_forecasts_the_mean(name):
    """What comes out of the last layer is in the unit of the past: 0 is its mean."""
    model = make(name)
    with torch.no_grad():
        for each, p in model.named_parameters():
            if "output_projection" in each or "horizon_ff_layer" in each or each.startswith("head."):
                p.zero_()
    past = waves()[3]
    (found,) = ask(model, [past])
    # TimesFM 1 scales by the first patches that hold three values
    want = past[-20:][:4].mean() if name == "TimesFm" else past.mean()
    np.testing.assert_allclose(found[:, 0], want, rtol=1e-4)


def test_what_was_never_negative_is_not_forecast_so():
    """Whatever else is in the batch: the model itself looks at all of it."""
    model, past = make("TimesFm2_5"), np.abs(waves()[0])
    with torch.no_grad():
        model.output_projection_point.output_layer.weight.mul_(1000)
    assert (ask(model, [past - 9])[0] < -9).any()
    for pasts in ([past], [past, past - 9]):
        assert (ask(model, pasts)[0] == 0).any()
        assert (ask(model, pasts)[0] >= 0).all()
    model.config.infer_is_positive = False
    assert (ask(model, [past])[0] < 0).any()


@pytest.mark.parametrize("kind", ["normal", "student_t", "negative_binomial"])
def test_quantiles_of_a_distribution_are_those_of_scipy(kind):
    model = make("PatchTST", loss="nll", distribution_output=kind)
    past = np.array([3.0, 5, 2, 8, 4, 6] * 4)
    (found,) = ask(model, [past])
    family = describe_forecaster(model)
    assert family.levels == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    counts = kind == "negative_binomial"
    unit = (0.0, 1.0) if counts else (past.mean(), past.std())
    given = torch.tensor((past - unit[0]) / unit[1], dtype=torch.float32)[None, :, None]
    with torch.no_grad():
        output = model(past_values=given)
        drawn = model.distribution_output.distribution(output.prediction_outputs, loc=output.loc, scale=output.scale)
        samples = drawn.sample((4000,))[:, 0, :, 0].double().numpy() * unit[1] + unit[0]
    np.testing.assert_array_equal(found[:, 0], found[:, 5])
    assert (np.diff(found[:, 1:], axis=1) >= 0).all()
    for level, column in zip(family.levels, found[:, 1:].T, strict=True):
        below = (samples <= column + 1e-9).mean(0)
        assert (below > level - 0.04).all()
        # of counts no value has exactly this share below it
        assert counts or (below < level + 0.04).all()


def test_the_loss_is_the_model_s_own_on_windows_in_their_unit(models):
    past, future = waves()[0], np.arange(6.0)
    for name, model in models.items():
        batch = stack_pasts([past], [0], 24)
        wanted = torch.tensor(future, dtype=torch.float32)[None]
        loss = describe_forecaster(model).ask(model, batch, wanted).loss
        given = batch["past_values"]
        if name == "TimesFm2_5":
            want = model(past_values=given, forecast_context_len=24, future_values=wanted).loss
        elif name == "TimesFm":
            want = model(past_values=given, freq=[0], future_values=wanted).loss
        else:
            want = model(past_values=given[..., None], future_values=wanted[..., None]).loss
        torch.testing.assert_close(loss, want)


def test_scores_by_hand():
    pytest.importorskip("utilsforecast", reason="utilsforecast is not installed")
    from doralib.evaluation.forecast import score_forecasts

    one = Origin(series([1, 3, 2, 5, 4, 4]), 4, 2)
    two = Origin(series([10, 20, 10, 20, 10, 40], "b"), 4, 2)
    # forecast, 10 %, 50 %, 90 %
    found = [np.array([[5.0, 3, 5, 6], [5, 3, 5, 6]]), np.array([[10.0, 8, 10, 12], [20, 18, 20, 22]])]
    scores = score_forecasts([one, two], found, (0.1, 0.5, 0.9), [1, 1], seed=0)
    # in the past a step is 2, 1, 3 long, and 10, 10, 10
    scale = [2.0, 10.0]
    assert scores["mase"].value == pytest.approx((1 / scale[0] + 10 / scale[1]) / 2)
    assert scores["naive_mase"].value == pytest.approx((1 / scale[0] + (10 + 20) / 2 / scale[1]) / 2)
    assert scores["smape"].value == pytest.approx((200 * 1 / 9 + (0 + 200 * 20 / 60) / 2) / 2)
    loss = lambda y, q, level: max(level * (y - q), (level - 1) * (y - q))
    pinball = [
        np.mean([loss(y, q, level) for y, row in zip(origin.future, each, strict=True)
                 for q, level in zip(row[1:], (0.1, 0.5, 0.9), strict=True)]) / size
        for origin, each, size in zip((one, two), found, scale, strict=True)
    ]  # fmt: skip
    assert scores["pinball"].value == pytest.approx(np.mean(pinball))
    assert scores["mase"].low <= scores["mase"].value <= scores["mase"].high


def test_seasons_and_pasts_without_a_score(caplog):
    pytest.importorskip("utilsforecast", reason="utilsforecast is not installed")
    from doralib.evaluation.forecast import score_forecasts

    seasonal = Origin(series([1, 2, 3, 2, 3, 4, 4, 4]), 6, 2)
    perfect = Origin(series([1, 2, 1, 2, 1, 2, 1, 2]), 6, 2)
    flat = Origin(series([5, 5, 5, 5, 5, 5, 6, 5], "flat"), 6, 2)
    point = [np.array([[4.0], [4.0]]), np.array([[1.0], [3.0]]), np.array([[5.0], [5.0]])]
    scores = score_forecasts([seasonal, perfect, flat], point, (), [3, 2, 1], seed=0)
    assert "pinball" not in scores
    # a season of 3 moves by 1; what repeats its season of 2 exactly is compared with the step before, of 1
    assert scores["mase"].value == pytest.approx((0 + 0.5) / 2)
    assert scores["naive_mase"].value == pytest.approx(((2 + 1) / 2 + (1 + 0) / 2) / 2)
    assert "1 of 3 pasts are constant, and have no score: flat from 2020-07-01" in caplog.text
    with pytest.raises(DoraError, match="no series can be scored"):
        score_forecasts([flat], point[2:], (), [1], seed=0)


def task_file(folder, text="series: {horizon: 4}\norigins: 3\nstep: 2\n"):
    lines = [
        f"{name},{i},{np.sin(i / 2) * (k + 1):.4f}\n" for k, name in enumerate("abc") for i in range(24 - 12 * (k == 2))
    ]
    (folder / "t.csv").write_text("series,time,value\n" + "".join(lines))
    (folder / "task.yaml").write_text(f"kind: forecast\ndata: t.csv\n{text}")
    return str(folder / "task.yaml")


def test_rolling_origins_end_at_the_end(tmp_path, models, caplog):
    pytest.importorskip("utilsforecast", reason="utilsforecast is not installed")
    (task,) = load_tasks([task_file(tmp_path)])
    examples = read_examples(task)
    assert [(each.origin.series.name, each.origin.at) for each in examples] == [
        (name, at) for name in "abc"[:3] for at in ((16, 18, 20) if name != "c" else (4, 6, 8))
    ]
    assert len(read_examples(task, 2)) == 2
    found = evaluate(models["TimesFm2_5"], None, [task])["task"]
    assert (found.kind, found.n, list(found.metrics)) == ("forecast", 9, ["mase", "smape", "pinball", "naive_mase"])
    with pytest.raises(UsageError, match=r"series.horizon is 4, and the model forecasts at most 3 values"):
        evaluate(make("TimesFm2_5", horizon_length=3, output_quantile_len=3), None, [task])
    far = task.model_copy(update={"origins": 5})
    assert {each.origin.series.name for each in read_examples(far)} == {"a", "b"}
    assert "1 left out, shorter than 16" in caplog.text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("series: {season: 4}\n", "series.horizon: how many values ahead are scored"),
        ("series: {horizon: 4, stride: 2}\n", "series.stride is for training"),
        ("series: {horizon: 4}\nprompt: x\n", "is given no prompt"),
        ("series: {horizon: 4}\norigin: 2\n", "did you mean 'origins'"),
    ],
)
def test_tasks_that_cannot_be(tmp_path, text, said):
    with pytest.raises(UsageError, match=said):
        load_tasks([task_file(tmp_path, text)])


def test_a_task_asks_a_model_of_its_kind(tmp_path, models, tiny_llama):
    (task,) = load_tasks([task_file(tmp_path)])
    assert isinstance(task, ForecastTask)
    model, tokenizer = tiny_llama
    with pytest.raises(UsageError, match="asks a model of series, not a LlamaForCausalLM"):
        evaluate(model, tokenizer, [task])


def test_the_t_distribution_of_many_degrees_is_normal():
    from doralib.data.forecaster import _quantile

    student = torch.distributions.StudentT(torch.tensor([1e6]), torch.tensor([2.0]), torch.tensor([3.0]))
    assert _quantile(student, 0.9).item() == pytest.approx(stats.norm.ppf(0.9, 2, 3), rel=1e-4)
