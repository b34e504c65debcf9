"""`doralib features`: grids of pictures and vectors of frames, against what the models themselves give."""

import numpy as np
import pytest
import torch

from doralib.data.features import read_features
from doralib.data.frames import find_media, open_image, read_frames
from doralib.errors import DoraError, UsageError

h5py = pytest.importorskip("h5py", reason="h5py is not installed")
av = pytest.importorskip("av", reason="PyAV is not installed")
Image = pytest.importorskip("PIL.Image", reason="pillow is not installed")

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three kinds of vision models: convolutions, patches, and pictures beside text."""
    import transformers as t

    root = tmp_path_factory.mktemp("vision")
    torch.manual_seed(0)
    config = t.MobileNetV2Config(image_size=64, depth_multiplier=0.25, tf_padding=False)
    t.MobileNetV2Model(config).save_pretrained(root / "mobilenet")
    patches = t.ViTConfig(**SIZES, image_size=32, patch_size=8)
    t.ViTModel(patches).save_pretrained(root / "vit")
    text = {**SIZES, "vocab_size": 50, "max_position_embeddings": 16}
    both = t.CLIPConfig(text_config=text, vision_config={**SIZES, "image_size": 32, "patch_size": 8}, projection_dim=12)
    t.CLIPModel(both).save_pretrained(root / "clip")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    for name, side in (("mobilenet", 64), ("vit", 32), ("clip", 32)):
        size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        CLIPImageProcessorPil(**size).save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Two pictures, and a video of 20 frames at 10 a second that grows lighter."""
    folder = tmp_path_factory.mktemp("media")
    rng = np.random.default_rng(0)
    (folder / "more").mkdir()
    for i, name in enumerate(("one.png", "more/two.jpg")):
        Image.fromarray(rng.integers(0, 256, (48 + i, 64, 3), dtype=np.uint8)).save(folder / name)
    with av.open(str(folder / "clip.mp4"), "w") as opened:
        stream = opened.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 12 * i, dtype=np.uint8), format="rgb24")
            for packet in stream.encode(frame):
                opened.mux(packet)
        for packet in stream.encode(None):
            opened.mux(packet)
    return folder


def own_output(models, name, images):
    from transformers import AutoImageProcessor, AutoModel

    model = AutoModel.from_pretrained(models / name).eval()
    processor = AutoImageProcessor.from_pretrained(models / name, backend="pil")
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        if name == "clip":
            return model.vision_model(pixels).last_hidden_state, model.get_image_features(pixels).pooler_output
        output = model(pixels)
        return output.last_hidden_state, output.pooler_output


@pytest.mark.parametrize(("name", "places", "width"), [("mobilenet", 4, 320), ("vit", 16, 16), ("clip", 16, 16)])
def test_grids_and_vectors_are_the_models_own(run, models, media, tmp_path, name, places, width):
    status, out, err = run("features", media, "--model", models / name, "--fps", "2", "--out", tmp_path)
    assert status == 0, out + err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["clip.npz", "one.h5", "two.h5"]
    states, _ = own_output(models, name, [open_image(media / "one.png")])
    grid = read_features(tmp_path / "one.h5")
    if states.dim() == 4:
        width = states.shape[1]
        states = states.flatten(2).transpose(1, 2)
    assert grid.shape == (places, width)
    torch.testing.assert_close(grid, states[0, -places:], rtol=1e-5, atol=1e-6)
    frames = list(read_frames(media / "clip.mp4", 2))
    _, vectors = own_output(models, name, frames)
    found = read_features(tmp_path / "clip.npz")
    torch.testing.assert_close(found, vectors.flatten(1), rtol=1e-4, atol=1e-5)
    assert "3 files of features" in out
    assert f"model.visual.features: {width} (one.h5 has {places} of them)" in out
    assert f"model.visual.features: {found.shape[1]} (clip.npz has 4 of them)" in out
    with h5py.File(tmp_path / "one.h5") as opened:
        assert list(opened["one"]) == ["features"]


def test_frames_are_taken_by_their_times(media):
    shades = lambda fps: [np.asarray(frame).mean() for frame in read_frames(media / "clip.mp4", fps)]
    assert len(shades(1)) == 2
    assert shades(1) == pytest.approx([0, 120], abs=4)
    assert shades(2) == pytest.approx([0, 60, 120, 180], abs=4)
    assert len(shades(10)) == len(shades(100)) == 20


def test_a_picture_is_upright_and_on_white(tmp_path):
    picture = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    picture.putpixel((0, 0), (0, 0, 255, 255))
    picture.save(tmp_path / "a.png")
    seen = open_image(tmp_path / "a.png")
    assert seen.mode == "RGB"
    assert seen.getpixel((3, 1)) == (255, 255, 255)
    assert seen.getpixel((0, 0)) == (0, 0, 255)
    turned = Image.new("RGB", (4, 2))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "b.jpg", exif=exif)
    assert open_image(tmp_path / "b.jpg").size == (2, 4)


def test_what_is_there_stays_and_what_is_broken_is_told(run, models, media, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    Image.new("RGB", (9, 9)).save(folder / "good.png")
    (folder / "bad.png").write_bytes(b"no picture")
    (folder / "cut.mp4").write_bytes((media / "clip.mp4").read_bytes()[:900])
    (folder / "notes.txt").write_text("not looked at")
    status, told, err = run("features", folder, "--model", models / "vit", "--out", out)
    assert status == 1
    assert "2 of 3 files have no features" in err
    assert "bad.png: cannot identify image" in err
    assert "cut.mp4 cannot be read as a video" in err
    before = (out / "good.h5").stat().st_mtime_ns
    (folder / "bad.png").unlink()
    (folder / "cut.mp4").unlink()
    status, told, _ = run("features", folder, "--model", models / "vit", "--out", out)
    assert status == 0
    assert "0 files of features" in told
    assert "1 were there already" in told
    assert (out / "good.h5").stat().st_mtime_ns == before
    run("features", folder, "--model", models / "vit", "--out", out, "--overwrite")
    assert (out / "good.h5").stat().st_mtime_ns > before


def test_mistakes(run, models, media, tmp_path, tiny_llama_folder):
    mistakes = {
        (tmp_path / "absent", models / "vit"): "there is no file or folder",
        (tmp_path, models / "vit"): "no picture and no video in",
        (media / "one.png", tiny_llama_folder): "cannot be loaded as a vision model",
        (media / "one.png", tmp_path / "absent"): "cannot be loaded as a vision model",
    }
    for (source, model), told in mistakes.items():
        status, _, err = run("features", source, "--model", model, "--out", tmp_path / "out")
        assert (status, told in err) == (2, True), err
    assert not (tmp_path / "out").exists()
    (tmp_path / "a").mkdir()
    for name in ("one.png", "a/one.jpg"):
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    with pytest.raises(UsageError, match="would have features of one name"):
        find_media([tmp_path])
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(DoraError, match="cannot identify image"):
        open_image(tmp_path / "x.png")
