"""Models and adapters by their names on the hub, in every verb; pushed there; with a stand-in for the hub."""

import json

import pytest
import yaml
from adapted import move
from conftest import make_llama, make_tokenizer
from hub_stand_in import TOKEN, StandIn, serve
from huggingface_hub import ModelCard, constants, hf_api

import doralib
from doralib.hub import add_revision, is_hub_name, split_revision


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base, and two adapters of it that differ, as they would lie on the hub."""
    root = tmp_path_factory.mktemp("repos")
    make_llama().save_pretrained(root / "tiny")
    make_tokenizer().save_pretrained(root / "tiny")
    for name, size in (("first", 0.2), ("second", 0.9)):
        model = make_llama()
        model.name_or_path = "us/tiny"
        doralib.adapt(model, doralib.DoraConfig(r=2, target_modules=("q_proj", "down_proj")))
        doralib.save_adapter(move(model, size), root / name)
        (root / name / "checkpoints").mkdir()
        (root / name / "checkpoints" / "optimizer.pt").write_bytes(b"0" * 100)
    return root


@pytest.fixture
def hub(folders, tmp_path, monkeypatch):
    """The stand-in, which has the three; nothing of it is in the cache."""
    stand_in = StandIn()
    stand_in.put("us/tiny", folders / "tiny")
    stand_in.put("us/tuned", folders / "first")
    stand_in.put("us/tuned", folders / "second", "v2")
    with serve(stand_in) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        # transformers asks for templates by functions that were bound to the hub's address at import
        monkeypatch.setattr(hf_api.api, "endpoint", address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.chdir(tmp_path)
        yield stand_in


def ok(found):
    status, out, err = found
    assert status == 0, out + err
    return out


def test_a_name_of_the_hub_is_no_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert is_hub_name("us/tuned")
    assert is_hub_name("us/tuned@refs/pr/1")
    assert not is_hub_name("runs/tuned"), "a slip in a folder that is there"
    assert not is_hub_name("a/b/c")
    assert not is_hub_name("us/tuned.safetensors")
    assert not is_hub_name("./us/tuned")
    assert split_revision("us/tuned@v2") == ("us/tuned", "v2")
    assert add_revision("us/tuned", "v2") == "us/tuned@v2"
    with pytest.raises(doralib.UsageError, match="is on the disk"):
        add_revision("runs", "v2")


@pytest.mark.long
def test_verbs_that_look_at_an_adapter_take_its_name(hub, run, folders):
    inspect = lambda *given: [line for line in ok(run("inspect", *given)).splitlines() if "_proj" in line]
    here = inspect(folders / "second")
    assert inspect("us/tuned", "--revision", "v2") == here
    assert inspect("us/tuned@v2") == here
    assert inspect("us/tuned") != here
    # of a repository with checkpoints the adapter alone is fetched
    assert not [line for line in hub.asked if "optimizer" in line]
    assert "q_proj" in ok(run("targets", "us/tiny"))
    ok(run("convert", "us/tuned", "--to", "mlx", "--out", "mlx"))
    ok(run("analyze", "us/tiny", "us/tuned", "--out", "analysis"))


def test_a_merge_takes_base_and_adapter_from_the_hub(hub, run, folders, tmp_path):
    ok(run("merge", "us/tuned", "--revision", "v2", "--out", "named"))
    ok(run("merge", folders / "second", "--base", folders / "tiny", "--out", "here"))
    named, here = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("named", "here"))
    assert named == here


@pytest.mark.long
def test_a_model_answers_by_its_name(hub, run, folders):
    ask = ("--prompt", "hello", "--max-new-tokens", "4")
    here = ok(run("generate", folders / "second", "--base", folders / "tiny", *ask))
    assert ok(run("generate", "us/tuned", "--revision", "v2", *ask)) == here
    assert ok(run("generate", "us/tiny", "--adapter", "a=us/tuned@v2", *ask)) == here
    ok(run("generate", "us/tiny", *ask))


def test_what_the_hub_lacks_is_told(hub, run):
    for given in (("inspect", "us/none"), ("generate", "us/none", "-p", "x"), ("inspect", "us/tuned@v9")):
        status, _, err = run(*given)
        assert status == 2
        assert "the hub gave nothing by that name" in err


def test_offline_takes_what_the_cache_has_and_asks_nothing(hub, run, monkeypatch):
    ok(run("inspect", "us/tuned"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = len(hub.asked)
    ok(run("inspect", "us/tuned"))
    status, _, err = run("inspect", "us/tuned@v2")
    assert status == 2
    assert "HF_HUB_OFFLINE is set" in err
    status, _, err = run("push", "nothing", "--to", "us/new")
    assert status == 2
    assert len(hub.asked) == asked


def make_run(folder, adapter, base="us/tiny"):
    """A run's folder with an adapter in it, and all that is nobody's business."""
    folder.mkdir()
    for file in adapter.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": base}))
    make_tokenizer().save_pretrained(folder)
    config = {"model": {"path": base}, "data": {"train": "secret.jsonl", "style": "completion"}, "out": "x"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "summary.json").write_text(json.dumps({"base_model": base, "method": "dora", "status": "finished"}))
    form = {"style": "completion", "prompt": "Review: {text}", "fields": ["text"]}
    (folder / "doralib_prompt.json").write_text(json.dumps(form))
    samples = [{"prompt": "Review: private", "expected": "x", "given": {"text": "private"}}]
    (folder / "samples.json").write_text(json.dumps(samples))
    (folder / "README.md").write_text("the card of this machine")
    for name in ("data.json", "metrics.jsonl", "environment.json", "report.html", "results.json"):
        (folder / name).write_text("{}")
    return folder


def test_a_pushed_run_is_the_adapter_and_its_card(hub, run, folders, tmp_path):
    folder = make_run(tmp_path / "run", folders / "first")
    said = ok(run("push", folder, "--to", "us/new", "--message", "as trained"))
    assert "us/new" in said
    files = hub.repos["us/new"]["main"]
    assert {"adapter_config.json", "adapter_model.safetensors", "doralib_prompt.json", "README.md"} <= files.keys()
    assert {"tokenizer.json", "tokenizer_config.json"} <= files.keys()
    assert not {"data.json", "samples.json", "metrics.jsonl", "results.json", "environment.json"} & files.keys()
    assert not {"report.html", "config.yaml", "summary.json"} & files.keys()
    card = files["README.md"].decode()
    assert ModelCard(card).data.base_model == "us/tiny"
    assert "doralib generate us/new --prompt TEXT" in card
    assert "private" not in card
    assert hub.commits == ["as trained"]
    ok(run("push", folder, "--to", "us/new", "--revision", "next"))
    assert hub.repos["us/new"].keys() == {"main", "next"}
    # and it is asked as it was in training
    text = ok(run("generate", "us/new", "--field", "text=hello", "--max-new-tokens", "3"))
    assert text == ok(run("generate", folder, "--prompt", "hello", "--max-new-tokens", "3"))


def test_a_push_names_no_folder_of_this_machine(hub, run, folders, tmp_path):
    folder = make_run(tmp_path / "run", folders / "first", str(folders / "tiny"))
    status, _, err = run("push", folder, "--to", "us/new")
    assert status == 2
    assert "--base OWNER/NAME" in err
    assert "us/new" not in hub.repos
    ok(run("push", folder, "--to", "us/new", "--base", "us/tiny@main"))
    files = hub.repos["us/new"]["main"]
    settings = json.loads(files["adapter_config.json"])
    assert settings["base_model_name_or_path"] == "us/tiny"
    assert settings["revision"] == "main"
    assert not [name for name, content in files.items() if str(folders).encode() in content]
    ok(run("inspect", "us/new"))


@pytest.mark.parametrize("what", ["nobody", "nothing"])
def test_a_push_that_cannot_be_says_why(hub, run, folders, tmp_path, monkeypatch, what):
    folder = make_run(tmp_path / "run", folders / "first")
    if what == "nobody":
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        told = "hf auth login"
    else:
        (folder / "adapter_config.json").unlink()
        (folder / "adapter_model.safetensors").unlink()
        told = "no adapter and no model"
    status, _, err = run("push", folder, "--to", "us/new")
    assert status == 2
    assert told in err
