"""Moments of a set of samples, computed without cancellation and merged exactly."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbn._checks import check_implemented, checked_input, statistics_dtype
from jaxbn._sums import expand, mean_over


class Moments(NamedTuple):
    """Mean, biased variance and number of the samples of one set, per channel.

    Moments are a monoid: `merge_moments` gives those of the union of disjoint sets exactly, so
    shards, micro-batches and whole data sets are all handled by the one operation.

    Attributes:
      mean: `E[x]`, shape `[C]`, float32 or float64.
      var: `E[(x − mean)²]`, the variance divided by `count`, shape `[C]`, dtype of `mean`.
      count: samples per channel, shape `[]`, dtype of `mean`: in float32 a sum of counts is rounded
        above 2²⁴, and is as good a weight as before.

    Example:
      >>> import jax.numpy as jnp, jaxbn
      >>> jaxbn.batch_moments(jnp.array([[1.0, 10.0], [3.0, 10.0]]))
      Moments(mean=Array([ 2., 10.], dtype=float32), var=Array([1., 0.], dtype=float32), \
count=Array(2., dtype=float32))
    """

    mean: jax.Array
    var: jax.Array
    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count, as documented


def batch_moments(
    x: ArrayLike, *, axis: int = -1, axis_name: Any = None, mask: ArrayLike | None = None
) -> Moments:
    """Mean and biased variance of `x` over every axis but the channel axis.

        mean = E[x]        var = E[(x − mean)²]

    Computed from `d = x − K` as `mean = K + E[d]`, `var = E[d²] − E[d]²`, with `K` the mean itself
    as first rounded: nothing cancels, however large the mean is beside the standard deviation.

    Args:
      x: samples, `[..., C]` or any layout with the channels at `axis`; float16, bfloat16, float32
        or float64.
      axis: the channel axis of `x`.
      axis_name: reserved for moments across devices.
      mask: reserved for samples that do not count.

    Returns:
      `Moments` of shape `[C]`, in float32, or float64 where `x` is. An empty batch gives zeros.
      They are differentiable with respect to `x`, in forward and reverse mode.

    Raises:
      TypeError: `x` is not real floating point, or `axis` is not an int.
      ValueError: `axis` is out of range or `x` has no channels.
      NotImplementedError: `axis_name` or `mask` is given.

    Example:
      >>> import jax.numpy as jnp, jaxbn
      >>> x = 1e6 + jnp.array([[-1.0], [0.0], [1.0], [2.0]])
      >>> moments = jaxbn.batch_moments(x)
      >>> float(moments.mean[0]), float(moments.var[0])
      (1000000.5, 1.25)

    References:
      Chan, Golub and LeVeque, "Algorithms for computing the sample variance", The American
      Statistician 37 (1983).
    """
    check_implemented(axis_name=axis_name, mask=mask)
    x, axis = checked_input(x, axis)
    shift, delta, var = shifted_moments(x.astype(statistics_dtype(x.dtype)), axis)
    count = x.size // x.shape[axis]
    return Moments(shift + delta, var, jnp.asarray(count, var.dtype))


def merge_moments(first: Moments, *others: Moments) -> Moments:
    """Moments of the union of disjoint sets, from the moments of each.

    For two sets a and b, with `n = n_a + n_b`, `w = n_b / n` and `δ = mean_b − mean_a`:

        mean = mean_a + w·δ        var = (1 − w)·var_a + w·var_b + w·(1 − w)·δ²

    Args:
      first: moments with `mean` and `var` of shape `[C]`.
      *others: any number more, of the same shape and dtype. A set with `count` 0 changes nothing.

    Returns:
      `Moments` of all samples together, in the dtype of the arguments.

    Raises:
      ValueError: the shapes of the means and variances differ.

    Example:
      >>> import jax.numpy as jnp, jaxbn
      >>> x = jnp.array([[1.0], [2.0], [6.0]])
      >>> merged = jaxbn.merge_moments(jaxbn.batch_moments(x[:1]), jaxbn.batch_moments(x[1:]))
      >>> float(merged.mean[0]), round(float(merged.var[0]), 5), float(merged.count)
      (3.0, 4.66667, 3.0)

    References:
      Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
      variances", COMPSTAT 1982.
    """
    shapes = {v.shape for moments in (first, *others) for v in (moments.mean, moments.var)}
    if len(shapes) > 1:
        raise ValueError(
            "Merged moments must describe the same channels; got vectors of the shapes "
            f"{', '.join(map(str, sorted(shapes)))}."
        )
    return functools.reduce(_merge_two, others, first)


def _merge_two(a: Moments, b: Moments) -> Moments:
    count = a.count + b.count
    weight = b.count / jnp.where(count > 0, count, 1)
    delta = b.mean - a.mean
    between = weight * (1 - weight) * jnp.square(delta)
    var = (1 - weight) * a.var + weight * b.var + between
    return Moments(a.mean + weight * delta, var, count)


def shifted_moments(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`(shift, delta, var)` with `mean = shift + delta`, the two kept apart, in the dtype of `x`.

    Their sum would round `delta` away where the mean is large, and with it the exactness of
    `x − shift − delta`. The shift is a constant to differentiation: mean and variance do not
    depend on it, so their derivatives of every order are right without it.
    """
    shift = jax.lax.stop_gradient(mean_over(x, axis))
    deviation = x - expand(shift, x.shape, axis)
    delta = mean_over(deviation, axis)
    var = mean_over(jnp.square(deviation), axis) - jnp.square(delta)
    # Rounding may leave a constant channel just below zero; the derivative is that of `var`.
    return shift, delta, var + jax.lax.stop_gradient(jnp.maximum(-var, 0))
