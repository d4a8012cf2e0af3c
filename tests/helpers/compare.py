"""Comparing results: whole trees against trees."""

import jax
import numpy as np


def assert_close(actual, expected, limit=1e-5):
    """Every leaf of two trees agrees, relatively and absolutely, within `limit`; 0 asks for bits."""
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, limit, limit), actual, expected)
