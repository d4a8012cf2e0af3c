"""The trainer with a model that compiles fast, and its result kept as arrays by name.

python tests/training.py RESULT.npz DTYPE [FLAGS…]    # train_cnn.py, and the result in a file
"""

import sys

import jax
import numpy as np
import train_cnn
from model import CNN


def keep(setattr_, dtype="float32"):
    """Changes `train_cnn` by `setattr_`: it trains a small model in `dtype`.

    The final variables and the metrics of each epoch come into the dict that is returned.
    """
    result = {}
    train = train_cnn.train

    def small(*arguments, **fields):
        return CNN(*arguments, **fields | {"dtype": np.dtype(dtype), "features": (8, 8)})

    def keeping(*arguments):
        variables, history = train(*arguments)
        named = {**variables, "metrics": [epoch[:4] for epoch in history]}
        for path, leaf in jax.tree_util.tree_leaves_with_path(named):
            result[jax.tree_util.keystr(path, simple=True, separator="/")] = np.asarray(leaf)
        return variables, history

    setattr_(train_cnn, "CNN", small)
    setattr_(train_cnn, "train", keeping)
    return result


if __name__ == "__main__":
    path, dtype, *flags = sys.argv[1:]
    jax.config.update("jax_enable_x64", dtype == "float64")
    result = keep(setattr, dtype)
    status = train_cnn.main(flags)
    np.savez(path, **result)
    sys.exit(status)
