"""Entries of torch's layers, and what the tests of `jaxbn.torch` compare."""

import jax
import numpy as np
import pytest
from helpers.numpy_reference import sample


def vectors(size, dtype=np.float32, seed=0):
    """The entries of a batch norm layer that was trained."""
    values = sample((4, size), seed)
    values[3] = np.abs(values[3])
    entries = ("weight", "bias", "running_mean", "running_var")
    state_dict = {k: v.astype(dtype) for k, v in zip(entries, values, strict=True)}
    return state_dict | {"num_batches_tracked": np.array(7)}


def prefixed(prefix, state_dict):
    return {prefix + key: value for key, value in state_dict.items()}


def shapes(tree):
    return jax.tree.map(lambda v: (v.shape, v.dtype.name), tree)


def assert_same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert shapes(actual) == shapes(expected)


def torch_or_skip():
    """Torch, its random numbers begun anew, so that a test's numbers are the same in every run."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    torch.manual_seed(0)
    return torch
