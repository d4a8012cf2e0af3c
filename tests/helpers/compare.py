"""Comparing results: whole trees against trees."""

import jax
import numpy as np


def assert_close(actual, expected, limit=1e-5):
    """Every leaf of two trees agrees within `limit`, relative or absolute; 0 asks for equality."""
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, limit, limit), actual, expected)
