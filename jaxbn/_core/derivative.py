"""Normalization by the batch itself: one derivative rule for every mode of differentiation."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxbn._activation import PIECEWISE_LINEAR, Activation
from jaxbn._core.compilers import apart, expand_in_pieces, sums_in_pieces, written_out
from jaxbn._core.forward import Form, Operands, activated, applied, coefficients
from jaxbn._core.moments import (
    Shifted,
    centered,
    expand,
    means,
    shifted_moments,
    where_valid,
)

# For the policies of `jax.checkpoint`: with these kept, a layer is made again without reductions.
INPUT, MEAN, RSTD = CHECKPOINT_NAMES = ("jaxbn.input", "jaxbn.mean", "jaxbn.rstd")
OUTPUT = "jaxbn.output"

# The output, the moments that it is normalized by, and their `rstd`.
Outputs = tuple[jax.Array, Shifted, jax.Array]


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def normalize_by_batch(operands: Operands, form: Form) -> Outputs:
    """Batch norm in training mode."""
    x, mask, scale, *_ = operands
    moments = shifted_moments(x, mask, form.axis, form.devices, scale.dtype, form.differentiated)
    rstd = jax.lax.rsqrt(moments.var + form.epsilon)
    return activated(_applied(operands, moments, rstd, form), operands, form), moments, rstd


def _applied(operands: Operands, moments: Shifted, rstd: jax.Array, form: Form) -> jax.Array:
    """`x̂·scale + bias + residual`, to which the activation is applied."""
    shift, delta, _, _ = moments
    by_batch = coefficients(shift, delta, rstd, operands.scale, operands.bias)
    return applied(by_batch, operands, form)


@normalize_by_batch.defjvp
def _normalize_by_batch_jvp(
    form: Form, primals: tuple[Operands], tangents: tuple[Operands]
) -> tuple[Outputs, Outputs]:
    (operands,), (directions,) = primals, tangents
    _, moments, rstd = normalize_by_batch(operands, form._replace(differentiated=True))
    # Only the arguments are kept for the backward pass, and what is named `OUTPUT`.
    policy = jax.checkpoint_policies.save_only_these_names(OUTPUT)
    with_tangent = jax.checkpoint(
        functools.partial(_with_tangent, form=form), prevent_cse=False, policy=policy
    )
    primals_out, tangents_out = with_tangent(
        operands, directions._replace(mask=None), moments, rstd
    )
    return primals_out, tangents_out


def _with_tangent(
    operands: Operands, directions: Operands, moments: Shifted, rstd: jax.Array, *, form: Form
) -> tuple[Outputs, Outputs]:
    """The output from what is named, so that `jax.checkpoint` can make it again without reductions.

    With a residual, the sign of the output tells the derivative of some activations, and the next
    layer keeps it anyway: it is kept here instead of the residual.
    """
    operands = operands._replace(x=checkpoint_name(operands.x, INPUT))
    moments = moments._replace(
        shift=checkpoint_name(moments.shift, MEAN), delta=checkpoint_name(moments.delta, MEAN)
    )
    rstd = checkpoint_name(rstd, RSTD)
    y = activated(_applied(operands, moments, rstd, form), operands, form)
    if operands.residual is not None and form.activation in PIECEWISE_LINEAR:
        y = checkpoint_name(y, OUTPUT)
    outputs = y, moments, rstd
    return outputs, _tangent(directions, operands, outputs, form)


def _tangent(directions: Operands, operands: Operands, outputs: Outputs, form: Form) -> Outputs:
    """Tangents of the outputs, linear in those of the operands.

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
    _, moments, rstd = outputs
    shift, delta, _, count = moments
    unit = _power_of_two(rstd)
    rest, delta = rstd / unit, delta * unit
    k, unit = written_out(x, scale * rstd, unit)
    like = jax.typeof(x)
    dx = where_valid(mask, directions.x).astype(rstd.dtype)
    product = dx * expand(unit, like, form.axis) * centered(x, mask, form.axis, shift)
    means_dx = means((dx, product), count, form.axis, form.devices)
    mean_dx, mean_product = written_out(x, *means_dx)
    mean_dx_normalized = (mean_product - delta * mean_dx) * rest
    q = (directions.scale - k * mean_dx_normalized) * rest
    p = directions.bias - k * mean_dx - delta * q
    # A difference of its own: XLA's CPU compiler would write one out that `dx` is made of too.
    deviation = centered(x, mask, form.axis, apart(shift, "cpu"))
    p, q = (expand_tangent(v, like, form.axis) for v in (p, q * unit))
    terms = p + jnp.zeros_like(dx), deviation * q, expand(k, like, form.axis) * dx
    if form.activation in PIECEWISE_LINEAR and directions.residual is None:
        dy = _term_by_term(form.activation, terms, operands, moments, rstd, form)
    else:
        dz = sum(terms[1:], start=terms[0])
        if directions.residual is not None:
            dz = dz + directions.residual.astype(dz.dtype)
        dy = _through_activation(dz, directions, operands, outputs, form)
    dvar, drstd = 2 * mean_dx_normalized / rstd, -(rstd * mean_dx_normalized) * rstd
    dmoments = Shifted(jnp.zeros_like(shift), mean_dx, dvar, jnp.zeros_like(count))
    return where_valid(mask, dy), dmoments, drstd


def expand_tangent(vector: jax.Array, like: Any, axis: int) -> jax.Array:
    """`expand` of a tangent; transposed it is a sum, in pieces where a CPU is faster at that."""
    if sums_in_pieces(like, axis):
        return expand_in_pieces(vector, like, axis)
    return expand(vector, like, axis)


def _power_of_two(x: jax.Array) -> jax.Array:
    """The power of two next to `x`, a constant to differentiation: no result depends on it."""
    return jax.lax.stop_gradient(jax.lax.reduce_precision(x, jnp.finfo(x.dtype).nexp, 0))


def _term_by_term(
    activation: Activation,
    terms: Sequence[jax.Array],
    operands: Operands,
    moments: Shifted,
    rstd: jax.Array,
    form: Form,
) -> jax.Array:
    """The tangent of the output where the slope of the activation is a matter of sign.

    Each term has a slope of its own, that no compiler can know to be the others'. A slope that
    terms share is a mask that XLA:GPU writes out: compiled for an H100, four bottleneck blocks
    moved 33.0 bytes per element with one slope for two of the terms, and 31.9 with three.
    """
    tangents = []
    for term in terms:
        z = _applied(operands, moments, rstd, form).astype(form.dtype).astype(term.dtype)
        tangents.append(jax.jvp(activation, (z,), (term,))[1])
        rstd = apart(rstd, "cuda", "rocm")
    dy: jax.Array = sum(tangents[1:], start=tangents[0])
    return dy.astype(form.dtype)


def _through_activation(
    dz: jax.Array, directions: Operands, operands: Operands, outputs: Outputs, form: Form
) -> jax.Array:
    if form.activation is None:
        return dz.astype(form.dtype)
    y, moments, rstd = outputs
    if form.activation in PIECEWISE_LINEAR:
        # Selecting in the dtype of the output: in float32 the compiler writes the result out.
        z, dz = y, dz.astype(form.dtype)
    else:
        z = _applied(operands, moments, rstd, form)
    primals, tangents = (z, *operands.constants), (dz, *directions.constants)
    dy: jax.Array = jax.jvp(form.activation, primals, tangents)[1]
    return dy.astype(form.dtype)
