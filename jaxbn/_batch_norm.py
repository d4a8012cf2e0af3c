"""The complete batch norm: normalizes, and updates the running statistics."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxbn._activation import Activation, check_keep_output
from jaxbn._checks import check_bool, check_momentum, checked_input, checked_vector
from jaxbn._conditional import is_conditional
from jaxbn._core.devices import AxisIndexGroups, AxisName, spread
from jaxbn._domains import by_domain
from jaxbn._moments import Moments, batch_moments
from jaxbn._normalize import batch_normalize, normalize
from jaxbn._renorm import Renorm, check_renorm
from jaxbn._stats import BatchStats, checked_stats, update_batch_stats
from jaxbn._types import Bool, Flag, Integer, Number

Stats = TypeVar("Stats", BatchStats, None, BatchStats | None)
Mode = Callable[[], tuple[jax.Array, BatchStats]]


def batch_norm(
    x: ArrayLike,
    stats: Stats,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    train: Flag,
    update_stats: Flag | None = None,
    momentum: ArrayLike | None = 0.1,
    unbiased: Bool = True,
    axis: Integer = -1,
    epsilon: Number = 1e-5,
    dtype: DTypeLike | None = None,
    axis_name: AxisName = None,
    axis_index_groups: AxisIndexGroups = None,
    virtual_batch_size: Integer | None = None,
    mask: ArrayLike | None = None,
    activation: str | Activation | None = None,
    residual: ArrayLike | None = None,
    skip_nonfinite: Flag = False,
    renorm: Renorm | None = None,
    domain: ArrayLike | None = None,
    keep_output: Bool = False,
) -> tuple[jax.Array, Stats]:
    """Batch norm in training mode or inference mode, with running statistics.

        train      y, moments = batch_normalize(x);  stats' = update_batch_stats(stats, moments)
        inference  y = normalize(x, stats.mean, stats.var);  stats' = stats

    In training mode, the biased variance of the batch normalizes `x`, and the unbiased variance
    goes into the running statistics: `new = (1 − momentum)·old + momentum·batch`, as in torch. With
    `stats=None`, the batch normalizes itself in both modes.

    Three switches are independent. `train` selects the statistics that normalize. `update_stats`
    selects whether the batch updates the running statistics. Passing `jax.lax.stop_gradient(scale)`
    freezes the scale.

    Args:
      x: input, with the channels at `axis`; float16, bfloat16, float32 or float64.
      stats: running statistics of shape `[C]`, or None to keep none.
      scale: γ, shape `[C]`, or `[N, C]` with one row per sample; None means 1.
      bias: β, shape `[C]`, or `[N, C]` with one row per sample; None means 0.
      train: True for training mode, False for inference mode. A traced bool compiles both modes
        under `jax.lax.cond`, so `x` must be valid for training mode in either case.
      update_stats: whether the batch updates the running statistics; None means in training mode
        only. Use False in training mode for a second pass over the same batch, as in
        sharpness-aware or adversarial training. Use True in inference mode to let the statistics
        follow new data. With a traced bool, the moments are always computed.
      momentum: weight of the new batch, in [0, 1]; None for the cumulative average.
      unbiased: whether the running variance is the unbiased one. The output never depends on it.
      axis: channel axis of `x`: 1 for torch's layouts, -1 for channels last.
      epsilon: added to the variance inside the square root; a Python number, positive in training
        mode.
      dtype: dtype of `y`; None for the dtype of `x`.
      axis_name: name of a mapped axis of `jax.vmap`, `jax.pmap` or `jax.shard_map`, or a tuple of
        names. The batch then extends over all devices along it.
      axis_index_groups: groups of indices along the one axis `axis_name`, such as
        `[[0, 1], [2, 3]]`. Each group is a batch of its own.
      virtual_batch_size: number of samples that are normalized together in training mode: ghost
        batch norm. None for the whole batch. Samples lie along the first axis of `x` that is not
        the channel axis, and `virtual_batch_size` must divide their number. Each block of
        consecutive samples is normalized by its own moments; with a `mask`, by those of its values
        that count. Under `jax.shard_map`, `jax.pmap` and `jax.vmap`, `x` holds the samples of one
        device. With `axis_name`, block i of all devices is one batch; see
        `docs/distributed.md#groups`. The merged moments of all blocks go into the running
        statistics. A block with one value per channel is an error.
      mask: True, or 1, where a value counts; broadcasts against `x`. Masked entries, even NaN,
        never affect a result or a derivative; the output there is zero.
      activation: None, "relu", "leaky_relu", "silu" or "gelu" (as in `jax.nn`), or a function that
        keeps the shape. A function may close over arrays; gradients reach them.
      residual: added before the activation; shape of `x`, dtype of `y`.
      skip_nonfinite: whether a channel keeps its running statistics if the batch has NaN or
        infinity in it; a bool, traced or not.
      renorm: batch renormalization, which corrects the batch toward the running statistics in
        training mode; None for batch norm.
      domain: which of k sets of running statistics to use, with mean and var of shape `[k, C]` and
        count of shape `[k]`: an integer for the batch, or one for each sample, shape `[N]`; traced
        or not. `scale` and `bias` are shared, shape `[C]`, or have shape `[k, C]`. The samples of
        each domain are normalized among themselves. With one domain per sample, a domain without
        samples keeps its statistics and its count. A domain for the batch must be the same on all
        devices of `axis_name`; otherwise `y` is NaN. A domain that does not exist is an error, or
        gives NaN if it is in a JAX array.
      keep_output: whether training mode keeps `y` instead of `x` for the backward pass; see
        `batch_normalize`.

    Returns:
      `(y, stats)`: `y` in the shape of `x`; the new statistics, without gradient, or None if
        `stats` is None.

    Raises:
      TypeError: an array or `dtype` is not float16, bfloat16, float32 or float64, `mask` is
        complex, or `stats` is narrower than float32.
      TypeError: `train`, `update_stats` or `skip_nonfinite` is not a bool, or `unbiased` or
        `keep_output` is not one that is known when traced.
      TypeError: `axis` is not an int, `epsilon` is not a Python number, `activation` is neither a
        string nor a function, `residual` and `y` differ in dtype, `renorm` is not a `Renorm`, or
        `stats` is not `BatchStats`.
      ValueError: in training mode, `x` or a block of `virtual_batch_size` samples has one value per
        channel, with or without a mask, and no other device shares the batch. If a mask leaves one
        of several values, `y` is the bias there.
      ValueError: `axis` is out of range, `x` has no channels, or `stats`, `scale`, `bias` or
        `residual` does not fit `x`.
      ValueError: `mask` does not broadcast against `x`, fits both its first and its last axes, or
        holds values other than 0 and 1. If such a mask is traced, its values in `x` become NaN.
      ValueError: `epsilon` is negative, zero in training mode, or out of range of the dtype of the
        computation.
      ValueError: `momentum` is a number outside [0, 1], or is not a scalar.
      ValueError: `virtual_batch_size` is not an int of at least 1, or does not divide the number of
        samples. If the type of `x` spreads the samples over devices, it must divide the number on
        each device.
      ValueError: `axis_name` names an axis twice; `axis_index_groups` does not hold each index
        once, in groups of one size, or is given for no axis or several.
      ValueError: `activation` is unknown, or changes the shape.
      ValueError: `keep_output` is given with another activation, with a residual, or with a `scale`
        or `bias` of shape `[N, C]`.
      ValueError: `renorm` is given with `stats=None`, or a limit that its schedule returns is out
        of range. If it is traced, the results are NaN.
      ValueError: `domain` is not one integer or one per sample, `stats` does not have k sets, or a
        Python or NumPy `domain` does not exist. If it is in a JAX array, traced or not, `y` is NaN.
      NameError: `axis_name` is not bound, in training mode or where the batch updates `stats`.
      NotImplementedError: `axis_index_groups` is given for an axis of `jax.vmap`, or `axis_name` is
        an axis of `jax.vmap` inside `jax.shard_map` with `check_vma=True`.

    Examples:
      >>> import jax.numpy as jnp, jaxbn
      >>> x = jnp.arange(15.0).reshape(3, 5)
      >>> y, stats = jaxbn.batch_norm(x, jaxbn.init_batch_stats(5), train=True, momentum=0.5)
      >>> y[:, 0].round(4), stats.mean
      (Array([-1.2247,  0.    ,  1.2247], dtype=float32), \
Array([2.5, 3. , 3.5, 4. , 4.5], dtype=float32))
      >>> y, _ = jaxbn.batch_norm(x, stats, train=False)
      >>> bool(jnp.allclose(y, jaxbn.normalize(x, stats.mean, stats.var)))
      True

    References:
      Ioffe and Szegedy, "Batch Normalization", 2015, https://arxiv.org/abs/1502.03167;
      `torch.nn.BatchNorm1d`, `BatchNorm2d` and `BatchNorm3d`.
    """
    check_momentum(momentum)
    check_bool(train, "train")
    check_bool(skip_nonfinite, "skip_nonfinite")
    check_renorm(renorm)
    by_sample = domain is None and is_conditional(scale, bias)
    check_keep_output(keep_output, activation, residual, by_sample=by_sample)
    if update_stats is not None:
        check_bool(update_stats, "update_stats")
    devices: dict[str, Any] = {"axis_name": axis_name, "axis_index_groups": axis_index_groups}
    options: dict[str, Any] = {"axis": axis, "epsilon": epsilon, "dtype": dtype, "mask": mask}
    options |= {"activation": activation, "residual": residual}
    of_batch: dict[str, Any] = {"virtual_batch_size": virtual_batch_size, "renorm": renorm}
    of_batch |= {"keep_output": keep_output}
    of_update: dict[str, Any] = {"momentum": momentum, "unbiased": unbiased}
    of_update |= {"skip_nonfinite": skip_nonfinite}
    if domain is not None:
        run = functools.partial(batch_norm, train=train, **of_batch, **of_update)
        update = train if update_stats is None else update_stats
        needed = not (train is False and update is False)
        options |= devices
        both: Any = by_domain(run, x, stats, (scale, bias), domain, update, options, needed)
        return cast(tuple[jax.Array, Stats], both)
    if stats is not None:
        stats = checked_stats(stats)
        x, index = checked_input(x, axis)
        for name in ("mean", "var"):
            checked_vector(getattr(stats, name), f"stats.{name}", x, index)
    by_batch = functools.partial(
        batch_normalize, x, scale, bias, stats=stats, **of_batch, **devices, **options
    )
    if stats is None:
        return by_batch()[0], None
    if renorm is not None and renorm.average_std:
        of_update["std_epsilon"] = epsilon

    def folded(moments: Callable[[], Moments], in_mode: bool) -> BatchStats:
        update = in_mode if update_stats is None else update_stats
        return _folded(stats, moments, update, of_update)

    def in_training() -> tuple[jax.Array, BatchStats]:
        y, moments = by_batch()
        return y, folded(lambda: moments, True)

    def in_inference() -> tuple[jax.Array, BatchStats]:
        y = normalize(x, stats.mean, stats.var, scale, bias, **options)
        return y, folded(lambda: batch_moments(x, axis=axis, mask=mask, **devices), False)

    if isinstance(train, jax.core.Tracer):
        return _either(train, in_training, in_inference)
    return in_training() if train else in_inference()


def _folded(
    stats: BatchStats, moments: Callable[[], Moments], update: Flag, options: dict[str, Any]
) -> BatchStats:
    """The statistics after a batch if `update`, else the old ones."""
    old = jax.lax.stop_gradient(stats)
    traced = isinstance(update, jax.core.Tracer)
    if not traced and not update:
        return old
    new = update_batch_stats(stats, moments(), **options)
    return jax.tree.map(functools.partial(jnp.where, update), new, old) if traced else new


def _either(train: jax.Array, in_training: Mode, in_inference: Mode) -> tuple[jax.Array, Any]:
    """The mode that a traced `train` selects."""

    def alike() -> tuple[jax.Array, Any]:
        # In `jax.shard_map`, the statistics may differ between devices.
        types = jax.tree.map(jax.typeof, jax.eval_shape(in_training))
        y, stats = jax.tree.map(spread, in_inference(), types)
        return y, stats

    y, stats = jax.lax.cond(train, in_training, alike)
    return y, stats
