"""Nothing relies on rank promotion, which some projects forbid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.numpy_reference import sample

import jaxbn

X = sample((8, 6, 6, 4), 0, dtype=np.float32)
LARGE = sample((16, 24, 24, 8), 0, dtype=np.float32)
ONES = jnp.ones(4)


def trained(x, **options):
    return jaxbn.batch_normalize(x, jnp.ones(x.shape[-1]), activation="relu", **options)


def on_devices(x):
    masked = jax.vmap(lambda x: trained(x, axis_name="i", mask=x[..., :1] > 0), axis_name="i")
    return jax.vmap(lambda x: trained(x, axis_name="i"), axis_name="i")(x), masked(x)


def merged(x):
    masked = jaxbn.batch_moments(x, mask=x[..., :1] > 0)
    return jaxbn.merge_moments(masked, masked), jaxbn.merge_moments(*[jaxbn.batch_moments(x)] * 2)


def folded(x):
    kernel = x[0, :3, :3, :]  # three by three positions, four channels
    kernel = jnp.stack([kernel, kernel], axis=2)
    behind = jaxbn.fold_into_conv(kernel, None, ONES, ONES)
    grouped = jaxbn.fold_into_conv(kernel, ONES, ONES, ONES, ONES, ONES, feature_group_count=2)
    kernel = jnp.swapaxes(kernel, -1, -2)
    before = jaxbn.fold_into_conv(kernel, None, ONES, ONES, before=True, padding="VALID")
    dense = jaxbn.fold_into_dense(kernel[0, 0], None, ONES, ONES, before=True)
    return behind, grouped, before, dense


CASES = {
    "training": (trained, X),
    "large batch": (trained, LARGE),
    "large batch, bfloat16": (trained, LARGE.astype(jnp.bfloat16)),
    "mask": (lambda x: trained(x, mask=x[..., :1] > 0, residual=x), X),
    "large batch, mask": (lambda x: trained(x, mask=x[..., :1] > 0), LARGE),
    "ghost batches": (lambda x: trained(x, virtual_batch_size=2), X),
    "ghost batches, mask": (lambda x: trained(x, virtual_batch_size=2, mask=x[..., :1] > 0), X),
    "devices": (on_devices, X),
    "inference": (lambda x: jaxbn.normalize(x, ONES, ONES, mask=x[..., :1] > 0, residual=x), X),
    "merged moments": (merged, X),
    "folding": (folded, X),
}


@pytest.mark.parametrize("case", CASES)
def test_no_rank_is_promoted(case):
    function, x = CASES[case]

    def loss(x):
        return sum(leaf.astype(jnp.float32).sum() for leaf in jax.tree.leaves(function(x)))

    expected = jax.jit(jax.value_and_grad(loss))(x)
    jax.clear_caches()
    with jax.numpy_rank_promotion("raise"):
        actual = jax.jit(jax.value_and_grad(loss))(x)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
