"""Normalization by given statistics, and by the statistics of the batch itself."""

import functools
from typing import cast

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxbn._activation import Activation, after, check_keep_output, checked_activation, is_own
from jaxbn._checks import (
    check_values_per_channel,
    checked_dtype,
    checked_epsilon,
    checked_input,
    checked_mask,
    checked_residual,
    checked_vector,
    statistics_dtype,
)
from jaxbn._conditional import conditional, is_conditional
from jaxbn._core.derivative import normalize_by_batch
from jaxbn._core.devices import AxisIndexGroups, AxisName, checked_devices
from jaxbn._core.forward import (
    Form,
    Operands,
    applied,
    coefficients,
    is_plain,
    normalize_by_statistics,
    traced_once,
)
from jaxbn._core.moments import Shifted, added, merged
from jaxbn._ghost import by_group, checked_groups
from jaxbn._moments import Moments, unshifted
from jaxbn._renorm import Renorm, limits
from jaxbn._stats import BatchStats
from jaxbn._types import Bool, Integer, Number


def normalize(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: Integer = -1,
    epsilon: Number = 1e-5,
    dtype: DTypeLike | None = None,
    mask: ArrayLike | None = None,
    activation: str | Activation | None = None,
    residual: ArrayLike | None = None,
) -> jax.Array:
    """Normalizes `x` by a given mean and variance: batch norm in inference mode.

        y = activation((x − mean) · scale / √(var + epsilon) + bias + residual)

    Args:
      x: input, with the channels at `axis`; float16, bfloat16, float32 or float64.
      mean: shape `[C]`, usually `BatchStats.mean`.
      var: shape `[C]`, usually `BatchStats.var`. A negative variance gives NaN.
      scale: γ, shape `[C]`, or `[N, C]` with one row per sample; None means 1.
      bias: β, shape `[C]`, or `[N, C]` with one row per sample; None means 0.
      axis: channel axis of `x`.
      epsilon: added to the variance inside the square root; a non-negative Python number.
      dtype: dtype of `y`; None for the dtype of `x`.
      mask: True, or 1, where a value counts; broadcasts against `x`. Masked entries, even NaN,
        never affect a result or a derivative; the output there is zero.
      activation: None, "relu", "leaky_relu", "silu" or "gelu" (as in `jax.nn`), or a function that
        keeps the shape. A function may close over arrays; gradients reach them.
      residual: added before the activation; shape of `x`, dtype of `y`.

    Returns:
      `y`, in the shape of `x`, computed in at least float32 and rounded once. The backward pass
        keeps only `x`, in its own dtype, vectors of shape `[C]`, and the residual if there is an
        activation.

    Raises:
      TypeError: an array or `dtype` is not float16, bfloat16, float32 or float64, or `mask` is
        complex.
      TypeError: `axis` is not an int, `epsilon` is not a Python number, `activation` is neither a
        string nor a function, or `residual` and `y` differ in dtype.
      ValueError: `axis` is out of range, `x` has no channels, or `mean`, `var`, `scale`, `bias` or
        `residual` does not fit `x`.
      ValueError: `mask` does not broadcast against `x`, fits both its first and its last axes, or
        holds values other than 0 and 1. If such a mask is traced, its values in `x` become NaN.
      ValueError: `epsilon` is negative, or out of range of the dtype of the computation.
      ValueError: `activation` is unknown, or changes the shape.

    Examples:
      >>> import jax.numpy as jnp, jaxbn
      >>> x = jnp.array([[1.0, 2.0], [5.0, 6.0]])
      >>> jaxbn.normalize(x, mean=jnp.array([3.0, 3.0]), var=jnp.array([4.0, 1.0]), epsilon=0.0)
      Array([[-1., -1.],
             [ 1.,  3.]], dtype=float32)

    References:
      Ioffe and Szegedy, "Batch Normalization", 2015, https://arxiv.org/abs/1502.03167;
      `torch.nn.functional.batch_norm` with `training=False`.
    """
    x, axis = checked_input(x, axis)
    mean = checked_vector(mean, "mean", x, axis)
    var = checked_vector(var, "var", x, axis)
    dtype = checked_dtype(dtype, x)
    wide = statistics_dtype(x.dtype, mean.dtype, var.dtype, dtype)
    form = Form(axis, checked_epsilon(epsilon, wide, train=False), dtype)
    x, mask = checked_mask(mask, x, axis)
    residual = checked_residual(residual, x, dtype)
    if is_conditional(scale, bias):
        activation = conditional(x, axis, scale, bias, mask, residual, activation)
        scale = bias = residual = None
    operands = _operands(x, scale, bias, mask, residual, axis, wide)
    operands, form = _with_activation(operands, activation, form)
    by_statistics = traced_once(normalize_by_statistics, form)
    # The compiled form has a branch for each platform, which not all interpreters can read.
    if isinstance(x, jax.core.Tracer) and is_plain(operands, form, wide):
        by_statistics = functools.partial(normalize_by_statistics, form=form)
    y: jax.Array = by_statistics(operands, mean.astype(wide), var.astype(wide))
    return y


