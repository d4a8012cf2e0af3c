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
from helpers import training
from model import Norm, folded
from PIL import Image

pytestmark = [pytest.mark.trained, pytest.mark.usefixtures("standard_promotion")]


@pytest.fixture(scope="module", params=["cnn jaxbn", "resnet20 ghost", "cnn flax", "cnn none"])
def trained(request, tmp_path_factory):
    """The folder of a trained network, image files, and their pixels."""
    folder = tmp_path_factory.mktemp("trained")
    data = training.save_colours(folder)
    model, norm = request.param.split()
    flags = ["--data", str(data), *training.ON_COLOURS, "--model", model, "--norm", norm]
    with pytest.MonkeyPatch.context() as patched, jax.numpy_dtype_promotion("standard"):
        patched.setattr(train_cnn, "MODELS", training.MODELS)
        patched.setattr(classify, "MODELS", training.MODELS)
        patched.setattr(figures, "draw_run", lambda *_: None)
        assert train_cnn.main([*flags, "--output", str(folder / "run")]) == 0
        pixels = np.round(np.load(data)["x_train"][:6] * 255).astype(np.uint8)
        paths = [str(folder / f"{i}.png") for i in range(6)]
        for path, image in zip(paths, pixels, strict=True):
            Image.fromarray(image).save(path)
        yield folder / "run", paths, pixels


def probabilities(folder, pixels):
    """What the network itself says of the pixels, its batch norms in place."""
    saved = Checkpoints(folder / "checkpoints", write=False).load()
    config = saved.run["config"]
    norm = Norm(config["flags"]["norm"])
    model = training.MODELS[config["flags"]["model"]](3, norm)
    scale = config["pixels"]
    x = pixels / 255 * (scale["high"] - scale["low"]) + scale["low"]
    x = ((x - scale["mean"]) / scale["std"]).astype(np.float32)
    return np.asarray(jax.nn.softmax(model.apply(saved.state["variables"], x, train=False)))


def test_files_are_classified_by_the_network_that_was_trained(trained, capsys):
    folder, paths, pixels = trained
    expected = probabilities(folder, pixels)
    function, shape, names = classify.load(folder)
    assert (shape, names) == ((9, 8, 3), ["0", "1", "2"])
    np.testing.assert_allclose(function(pixels.astype(np.float32)), expected, atol=2e-5)
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


def test_what_is_exported_runs_alone(trained, tmp_path):
    folder, _, pixels = trained
    path = tmp_path / "network.jaxexport"
    assert classify.main([str(folder), "--export", str(path)]) == 0
    np.save(tmp_path / "pixels.npy", pixels)
    command = [sys.executable, "-I", "-c", ALONE, path, tmp_path / "pixels.npy"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (answers, single), foreign = json.loads(output)
    assert foreign == []
    expected = np.asarray(classify.load(folder)[0](pixels.astype(np.float32)))
    np.testing.assert_allclose(answers, expected, atol=1e-6)
    np.testing.assert_allclose(single, expected[:1], atol=1e-6)
    platforms = jax.export.deserialize(bytearray(path.read_bytes())).platforms
    assert set(platforms) == {"cpu", "cuda", "tpu"}


def test_files_of_every_kind(tmp_path):
    grey = np.arange(72, dtype=np.uint8).reshape(9, 8)
    colours = np.stack([grey, grey + 100, 200 - grey], -1)
    for shape in ((9, 8, 1), (9, 8, 3)):
        Image.fromarray(colours).save(tmp_path / "colours.png")
        pixels = classify.read_image(tmp_path / "colours.png", shape)
        assert pixels.shape == shape
        assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels, colours)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(
        classify.read_image(tmp_path / "grey.png", (9, 8, 1))[..., 0], grey
    )
    Image.fromarray(grey.repeat(2, 0).repeat(2, 1)).save(tmp_path / "large.png")
    resized = classify.read_image(tmp_path / "large.png", (9, 8, 1))[..., 0]
    assert np.abs(resized[1:-1, 1:-1] - grey[1:-1, 1:-1]).max() <= 1
    opaque = np.dstack([colours, np.full_like(grey, 255)])
    Image.fromarray(opaque).save(tmp_path / "opaque.png")
    np.testing.assert_array_equal(classify.read_image(tmp_path / "opaque.png", (9, 8, 3)), colours)


def test_files_that_are_refused(tmp_path):
    grey = np.arange(72, dtype=np.uint8).reshape(9, 8)
    Image.fromarray(np.dstack([grey] * 4)).save(tmp_path / "transparent.png")
    Image.fromarray(grey.astype(np.uint16) * 256).save(tmp_path / "deep.png")
    (tmp_path / "text.png").write_text("no image")
    Image.fromarray(grey).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:50])
    for name, reason in {
        "transparent": "is transparent in places; give it a background",
        "deep": "must have eight bits to a channel; is I;16",
        "text": "not an image that can be read",
        "cut": "not an image that can be read",
        "none": "no such file",
    }.items():
        with pytest.raises(classify.ImageError, match=re.escape(reason)) as raised:
            classify.read_image(tmp_path / f"{name}.png", (9, 8, 1))
        assert str(tmp_path / name) in str(raised.value)
    with pytest.raises(classify.ImageError, match="takes 2 channels, which no image file has"):
        classify.read_image(tmp_path / "whole.png", (9, 8, 2))


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
