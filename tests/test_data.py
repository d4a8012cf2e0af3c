"""Data sets in IDX files: read as they are, and refused with a reason where they are broken."""

import gzip
import re
import struct

import data
import idx
import jax
import numpy as np
import pytest
import train_cnn

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
    with pytest.raises(idx.FormatError, match="cannot be unpacked"):
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


def test_the_trainer_takes_a_folder(folder, capsys):
    flags = ["--dataset", "mnist", "--data-dir", str(folder), "--epochs", "2"]
    with jax.numpy_dtype_promotion("standard"):  # for optax
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
