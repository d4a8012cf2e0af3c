"""Normalization by the batch itself: one derivative rule for every mode of differentiation."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxbn._activation import ACTIVATIONS, PIECEWISE_LINEAR, Activation
from jaxbn._devices import Devices
from jaxbn._shifted import centered, mean_and_covariance, shifted_moments, where_valid
from jaxbn._sums import expand, expand_tangent, written_out

# For the policies of `jax.checkpoint`: with these kept, a layer is made again without reductions.
INPUT, MEAN, RSTD = CHECKPOINT_NAMES = ("jaxbn.input", "jaxbn.mean", "jaxbn.rstd")
OUTPUT = "jaxbn.output"


class Form(NamedTuple):
    """What is known when the function is traced."""

    axis: int
    devices: Devices
    epsilon: float
    dtype: np.dtype[Any]  # of the output
    activation: Activation | None


class Operands(NamedTuple):
    """What is differentiated, but for the mask; where something is None it is left out."""

    x: jax.Array
    mask: jax.Array | None
    scale: jax.Array
    bias: jax.Array
    residual: jax.Array | None
    constants: tuple[jax.Array, ...]  # of the activation


class Batch(NamedTuple):
    """What the batch is normalized by, in the dtype of `scale`: `mean = shift + delta`."""

    shift: jax.Array
    delta: jax.Array
    var: jax.Array
    rstd: jax.Array
    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count


def traced_once(function: Callable[..., Any], form: Form) -> Callable[..., Any]:
    """`function(…, form=form)`, which all layers that are alike share, in its trace and compiled.

    Not so for activations of the user's own, which may be another function object in every call.
    """
    if form.activation is None or form.activation in ACTIVATIONS.values():
        return functools.partial(_jitted(function), form=form)
    return functools.partial(function, form=form)


@functools.cache
def _jitted(function: Callable[..., Any]) -> Callable[..., Any]:
    return jax.jit(function, static_argnames="form")


def recomputed(function: Callable[..., Any], **static: Any) -> Callable[..., Any]:
    """`function` that keeps its arguments for the backward pass, and what is named `OUTPUT`."""
    policy = jax.checkpoint_policies.save_only_these_names(OUTPUT)
    return jax.checkpoint(functools.partial(function, **static), prevent_cse=False, policy=policy)


def affine(
    x: jax.Array,
    mask: jax.Array | None,
    shift: jax.Array,
    factor: jax.Array,
    offset: jax.Array,
    residual: jax.Array | None,
    *,
    axis: int,
) -> jax.Array:
    """`(x − shift)·factor + offset + residual`, in the dtype of the vectors.

    The shift comes off first: `x·factor + (offset − shift·factor)` cancels where the mean is large.
    """
    shift, factor, offset = written_out(x, shift, factor, offset)
    factor, offset = (expand(v, jax.typeof(x), axis) for v in (factor, offset))
    z = centered(x, mask, axis, shift) * factor + offset
    return z if residual is None else z + where_valid(mask, residual).astype(z.dtype)


def activated(
    z: jax.Array, mask: jax.Array | None, constants: tuple[jax.Array, ...], form: Form
) -> jax.Array:
    """The output `activation(z)`, rounded to its dtype; zero where masked."""
    y = z if form.activation is None else form.activation(z, *constants)
    return where_valid(mask, y).astype(form.dtype)


def _normalized(operands: Operands, batch: Batch, form: Form) -> jax.Array:
    """`x̂·scale + bias + residual`, to which the activation is applied."""
    x, mask, scale, bias, residual, _ = operands
    factor = scale * batch.rstd
    offset = bias - batch.delta * factor
    return affine(x, mask, batch.shift, factor, offset, residual, axis=form.axis)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def normalize_by_batch(operands: Operands, form: Form) -> tuple[jax.Array, Batch]:
    """Batch norm in training mode."""
    x, mask, scale, _, _, constants = operands
    shift, delta, var, count = shifted_moments(x, mask, form.axis, form.devices, scale.dtype)
    batch = Batch(shift, delta, var, jax.lax.rsqrt(var + form.epsilon), count)
    return activated(_normalized(operands, batch, form), mask, constants, form), batch


@normalize_by_batch.defjvp
def _normalize_by_batch_jvp(
    form: Form, primals: tuple[Operands], tangents: tuple[Operands]
) -> tuple[tuple[jax.Array, Batch], tuple[jax.Array, Batch]]:
    (operands,), (directions,) = primals, tangents
    _, batch = normalize_by_batch(operands, form)
    primals_out, tangents_out = recomputed(_with_tangent, form=form)(
        operands, directions._replace(mask=None), batch
    )
    return primals_out, tangents_out


def _with_tangent(
    operands: Operands, directions: Operands, batch: Batch, *, form: Form
) -> tuple[tuple[jax.Array, Batch], tuple[jax.Array, Batch]]:
    """The output from what is named, so that `jax.checkpoint` can make it again without reductions.

    With a residual, the sign of the output tells the derivative of some activations, and the next
    layer keeps it anyway: it is kept here instead of the residual.
    """
    operands = operands._replace(x=checkpoint_name(operands.x, INPUT))
    batch = batch._replace(
        shift=checkpoint_name(batch.shift, MEAN),
        delta=checkpoint_name(batch.delta, MEAN),
        rstd=checkpoint_name(batch.rstd, RSTD),
    )
    y = activated(_normalized(operands, batch, form), operands.mask, operands.constants, form)
    if operands.residual is not None and form.activation in PIECEWISE_LINEAR:
        y = checkpoint_name(y, OUTPUT)
    return (y, batch), _tangent(directions, operands, batch, y, form=form)


def _tangent(
    directions: Operands, operands: Operands, batch: Batch, y: jax.Array, *, form: Form
) -> tuple[jax.Array, Batch]:
    """Tangents of the output and of the batch, linear in those of the operands.

        dz = k·dx + p + d·q + dresidual    with  q = (dscale − k·E[dx·x̂])·r
                                                 p = dbias − k·E[dx] − delta·u·q

    for `k = scale·rstd`, `d = (x − shift)·u`, `E[dx·x̂] = (E[dx·d] − delta·u·E[dx])·r` and
    `rstd = u·r` with u a power of two. The vectors p and q are collected first so that, transposed,
    bias and E[dx] share the one reduction of the cotangent, and scale and E[dx·x̂] the other. Both
    are of d, not of x̂: differences of nearby floats and powers of two are exact, and x̂ would be
    off by its rounding, alike wherever x is alike. No power of rstd above the first appears but in
    drstd, where it is what the result is made of: the others would underflow.
    """
    x, mask, scale, *_ = operands
    shift, delta, _, rstd, count = batch
    unit = _power_of_two(rstd)
    rest, delta = rstd / unit, delta * unit
    shift, unit, k = written_out(x, shift, unit, scale * rstd)
    dx = where_valid(mask, directions.x).astype(rstd.dtype)
    deviation = centered(x, mask, form.axis, shift) * expand(unit, jax.typeof(x), form.axis)
    mean_dx, covariance = mean_and_covariance(dx, deviation, delta, count, form.axis, form.devices)
    mean_dx_normalized = covariance * rest
    q = (directions.scale - k * mean_dx_normalized) * rest
    p = directions.bias - k * mean_dx - delta * q
    k = expand(k, jax.typeof(x), form.axis)
    p, q = (expand_tangent(v, jax.typeof(x), form.axis) for v in (p, q))
    terms = (p + deviation * q, k * dx)
    if form.activation in PIECEWISE_LINEAR and directions.residual is None:
        dy = _term_by_term(form.activation, terms, operands, batch, form)
    else:
        dz = terms[0] + terms[1]
        if directions.residual is not None:
            dz = dz + directions.residual.astype(dz.dtype)
        dy = _through_activation(dz, directions, operands, batch, y, form)
    dy = where_valid(mask, dy)
    dvar, drstd = 2 * mean_dx_normalized / rstd, -(rstd * mean_dx_normalized) * rstd
    return dy, Batch(jnp.zeros_like(shift), mean_dx, dvar, drstd, jnp.zeros_like(count))


def _power_of_two(x: jax.Array) -> jax.Array:
    """The power of two next to `x`, a constant to differentiation: no result depends on it."""
    return jax.lax.stop_gradient(jax.lax.reduce_precision(x, jnp.finfo(x.dtype).nexp, 0))


def _term_by_term(
    activation: Activation,
    terms: tuple[jax.Array, jax.Array],
    operands: Operands,
    batch: Batch,
    form: Form,
) -> jax.Array:
    """The tangent of the output where the slope of the activation is a matter of sign.

    Each term has a slope of its own, that no compiler can know to be the other's. Of one slope the
    transpose is a masked cotangent that XLA:GPU likes to write out: three transfers more.
    """

    def sloped(term: jax.Array, batch: Batch) -> jax.Array:
        z = _normalized(operands, batch, form).astype(form.dtype).astype(term.dtype)
        tangent: jax.Array = jax.jvp(activation, (z,), (term,))[1]
        return tangent

    apart = batch._replace(rstd=jax.lax.optimization_barrier(batch.rstd))
    return (sloped(terms[0], batch) + sloped(terms[1], apart)).astype(form.dtype)


def _through_activation(
    dz: jax.Array,
    directions: Operands,
    operands: Operands,
    batch: Batch,
    y: jax.Array,
    form: Form,
) -> jax.Array:
    if form.activation is None:
        return dz.astype(form.dtype)
    if form.activation in PIECEWISE_LINEAR:
        # Selecting in the dtype of the output: in float32 the compiler writes the result out.
        z, dz = y, dz.astype(form.dtype)
    else:
        z = _normalized(operands, batch, form)
    primals, tangents = (z, *operands.constants), (dz, *directions.constants)
    dy: jax.Array = jax.jvp(form.activation, primals, tangents)[1]
    return dy.astype(form.dtype)