def batch_normalize(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: Integer = -1,
    epsilon: Number = 1e-5,
    dtype: DTypeLike | None = None,
    axis_name: AxisName = None,
    axis_index_groups: AxisIndexGroups = None,
    virtual_batch_size: Integer | None = None,
    mask: ArrayLike | None = None,
    activation: str | Activation | None = None,
    residual: ArrayLike | None = None,
    renorm: Renorm | None = None,
    stats: BatchStats | None = None,
    keep_output: Bool = False,
) -> tuple[jax.Array, Moments]:
    """Normalizes `x` by its own mean and biased variance: batch norm in training mode.

        y = activation((x − E[x]) · scale / √(Var[x] + epsilon) + bias + residual)

    The backward pass keeps only `x`, in its own dtype, and a few vectors of shape `[C]`. With a
    residual it also keeps `y` for "relu" and "leaky_relu", which the next layer keeps anyway, and
    the residual for other activations. For policies of `jax.checkpoint`, `jaxbn.CHECKPOINT_NAMES`
    names `x`, the mean and `1/√(var + epsilon)`.

    Args:
      x: input, with the channels at `axis`; float16, bfloat16, float32 or float64.
      scale: γ, shape `[C]`, or `[N, C]` with one row per sample; None means 1.
      bias: β, shape `[C]`, or `[N, C]` with one row per sample; None means 0.
      axis: channel axis of `x`; all other axes are reduced.
      epsilon: added to the variance inside the square root; a positive Python number.
      dtype: dtype of `y`; None for the dtype of `x`.
      axis_name: name of a mapped axis of `jax.vmap`, `jax.pmap` or `jax.shard_map`, or a tuple of
        names. The batch then extends over all devices along it.
      axis_index_groups: groups of indices along the one axis `axis_name`, such as
        `[[0, 1], [2, 3]]`. Each group is a batch of its own.
      virtual_batch_size: number of samples that are normalized together: ghost batch norm. None for
        the whole batch. Samples lie along the first axis of `x` that is not the channel axis, and
        `virtual_batch_size` must divide their number. Each block of consecutive samples is
        normalized by its own moments; with a `mask`, by those of its values that count. Under
        `jax.shard_map`, `jax.pmap` and `jax.vmap`, `x` holds the samples of one device. With
        `axis_name`, block i of all devices is one batch; see `docs/distributed.md#groups`. A block
        with one value per channel is an error.
      mask: True, or 1, where a value counts; broadcasts against `x`. Masked entries, even NaN,
        never affect a result or a derivative; the output there is zero.
      activation: None, "relu", "leaky_relu", "silu" or "gelu" (as in `jax.nn`), or a function that
        keeps the shape. A function may close over arrays; gradients reach them.
      residual: added before the activation; shape of `x`, dtype of `y`.
      renorm: batch renormalization, which corrects the batch toward the running statistics; None
        for batch norm.
      stats: running statistics, used by `renorm` only.
      keep_output: whether the backward pass keeps `y` instead of `x`, and computes `x` from `y`.
        This saves memory if the next layer keeps `y` anyway. The activation must be None or
        "leaky_relu", `scale` and `bias` must have shape `[C]`, and there must be no residual. The
        output does not change. In gradients, the error of
        `x̂ = (x − E[x]) / √(Var[x] + epsilon)` is the rounding of `y` times `|x̂| + |bias/scale|`.
        If a scale is 0, the gradients of `scale` and `x` are not finite.

    Returns:
      `(y, moments)`: `y` in the shape of `x`, computed in at least float32 and rounded once;
        `moments` as `batch_moments(x)` returns them, merged over ghost batches, for
        `update_batch_stats`. Both are differentiable to any order, in forward and reverse mode.

    Raises:
      TypeError: an array or `dtype` is not float16, bfloat16, float32 or float64, `mask` is
        complex, or `renorm` is given with `stats` narrower than float32.
      TypeError: `axis` is not an int, `epsilon` is not a Python number, `activation` is neither a
        string nor a function, `residual` and `y` differ in dtype, `renorm` is not a `Renorm`, its
        `stats` are not `BatchStats`, or `keep_output` is not a bool that is known when traced.
      ValueError: `x`, or a block of `virtual_batch_size` samples, has one value per channel, with
        or without a mask, and no other device shares the batch. If a mask leaves one of several
        values, `y` is the bias there.
      ValueError: `axis` is out of range, `x` has no channels, or `scale`, `bias`, `residual` or
        `stats` does not fit `x`.
      ValueError: `mask` does not broadcast against `x`, fits both its first and its last axes, or
        holds values other than 0 and 1. If such a mask is traced, its values in `x` become NaN.
      ValueError: `epsilon` is not positive, or out of range of the dtype of the computation.
      ValueError: `virtual_batch_size` is not an int of at least 1, or does not divide the number of
        samples. If the type of `x` spreads the samples over devices, it must divide the number on
        each device.
      ValueError: `axis_name` names an axis twice; `axis_index_groups` does not hold each index
        once, in groups of one size, or is given for no axis or several.
      ValueError: `activation` is unknown, or changes the shape.
      ValueError: `keep_output` is given with another activation, with a residual, or with a `scale`
        or `bias` of shape `[N, C]`.
      ValueError: `renorm` is given without `stats`, or a limit that its schedule returns is out of
        range. If it is traced, the results are NaN.
      NameError: `axis_name` is not bound.
      NotImplementedError: `axis_index_groups` is given for an axis of `jax.vmap`, or `axis_name` is
        an axis of `jax.vmap` inside `jax.shard_map` with `check_vma=True`.

    Examples:
      >>> import jax.numpy as jnp, jaxbn
      >>> y, moments = jaxbn.batch_normalize(jnp.array([[0.0, 1.0], [4.0, 5.0]]))
      >>> y.round(3)
      Array([[-1., -1.],
             [ 1.,  1.]], dtype=float32)
      >>> moments.mean
      Array([2., 3.], dtype=float32)

    References:
      - Ioffe and Szegedy, "Batch Normalization", 2015, https://arxiv.org/abs/1502.03167
      - `torch.nn.functional.batch_norm` with `training=True`
      - Ghost batch norm: Hoffer, Hubara and Soudry, "Train longer, generalize better", 2017,
        https://arxiv.org/abs/1705.08741
      - `keep_output`: Rota Bulò, Porzi and Kontschieder, "In-Place Activated BatchNorm", 2018,
        https://arxiv.org/abs/1712.02616
    """
    x, axis = checked_input(x, axis)
    dtype = checked_dtype(dtype, x)
    wide = statistics_dtype(x.dtype, dtype)
    epsilon = checked_epsilon(epsilon, wide, train=True)
    form = Form(axis, epsilon, dtype, checked_devices(axis_name, axis_index_groups))
    check_keep_output(keep_output, activation, residual, by_sample=is_conditional(scale, bias))
    x, mask = checked_mask(mask, x, axis)
    residual = checked_residual(residual, x, dtype)
    if is_conditional(scale, bias):
        activation = conditional(x, axis, scale, bias, mask, residual, activation)
        scale = bias = residual = None
    groups = checked_groups(virtual_batch_size, x, axis)
    # The user's own function sees the whole batch, not one group.
    whole = groups > 1 and is_own(activation)
    towards = limits(renorm, stats, x, axis, epsilon, wide)
    form = form._replace(dtype=wide if whole else dtype, keep_output=bool(keep_output))

    def by_batch(
        x: jax.Array, mask: jax.Array | None, residual: jax.Array | None
    ) -> tuple[jax.Array, Shifted]:
        check_values_per_channel(x, axis, form.devices)
        operands = _operands(x, scale, bias, mask, residual, axis, wide)
        operands, fused = _with_activation(operands, None if whole else activation, form)
        operands = operands._replace(limits=towards)
        y, moments, _ = traced_once(normalize_by_batch, fused)(operands)
        return y, moments

    if groups == 1:
        y, moments = by_batch(x, mask, residual)
    else:
        y, moments = by_group(by_batch, groups, axis, x, mask, residual)
        moments = merged(moments, added)
    if whole:
        y = after(cast(Activation, activation), y, mask, dtype)
    return y, unshifted(moments)


def _operands(
    x: jax.Array,
    scale: ArrayLike | None,
    bias: ArrayLike | None,
    mask: jax.Array | None,
    residual: jax.Array | None,
    axis: int,
    dtype: DTypeLike,
) -> Operands:
    """The operands, with checked vectors in `dtype`."""
    scale = jnp.ones(x.shape[axis]) if scale is None else checked_vector(scale, "scale", x, axis)
    bias = jnp.zeros(x.shape[axis]) if bias is None else checked_vector(bias, "bias", x, axis)
    return Operands(x, mask, scale.astype(dtype), bias.astype(dtype), residual, ())


def _with_activation(
    operands: Operands, activation: str | Activation | None, form: Form
) -> tuple[Operands, Form]:
    """The operands with the arrays of the activation's closure, and the form with its function."""

    def argument(operands: Operands) -> jax.Array:
        by_any = coefficients(operands.bias, None, operands.scale, operands)
        return applied(by_any, operands, form)

    # Its type also says along which axes it varies between devices.
    example = jax.eval_shape(argument, operands) if is_own(activation) else None
    function, constants = checked_activation(activation, example)
    return operands._replace(constants=constants), form._replace(activation=function)
