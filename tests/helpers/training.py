"""The trainer with a small model, its result kept as arrays by name, and small images.

python tests/helpers/training.py RESULT.npz DTYPE [FLAGS…]
"""

import contextlib
import sys

import data
import jax
import numpy as np
import train_cnn
from checkpoints import hush
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from model import CNN


def keep(setattr_, dtype="float32"):
    """Changes `train_cnn` by `setattr_`: it trains a small model in `dtype`.

    The final variables and the metrics of each epoch come into the dict that is returned.
    """
    result = {}
    run = train_cnn.run

    def small(classes, norm, _):
        return CNN(classes, norm, np.dtype(dtype), (8, 16))

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


if __name__ == "__main__":
    hush()
    path, dtype, *flags = sys.argv[1:]
    jax.config.update("jax_enable_x64", dtype == "float64")
    result = keep(setattr, dtype)
    status = train_cnn.main(flags)
    np.savez(path, **result)
    sys.exit(status)
