"""Data sets in IDX files: read as they are, and refused with a reason where they are broken."""

import gzip
import io
import pathlib
import re
import struct
import zipfile

import classify
import data
import idx
import numpy as np
import pytest
import train_cnn
from helpers import training
from PIL import Image

pytestmark = [pytest.mark.trained, pytest.mark.usefixtures("standard_promotion")]

NAMES = dict(zip(data.KEYS, data.IDX_FILES, strict=True))


def encoded(array):
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture(params=["", ".gz"])
def folder(request, tmp_path):
    """A small data set in IDX files, gzipped or not."""
    random = np.random.default_rng(0)
    for part, size in (("train", 40), ("test", 20)):
        labels = np.arange(size) % 4
        images = random.integers(0, 40, (size, 6, 5)) + 50 * labels[:, None, None]
        for key, array in ((f"x_{part}", images), (f"y_{part}", labels)):
            write(tmp_path, key, encoded(array), request.param)
    return tmp_path


def write(folder, key, content, suffix=""):
    packed = gzip.compress(content) if suffix else content
    (folder / f"{NAMES[key]}{suffix}").write_bytes(packed)


def content_of(path):
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def path_of(folder, key):
    return next(folder.glob(f"{NAMES[key]}*"))


def test_files_are_read_gzipped_or_not(folder):
    dataset = data.load_idx("mnist", folder)
    assert dataset.x_train.shape == (40, 6, 5, 1)
    assert dataset.x_test.shape == (20, 6, 5, 1)
    np.testing.assert_array_equal(dataset.y_test, np.arange(20) % 4)
    raw = idx.read(path_of(folder, "x_train")).astype(np.float64)
    expected = ((raw - raw.mean()) / raw.std())[..., None]
    np.testing.assert_allclose(dataset.x_train, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", data.PACKAGES)
def test_a_missing_file_names_the_command_that_installs_it(name, tmp_path):
    with pytest.raises(data.DataError, match=re.escape(data.PACKAGES[name].command)) as caught:
        data.load_idx(name, tmp_path)
    assert str(tmp_path / NAMES["x_train"]) in str(caught.value)
    assert "\n" not in str(caught.value)


BROKEN = {
    "empty": (lambda c: b"", "does not begin as an IDX file"),
    "a page of HTML": (lambda c: b"<html>404</html>", "does not begin as an IDX file"),
    "another type": (lambda c: c[:2] + b"\x0d" + c[3:], "does not begin as an IDX file"),
    "cut in the header": (lambda c: c[:9], "ends within its header"),
    "cut in the values": (lambda c: c[:-7], "must hold 1200 bytes for the shape (40, 6, 5); got"),
    "more than it says": (lambda c: c + b"\0", "got 1201"),
    "labels for images": (lambda c: encoded(np.arange(40)), "must hold numbers of shape"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_refused(kind, folder):
    path = path_of(folder, "x_train")
    change, message = BROKEN[kind]
    write(folder, "x_train", change(content_of(path)), path.suffix)
    with pytest.raises(data.DataError, match=re.escape(message)):
        data.load_idx("mnist", folder)


def test_a_gzipped_file_cut_off_is_refused(tmp_path):
    path = tmp_path / "values.gz"
    path.write_bytes(gzip.compress(encoded(np.arange(200)))[:-20])
    with pytest.raises(idx.FormatError, match="cannot be decompressed"):
        idx.read(path)


def test_labels_of_other_images_are_refused(folder):
    suffix = path_of(folder, "y_train").suffix
    write(folder, "y_train", encoded(np.arange(39) % 4), suffix)
    with pytest.raises(data.DataError, match="y_train must hold an integer"):
        data.load_idx("mnist", folder)


def test_any_flipped_byte_is_read_or_refused(tmp_path):
    """Never another error, and never values that are not there."""
    random = np.random.default_rng(1)
    values = random.integers(0, 256, (7, 3))
    for suffix in ("", ".gz"):
        whole = encoded(values) if not suffix else gzip.compress(encoded(values))
        path = tmp_path / f"values{suffix}"
        for position in range(len(whole)):
            flipped = bytearray(whole)
            flipped[position] ^= 1 << int(random.integers(8))
            path.write_bytes(flipped)
            try:
                read = idx.read(path)
            except idx.FormatError:
                continue
            assert read.size == values.size


def test_the_trainer_takes_a_folder(folder, monkeypatch, capsys):
    training.keep(monkeypatch.setattr)
    flags = ["--dataset", "mnist", "--data-dir", str(folder), "--epochs", "2"]
    assert train_cnn.main([*flags, "--batch-size", "10"]) == 0
    assert "40 training and 20 test images of (6, 5, 1)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data-dir", "."], "--data-dir is for --dataset fashion-mnist or mnist"),
        (["--dataset", "digits", "--data-dir", "."], "--data-dir is for --dataset"),
        (["--dataset", "mnist", "--data", "a.npz"], "--data and --dataset exclude each other"),
        (["--dataset", "cifar"], "invalid choice: 'cifar'"),
    ],
)
def test_flags_that_do_not_go_together(flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        train_cnn.main(flags)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_the_trainer_says_what_is_missing(tmp_path, capsys):
    assert train_cnn.main(["--dataset", "mnist", "--data-dir", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("train_cnn.py: error: ")
    assert error.count("\n") == 1
    assert data.PACKAGES["mnist"].command in error


X = np.arange(6 * 4 * 4).reshape(6, 4, 4)
Y = np.array([0, 1, 2, 0, 1, 2])
GOOD = {"x_train": X, "y_train": Y, "x_test": X[:2], "y_test": Y[:2]}
BAD = {
    "no images": ({"x_train": X[:0], "y_train": Y[:0]}, "x_train must hold numbers"),
    "one image": (
        {"x_test": X[:1], "y_test": Y[:1]},
        "at least two images; got int64 of shape (1,",
    ),
    "labels in words": ({"y_train": Y.astype(str)}, "y_train must hold an integer from 0 to 9999"),
    "enormous pixels": ({"x_train": X * 1e300}, "and not all the same; got inf in x_train"),
    "flat images": ({"x_train": X.reshape(6, 16)}, "x_train must hold numbers of shape [N, H, W]"),
    "words": ({"x_test": np.full((2, 4, 4), "x")}, "x_test must hold numbers"),
    "too few labels": ({"y_train": Y[:5]}, "y_train must hold an integer"),
    "float labels": ({"y_train": Y / 2}, "y_train must hold an integer"),
    "negative labels": (
        {"y_test": -Y[:2] - 1},
        "y_test must hold an integer from 0 to 9999 for each of 2 images; got -2, -1",
    ),
    "labels without images": ({"y_test": Y[:0]}, "y_test must hold an integer"),
    "enormous labels": (
        {"y_train": Y.astype(np.uint64) + 2**40},
        "integer from 0 to 9999 for each of 6 images; got 1099511627776, 1099511627777",
    ),
    "unknown labels": ({"y_test": Y[:2] + 9}, "y_test has labels that y_train lacks: 9, 10"),
    "labels between": (
        {"y_train": 7 * (Y > 0), "y_test": Y[:2]},
        "y_test has labels that y_train lacks: 1",
    ),
    "one label": (
        {"y_train": 0 * Y + 3, "y_test": 0 * Y[:2] + 3},
        "y_train must have at least two classes; got only 3",
    ),
    "channels first": (
        {"x_train": np.zeros((6, 3, 32, 32)), "x_test": np.zeros((2, 3, 32, 32))},
        "must be [H, W, C]; got [3, 32, 32], as if channels came first: save x.transpose(0, 2, 3,",
    ),
    "many channels first": (
        {"x_train": np.zeros((6, 12, 32, 24)), "x_test": np.zeros((2, 12, 32, 24))},
        "must be [H, W, C]; got [12, 32, 24], as if channels came first",
    ),
    "other size": ({"x_test": X[:2, :3]}, "training images have shape (4, 4), test images (3, 4)"),
    "blank images": ({"x_train": 0 * X + 7}, "not all the same; got 7 everywhere in x_train"),
    "NaN pixels": (
        {"x_test": np.full((2, 4, 4), np.nan)},
        "finite, below 1e18 and not all the same; got nan in x_test",
    ),
    "labels as objects": (
        {"y_train": Y.astype(object)},
        "y_train must be an array of numbers; got Python objects, which are not read, since a pi",
    ),
    "names as objects": (
        {"class_names": np.array(["cat", "dog", "fox"], object)},
        "class_names must be a row of strings, such as np.array(names, dtype=str); got Python obj",
    ),
    "names as bytes": ({"class_names": [b"cat", b"dog", b"fox"]}, "got |S3 of shape (3,)"),
    "numbers as names": ({"class_names": np.arange(3)}, "got int64 of shape (3,)"),
    "one name": ({"class_names": np.array("cat")}, "got <U3 of shape ()"),
    "too few names": (
        {"class_names": ["cat", "dog"]},
        "y_train must have all labels from 0 to 1, as there are 2 class names; got 0, 1, 2",
    ),
    "too many names": (
        {"class_names": ["cat", "dog", "fox", "owl"]},
        "y_train must have all labels from 0 to 3, as there are 4 class names; got 0, 1, 2",
    ),
    "names of other labels": (
        {"y_train": Y + 1, "y_test": Y[:2] + 1, "class_names": ["cat", "dog", "fox"]},
        "y_train must have all labels from 0 to 2, as there are 3 class names; got 1, 2, 3",
    ),
    "a name twice": (
        {"class_names": ["cat", "dog", "cat"]},
        "class_names must be distinct, printable and not empty; got 'cat' twice",
    ),
    "an empty name": ({"class_names": ["cat", " ", "fox"]}, "not empty; got ' '"),
    "a name of two lines": ({"class_names": ["cat", "d\nog", "fox"]}, "not empty; got 'd\\nog'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data(case, tmp_path):
    changes, message = BAD[case]
    path = tmp_path / "images.npz"
    np.savez(path, **GOOD | changes)
    with pytest.raises(data.DataError, match=re.escape(message)):
        data.load(path)


def test_classes_are_the_labels_that_there_are(tmp_path):
    np.savez(tmp_path / "images.npz", **GOOD | {"y_train": 7 * (Y > 0), "y_test": 7 * Y[:2]})
    dataset = data.load(tmp_path / "images.npz")
    assert dataset.names == ("0", "7")
    assert dataset.y_train.tolist() == [0, 1, 1, 0, 1, 1]
    assert dataset.y_test.tolist() == [0, 1]


def test_class_names(tmp_path):
    np.savez(tmp_path / "images.npz", **GOOD | {"class_names": ["cat", "großer Hund", "[fox]"]})
    named = data.load(tmp_path / "images.npz")
    assert named.names == ("cat", "großer Hund", "[fox]")
    np.savez(tmp_path / "images.npz", **GOOD)
    assert data.load(tmp_path / "images.npz").digest() == named.digest()


def test_a_folder_of_images(tmp_path, monkeypatch):
    """The snippet of the documentation writes a file that the trainer takes."""
    page = pathlib.Path(__file__).parents[2] / "docs" / "trainer.md"
    (snippet,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    folder = tmp_path / "my_images"
    for name, color in (("cat", 60), ("dog", 120), ("fox", 180)):
        (folder / name).mkdir(parents=True)
        (folder / name / ".DS_Store").write_bytes(b"no image")
        for i in range(10):
            pixels = np.random.default_rng(i).integers(0, 60, (48, 64, 3)) + color
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})
    dataset = data.load(tmp_path / "images.npz")
    assert dataset.names == ("cat", "dog", "fox")
    assert dataset.x_train.shape == (24, 32, 32, 3)
    assert dataset.x_test.shape == (6, 32, 32, 3)
    assert np.bincount(dataset.y_train).tolist() == [8, 8, 8]
    assert (dataset.pixels.black, dataset.pixels.white) == (0, 255)
    image = classify.read_image(folder / "fox" / "0.png", (32, 32, 3)).pixels
    with np.load("images.npz") as archive:
        np.testing.assert_array_equal(archive["x_test"][archive["y_test"] == 2][0], image)


@pytest.mark.parametrize(
    ("dtype", "low", "high", "span"),
    [
        *((dtype, 40, 120, (0, 255)) for dtype in ("u1", "i8", "f4", "f8")),
        ("u1", 0, 1, (0, 255)),
        ("f2", 0.25, 0.5, (0, 1)),
        ("f8", -0.25, 0.5, (-1, 1)),
        ("u2", 5, 4000, None),
        ("f4", -3, 2, None),
        ("i4", -1, 255, None),
    ],
)
def test_black_and_white_by_custom(dtype, low, high, span, tmp_path):
    images = np.linspace(low, high, X.size).reshape(X.shape).astype(dtype)
    path = tmp_path / "images.npz"
    np.savez(path, **GOOD | {"x_train": images, "x_test": images[:2]})
    pixels = data.load(path).pixels
    assert (pixels.black, pixels.white) == (span or (low, high))
    assert pixels.guessed == (span is None)
    assert ("--range" in str(pixels)) == (span is None)
    pixels = data.load(path, (0.5, 8.0)).pixels
    assert (pixels.black, pixels.white, pixels.guessed) == (0.5, 8, False)


def test_channels_last(tmp_path):
    """Few channels, or images that are higher than they are wide, cannot be channels first."""
    for shape in ((3, 4, 4), (32, 8, 20), (1, 1, 64)):
        images = np.arange(6.0 * np.prod(shape)).reshape(6, *shape)
        np.savez(tmp_path / "images.npz", **GOOD | {"x_train": images, "x_test": images[:2]})
        assert data.load(tmp_path / "images.npz").x_train.shape == (6, *shape)


def test_broken_archives(tmp_path):
    path = tmp_path / "images.npz"
    whole = data.DIGITS.read_bytes()
    flipped = bytearray(whole)
    flipped[20_000:20_010] = b"0123456789"
    one_array = io.BytesIO()
    np.save(one_array, X)
    for content in (b"", b"text", whole[:1000], whole[:-100], flipped, one_array.getvalue()):
        path.write_bytes(content)
        with pytest.raises(data.DataError, match=r"not an \.npz archive that can be read"):
            data.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        for key in data.KEYS:
            archive.writestr(f"{key}.npy", "no array")
    with pytest.raises(data.DataError, match=r"not an \.npz archive that can be read"):
        data.load(path)
    np.savez(path, x_train=X)
    with pytest.raises(data.DataError, match="y_train is not a file in the archive"):
        data.load(path)
    with pytest.raises(data.DataError, match=r"not an \.npz archive that can be read"):
        data.load(tmp_path)


def test_the_digits_are_credited_and_whole():
    with np.load(data.DIGITS) as archive:
        assert "Alpaydin" in str(archive["credit"])
    digits = data.load()
    assert digits.x_train.shape == (1437, 8, 8, 1)
    assert digits.x_test.shape == (360, 8, 8, 1)
    assert digits.classes == 10
    assert abs(digits.x_train.mean()) < 1e-5
    assert abs(digits.x_train.std() - 1) < 1e-5
    everything = np.concatenate([digits.x_train, digits.x_test]).reshape(1797, -1)
    assert len(np.unique(everything, axis=0)) == 1797  # no image is in both parts
    assert pathlib.Path(data.DIGITS).stat().st_size < 50_000
