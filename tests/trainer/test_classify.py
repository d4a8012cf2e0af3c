"""Image files are classified by a folded network, and by what is exported of it."""

import json
import re
import subprocess
import sys

import classify
import figures
import jax
import numpy as np
import pytest
import train_cnn
from checkpoints import Checkpoints
from data import Pixels
from helpers import training
from model import Norm, folded
from PIL import Image

pytestmark = [pytest.mark.trained, pytest.mark.usefixtures("standard_promotion")]


@pytest.fixture(
    scope="module", params=["cnn jaxbn u1", "resnet20 ghost f8", "cnn flax f8", "cnn none u1"]
)
def trained(request, tmp_path_factory):
    """The folder of a trained network, image files of every class, and their pixels."""
    folder = tmp_path_factory.mktemp("trained")
    model, norm, dtype = request.param.split()
    data = training.save_colours(folder, dtype)
    flags = ["--data", str(data), *training.ON_COLOURS, "--model", model, "--norm", norm]
    with pytest.MonkeyPatch.context() as patched, jax.numpy_dtype_promotion("standard"):
        patched.setattr(train_cnn, "MODELS", training.MODELS)
        patched.setattr(classify, "MODELS", training.MODELS)
        patched.setattr(figures, "draw_run", lambda *_: None)
        assert train_cnn.main([*flags, "--output", str(folder / "run")]) == 0
        pixels = np.load(data)["x_train"][:6]
        pixels = pixels if dtype == "u1" else np.round(pixels * 255).astype(np.uint8)
        paths = [str(folder / f"{i}.png") for i in range(6)]
        for path, image in zip(paths, pixels, strict=True):
            Image.fromarray(image).save(path)
        yield folder / "run", paths, pixels


def probabilities(folder, images=6):
    """What the network itself says of the images as they are in the data, batch norms in place."""
    saved = Checkpoints(folder / "checkpoints", write=False).load()
    flags = saved.run["config"]["flags"]
    model = training.MODELS[flags["model"]](3, Norm(flags["norm"]))
    x = np.load(saved.run["config"]["paths"]["data"])["x_train"].astype(float)
    x = ((x[:images] - x.mean()) / x.std()).astype(np.float32)
    return np.asarray(jax.nn.softmax(model.apply(saved.state["variables"], x, train=False)))


def test_files_are_classified_by_the_network_that_was_trained(trained, capsys):
    folder, paths, pixels = trained
    expected = probabilities(folder)
    network = classify.load(folder)
    assert (network.shape, network.names) == ((9, 8, 3), ["0", "1", "2"])
    np.testing.assert_allclose(network.classify(pixels.astype(np.float32)), expected, atol=2e-5)
    assert classify.main([str(folder), *paths]) == 0
    lines = capsys.readouterr().out.splitlines()
    for path, line, row in zip(paths, lines, expected, strict=True):
        told = re.findall(r"(\d) ([\d.]+)%", line.removeprefix(f"{path}: "))
        assert [int(name) for name, _ in told] == np.argsort(-row).tolist()
        for name, percent in told:
            assert float(percent) == pytest.approx(100 * row[int(name)], abs=0.06)


def test_no_batch_norm_is_left(trained):
    folder, _, _ = trained
    saved = Checkpoints(folder / "checkpoints", write=False).load()
    flags = saved.run["config"]["flags"]
    network = training.MODELS[flags["model"]](3, Norm(flags["norm"]))
    model, variables = folded(network, saved.state["variables"])
    assert model.norm.kind == "none"
    assert variables.keys() == {"params"}
    blocks = [block for name, block in variables["params"].items() if name != "Dense_0"]
    assert all(block.keys() == {"Conv_0"} for block in blocks)
    assert len(blocks) == (13 if flags["model"] == "resnet20" else 2)


ALONE = """
import json, pathlib, sys
import jax, numpy as np
called = jax.export.deserialize(pathlib.Path(sys.argv[1]).read_bytes()).call
answers = [np.asarray(called(pixels.astype(np.float32))).tolist()
           for pixels in (np.load(sys.argv[2]), np.load(sys.argv[2])[:1])]
foreign = {"jaxbn", "flax", "model", "optax", "orbax"} & set(sys.modules)
print(json.dumps([answers, sorted(foreign)]))
"""


