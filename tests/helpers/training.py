"""The trainer with a small model, its result kept as arrays by name, and small images.

python -m helpers.training RESULT.npz DTYPE [FLAGS…]
"""

import interruption

if __name__ == "__main__":
    interruption.leave_at_once()

import contextlib
import functools
import sys

import data
import jax
import numpy as np
import train_cnn
from checkpoints import hush
from command_line import parse
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from model import CNN, ResNet20
from rich.console import Console

# By far fewer operations to compile than the ones of the examples.
MODELS = {
    "cnn": functools.partial(CNN, features=(8, 16)),
    "resnet20": functools.partial(ResNet20, features=(4, 8)),
}
# With these flags the colours of `save_colours` are learned.
ON_COLOURS = ("--epochs", "2", "--batch-size", "32", "--momentum", "0.5")


def keep(setattr_, dtype=None):
    """Changes `train_cnn` by `setattr_`: it trains a small model in `dtype`, or that of the flags.

    The final variables and the metrics of each epoch come into the dict that is returned.
    """
    result = {}
    run = train_cnn.run

    def small(classes, norm, of_flags):
        return MODELS["cnn"](classes, norm, np.dtype(dtype or of_flags))

    def keeping(*arguments):
        trained = run(*arguments)
        named = {**trained.variables, "metrics": [epoch[:5] for epoch in trained.history]}
        for path, leaf in jax.tree_util.tree_leaves_with_path(named):
            result[jax.tree_util.keystr(path, simple=True, separator="/")] = np.asarray(leaf)
        return trained

    setattr_(train_cnn, "MODELS", {"cnn": small, "resnet20": small})
    setattr_(train_cnn, "run", keeping)
    return result


@contextlib.contextmanager
def spread_over(devices):
    """Makes this many devices the mesh; gives the sharding of a batch."""
    types, chosen = (AxisType.Auto,), jax.devices()[:devices]
    mesh = jax.make_mesh((devices,), ("batch",), axis_types=types, devices=chosen)
    with jax.set_mesh(mesh):
        yield NamedSharding(mesh, PartitionSpec("batch"))


def trained_on(devices, monkeypatch, *flags, dtype=None):
    """The result of a trainer in this process, on this many of its devices."""
    flags = [str(flag) for flag in flags]
    with monkeypatch.context() as patched, spread_over(devices) as sharding:
        result = keep(patched.setattr, dtype)
        train_cnn.run(parse("", flags), flags, sharding, Console(quiet=True))
    return result


# A program that Ctrl-C ends, also where it is ignored since the tests run in the background.
ATTENTIVE = (
    sys.executable,
    "-c",
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])",
)


def command(path, dtype, *flags):
    """The command of a trainer in a process of its own, which keeps its result in this file.

    As a module: a script would find the modules beside it before those of the examples.
    """
    return [*ATTENTIVE, "-m", __name__, path, dtype, *flags]


def images(train, test=20, size=6):
    """Images of three classes, told apart by a diagonal."""
    y = np.arange(train + test) % 3
    x = np.random.RandomState(0).normal(size=(train + test, size, size, 1))
    x += y[:, None, None, None] * np.eye(size)[..., None]
    x, y = x.astype(np.float32), y.astype(np.int32)
    parts = x[:train], y[:train], x[train:], y[train:]
    return data.Dataset(*parts, data.Pixels(0, 1, x.min(), x.max()), ("0", "1", "2"))


def arrays(dataset):
    """What an .npz of these images holds."""
    return dict(zip(data.KEYS, dataset, strict=False))


def save_images(folder):
    """100 and 30 images in a file of the folder: its path."""
    path = folder / "images.npz"
    np.savez(path, **arrays(images(100, 30)))
    return path


def save_colours(folder, dtype=float):
    """Red, green and blue images with noise in a file of the folder: its path.

    As bytes, the pixels are from 40 to 120; as floats these are divided by 255.
    """
    y = np.arange(96) % 3
    x = np.random.RandomState(0).uniform(size=(96, 9, 8, 3)) * 0.5
    x += 0.5 * np.eye(3)[y][:, None, None]
    pixels = np.round(40 + 80 * x)
    x = pixels.astype(dtype) if np.dtype(dtype).kind == "u" else (pixels / 255).astype(dtype)
    path = folder / "colours.npz"
    np.savez(path, x_train=x, y_train=y, x_test=x, y_test=y)
    return path


if __name__ == "__main__":
    hush()
    path, dtype, *flags = sys.argv[1:]
    jax.config.update("jax_enable_x64", dtype == "float64")
    result = keep(setattr, dtype)
    status = train_cnn.main(flags)
    np.savez(path, **result)
    sys.exit(status)
