"""Normalization by the batch itself: one derivative rule for every mode of differentiation."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxbn._activation import PIECEWISE_LINEAR, Activation
from jaxbn._core.axes import expand
from jaxbn._core.compilers import apart, expand_tangents, written_out
from jaxbn._core.forward import Form, Operands, activated, applied, coefficients, inverted, seen
from jaxbn._core.moments import Shifted, centered, means, shifted_moments, where_valid
from jaxbn._core.renorm import corrected, correction

CHECKPOINT_NAMES = ("jaxbn.input", "jaxbn.mean", "jaxbn.rstd")
"""Names of the input, the mean and `1/√(var + epsilon)` for policies of `jax.checkpoint`.

A policy that saves them, `jax.checkpoint_policies.save_only_these_names(*jaxbn.CHECKPOINT_NAMES)`,
recomputes a layer without its reductions.
"""
INPUT, MEAN, RSTD = CHECKPOINT_NAMES
OUTPUT = "jaxbn.output"

# The output, the moments of the batch, and `rstd`.
Outputs = tuple[jax.Array, Shifted, jax.Array]


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def normalize_by_batch(operands: Operands, form: Form) -> Outputs:
    """Batch norm in training mode: moments, coefficients, application."""
    x, mask, scale, *_ = operands
    moments = shifted_moments(x, mask, form.axis, form.devices, scale.dtype, form.differentiated)
    rstd = jax.lax.rsqrt(moments.var + form.epsilon)
    (operands,) = _renormalized(moments, rstd, operands)
    return activated(_preactivation(operands, moments, rstd, form), operands, form), moments, rstd


def _renormalized(moments: Shifted, rstd: jax.Array, *operands: Operands) -> list[Operands]:
    """Operands, and their tangents, after the correction by batch renormalization, if any."""
    by_limits = correction(operands[0].limits, moments, rstd)
    pairs = [corrected(v.scale, v.bias, by_limits) for v in operands]
    changed = zip(operands, pairs, strict=True)
    return [v._replace(scale=scale, bias=bias) for v, (scale, bias) in changed]


def _preactivation(operands: Operands, moments: Shifted, rstd: jax.Array, form: Form) -> jax.Array:
    """`x̂·scale + bias + residual`."""
    by_batch = coefficients(moments.shift, moments.delta, rstd, operands)
    return applied(by_batch, operands, form)


@normalize_by_batch.defjvp
def _normalize_by_batch_jvp(
    form: Form, primals: tuple[Operands], tangents: tuple[Operands]
) -> tuple[Outputs, Outputs]:
    (operands,), (directions,) = primals, tangents
    _, moments, rstd = normalize_by_batch(operands, form._replace(differentiated=True))
    # The backward pass keeps the arguments that it reads, and the array named `OUTPUT`.
    policy = jax.checkpoint_policies.save_only_these_names(OUTPUT)
    with_tangent = jax.checkpoint(
        functools.partial(_with_tangent, form=form), prevent_cse=False, policy=policy
    )
    primals_out, tangents_out = with_tangent(
        operands, directions._replace(mask=None, limits=None), moments, rstd
    )
    return primals_out, tangents_out


def _with_tangent(
    operands: Operands, directions: Operands, moments: Shifted, rstd: jax.Array, *, form: Form
) -> tuple[Outputs, Outputs]:
    """The output and its tangent from named arrays. A policy that keeps them needs no reductions.

    With a residual, the sign of the output determines the derivative of some activations. The next
    layer keeps the output anyway, so it is kept here instead of the residual, and with
    `keep_output` instead of the input.
    """
    operands = operands._replace(x=checkpoint_name(operands.x, INPUT))
    moments = moments._replace(
        shift=checkpoint_name(moments.shift, MEAN), delta=checkpoint_name(moments.delta, MEAN)
    )
    rstd = checkpoint_name(rstd, RSTD)
    operands, directions = _renormalized(moments, rstd, operands, directions)
    y = activated(_preactivation(operands, moments, rstd, form), operands, form)
    by_sign = operands.residual is not None and form.activation in PIECEWISE_LINEAR
    if form.keep_output or by_sign:
        y = checkpoint_name(y, OUTPUT)
    outputs = y, moments, rstd
    return outputs, _tangent(directions, operands, outputs, form)


def _tangent(directions: Operands, operands: Operands, outputs: Outputs, form: Form) -> Outputs:
    """Tangents of the outputs, linear in the tangents of the operands.

        dz = k·dx + p + d·q + dresidual    with  q = (dscale − k·E[dx·x̂])·r
                                                 p = dbias − k·E[dx] − delta·u·q

    Here `k = scale·rstd`, `d = (x − shift)·u`, `E[dx·x̂] = (E[dx·d] − delta·u·E[dx])·r`, and
    `rstd = u·r` with u a power of two. The vectors p and q are computed first. In the transpose,
    bias and E[dx] then share one reduction of the cotangent, and scale and E[dx·x̂] share the
    other.

    Both reductions use d, not x̂. Differences of nearby floats and powers of two are exact. The
    rounding errors of x̂ are equal for equal x, and such errors add up. No power of rstd above the
    first is formed, except in drstd, which consists of it: other powers would underflow.
    """
    y, moments, rstd = outputs
    x, mask, scale, *_ = operands
    x = y if form.keep_output else x
    shift, delta, _, count = moments
    unit = _power_of_two(rstd)
    rest, delta = rstd / unit, delta * unit
    k, unit = written_out(x, scale * rstd, unit)
    like = jax.typeof(x)
    dx = where_valid(mask, directions.x).astype(rstd.dtype)
    deviation = _deviation(operands, outputs, form)
    product = dx * expand(unit, like, form.axis) * deviation
    means_dx = means((dx, product), count, form.axis, form.devices)
    mean_dx, mean_product = written_out(x, *means_dx)
    mean_dx_normalized = (mean_product - delta * mean_dx) * rest
    q = (directions.scale - k * mean_dx_normalized) * rest
    p = directions.bias - k * mean_dx - delta * q
    p, q = expand_tangents((p, q * unit), dx, form.axis)
    terms = p, deviation * q, expand(k, like, form.axis) * dx
    if form.activation in PIECEWISE_LINEAR and directions.residual is None:
        dy = _term_by_term(form.activation, terms, operands, outputs, form)
    else:
        dz = sum(terms[1:], start=terms[0])
        if directions.residual is not None:
            dz = dz + directions.residual.astype(dz.dtype)
        dy = _through_activation(dz, directions, operands, outputs, form)
    dvar, drstd = 2 * mean_dx_normalized / rstd, -(rstd * mean_dx_normalized) * rstd
    dmoments = Shifted(jnp.zeros_like(shift), mean_dx, dvar, jnp.zeros_like(count))
    return where_valid(mask, dy), dmoments, drstd


def _deviation(operands: Operands, outputs: Outputs, form: Form) -> jax.Array:
    """`x − shift`, from the input or the output, whichever is kept; zero where masked."""
    y, moments, rstd = outputs
    if not form.keep_output:
        return centered(operands.x, operands.mask, form.axis, moments.shift)
    by_batch = coefficients(moments.shift, moments.delta, rstd, operands)
    return inverted(y, by_batch, operands, form)


def _power_of_two(x: jax.Array) -> jax.Array:
    """A power of two next to `x`. No result depends on it, so it counts as a constant."""
    return jax.lax.stop_gradient(jax.lax.reduce_precision(x, jnp.finfo(x.dtype).nexp, 0))


def _term_by_term(
    activation: Activation,
    terms: Sequence[jax.Array],
    operands: Operands,
    outputs: Outputs,
    form: Form,
) -> jax.Array:
    """The tangent of the output if the sign of `z` determines the slope of the activation.

    XLA:GPU writes a slope that several terms share to memory, as a mask. Here each term has a slope
    that XLA does not recognize as the same. Compiled for an H100, four bottleneck blocks moved 33.0
    bytes per element with one slope for two of the terms, and 31.9 with three slopes.
    """
    tangents = []
    y, moments, rstd = outputs
    for term in terms:
        if form.keep_output:
            # Also with the sign of zero, since a tiny output may be rounded to zero.
            y = apart(y, "cuda", "rocm")
            z = jnp.copysign(jnp.ones_like(y), y)
        else:
            z = _preactivation(operands, moments, rstd, form).astype(form.dtype)
            rstd = apart(rstd, "cuda", "rocm")
        tangents.append(jax.jvp(activation, (z.astype(term.dtype),), (term,))[1])
    dy: jax.Array = sum(tangents[1:], start=tangents[0])
    return dy.astype(form.dtype)


def _through_activation(
    dz: jax.Array, directions: Operands, operands: Operands, outputs: Outputs, form: Form
) -> jax.Array:
    """The tangent of the output from `dz`, the tangent of the activation's argument."""
    if form.activation is None:
        return dz.astype(form.dtype)
    y, moments, rstd = outputs
    if form.activation in PIECEWISE_LINEAR:
        # Selected in the dtype of the output: XLA would write a float32 selection to memory.
        z, dz = y, dz.astype(form.dtype)
    else:
        z = seen(_preactivation(operands, moments, rstd, form), operands, form)
        dz = seen(dz, operands, form)
    primals, tangents = (z, *operands.constants), (dz, *directions.constants)
    dy: jax.Array = jax.jvp(form.activation, primals, tangents)[1]
    return dy.astype(form.dtype)