def test_what_is_exported_runs_alone(trained, tmp_path, capsys):
    folder, _, pixels = trained
    path = tmp_path / "network.jaxexport"
    assert classify.main([str(folder), "--export", str(path)]) == 0
    said = f"{path}: float32 [N, 9, 8, 3] from 0 to 255 to probabilities [N, 3]"
    assert said in capsys.readouterr().out.splitlines()
    np.save(tmp_path / "pixels.npy", pixels)
    command = [sys.executable, "-I", "-c", ALONE, path, tmp_path / "pixels.npy"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (answers, single), foreign = json.loads(output)
    assert foreign == []
    expected = np.asarray(classify.load(folder).classify(pixels.astype(np.float32)))
    np.testing.assert_allclose(answers, expected, atol=1e-6)
    np.testing.assert_allclose(single, expected[:1], atol=1e-6)
    platforms = jax.export.deserialize(bytearray(path.read_bytes())).platforms
    assert set(platforms) == {"cpu", "cuda", "tpu"}


def test_only_an_export_is_written_over(tmp_path):
    def double(x):
        return 2 * x

    one, content = jax.ShapeDtypeStruct((1,), np.float32), b"a photograph"
    exported = bytes(jax.export.export(jax.jit(double))(one).serialize())
    path = tmp_path / "network.jaxexport"
    for _ in range(2):
        classify.write(path, exported)
        assert path.read_bytes() == exported
    path.write_bytes(content)
    with pytest.raises(classify.ExportError, match="exists already and is no exported function"):
        classify.write(path, exported)
    assert path.read_bytes() == content
    assert [*tmp_path.iterdir()] == [path]


GREY = np.arange(72, dtype=np.uint8).reshape(9, 8)
COLOURS = np.stack([GREY, GREY + 100, 200 - GREY], -1)


def pixels_of(path, shape=(9, 8, 1)):
    return classify.read_image(path, shape).pixels


def test_files_of_every_kind(tmp_path):
    for shape in ((9, 8, 1), (9, 8, 3)):
        Image.fromarray(COLOURS).save(tmp_path / "colours.png")
        pixels = pixels_of(tmp_path / "colours.png", shape)
        assert pixels.shape == shape
        assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels, COLOURS)
    Image.fromarray(GREY).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(pixels_of(tmp_path / "grey.png")[..., 0], GREY)
    Image.fromarray(GREY.repeat(2, 0).repeat(2, 1)).save(tmp_path / "large.png")
    resized = pixels_of(tmp_path / "large.png")[..., 0]
    assert np.abs(resized[1:-1, 1:-1] - GREY[1:-1, 1:-1]).max() <= 1
    opaque = np.dstack([COLOURS, np.full_like(GREY, 255)])
    Image.fromarray(opaque).save(tmp_path / "opaque.png")
    np.testing.assert_array_equal(pixels_of(tmp_path / "opaque.png", (9, 8, 3)), COLOURS)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_files_are_turned_as_they_say(orientation, tmp_path):
    """EXIF's orientation says where the first row and column of the file belong."""
    turned = {
        1: GREY,
        2: GREY[:, ::-1],
        3: GREY[::-1, ::-1],
        4: GREY[::-1],
        5: GREY.T,
        6: np.rot90(GREY),
        7: np.rot90(GREY.T, 2),
        8: np.rot90(GREY, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(turned[orientation].copy()).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(pixels_of(tmp_path / "turned.png")[..., 0], GREY)


def test_palettes(tmp_path):
    """One without a transparent pixel is as good as any."""
    image = Image.fromarray(np.minimum(COLOURS, 50)).quantize(8)
    image.save(tmp_path / "palette.png")
    image.save(tmp_path / "transparent.png", transparency=image.getpixel((0, 0)))
    image.save(tmp_path / "opaque.png", transparency=200)
    expected = np.asarray(image.convert("RGB"))
    for name in ("palette", "opaque"):
        np.testing.assert_array_equal(pixels_of(tmp_path / f"{name}.png", (9, 8, 3)), expected)
    with pytest.raises(classify.ImageError, match="has transparent pixels"):
        pixels_of(tmp_path / "transparent.png", (9, 8, 3))


def test_files_that_are_refused(tmp_path):
    Image.fromarray(np.dstack([GREY] * 4)).save(tmp_path / "transparent.png")
    Image.fromarray(GREY).save(tmp_path / "key.png", transparency=3)
    Image.fromarray(GREY.astype(np.uint16) * 256).save(tmp_path / "deep.png")
    Image.fromarray(np.dstack([GREY] * 4), "CMYK").save(tmp_path / "print.tiff")
    (tmp_path / "text.png").write_text("no image")
    Image.fromarray(GREY).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:50])
    for name, reason in {
        "transparent.png": "has transparent pixels; give it a background",
        "key.png": "has transparent pixels; give it a background",
        "deep.png": "must be gray or RGB with eight bits per channel; got I;16",
        "print.tiff": "must be gray or RGB with eight bits per channel; got CMYK",
        "text.png": "not an image that can be read",
        "cut.png": "not an image that can be read",
        "none.png": "no such file",
        "": "not an image that can be read",
    }.items():
        with pytest.raises(classify.ImageError, match=re.escape(reason)) as raised:
            classify.read_image(tmp_path / name, (9, 8, 1))
        assert str(tmp_path / name) in str(raised.value)
        assert "\n" not in str(raised.value)
    with pytest.raises(classify.ImageError, match="takes 2 channels, which no image file has"):
        classify.read_image(tmp_path / "whole.png", (9, 8, 2))


def test_a_bad_file_does_not_hide_the_others(tmp_path, capsys):
    def darkness(images):
        white = images.mean((1, 2, 3)) / 255
        return jax.numpy.stack([abs(1 - white), white], -1)

    paths = [tmp_path / name for name in ("dark.png", "bad.png", "moving.gif", "none.png")]
    frames = [Image.fromarray(np.full_like(GREY, value)) for value in (255, 0, 10)]
    frames[1].save(paths[0])
    paths[1].write_text("no image")
    frames[0].save(paths[2], save_all=True, append_images=frames[1:])
    network = classify.Network(darkness, (9, 8, 1), ["dark", "light"], Pixels(0, 1, 0, 255))
    assert classify.answer(network, [*paths, paths[0]]) == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        f"{paths[0]}: dark 100.0%, light 0.0%",
        f"{paths[2]} (frame 1 of 3): light 100.0%, dark 0.0%",
        f"{paths[0]}: dark 100.0%, light 0.0%",
    ]
    bad, missing = captured.err.splitlines()
    assert bad.startswith(f"classify.py: error: {paths[1]}: not an image that can be read")
    assert missing == f"classify.py: error: {paths[3]}: no such file"


@pytest.mark.parametrize(
    ("arguments", "status", "reason"),
    [
        (["nowhere", "image.png"], 1, "nowhere: no checkpoint in it"),
        (["nowhere"], 2, "give image files, --export FILE, or both"),
    ],
)
def test_bad_arguments(arguments, status, reason, capsys):
    try:
        given = classify.main(arguments)
    except SystemExit as exit_:
        given = exit_.code
    assert given == status
    assert reason in capsys.readouterr().err
