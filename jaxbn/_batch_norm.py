"""Batch norm whole: normalize, and keep the running statistics."""

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
    """Batch norm in training or in inference mode, with its running statistics.

        train      y, moments = batch_normalize(x);  stats' = update_batch_stats(stats, moments)
        inference  y = normalize(x, stats.mean, stats.var);  stats' = stats

    In training the biased variance of the batch normalizes, and the unbiased one goes into the
    running statistics: `new = (1 − momentum)·old + momentum·batch`, as in torch. Without
    statistics to keep (`stats=None`) the batch normalizes itself in both modes.

    What normalizes, what the statistics learn and what is trained are three switches. `train` is
    the first, `update_stats` the second. For the third, pass `jax.lax.stop_gradient(scale)`.

    Args:
      x: input, channels at `axis`; float16, bfloat16, float32 or float64.
      stats: running statistics of shape `[C]`, or None where none are kept.
      scale: γ, shape `[C]`, or `[N, C]` for each sample its own; None means 1.
      bias: β, shape `[C]`, or `[N, C]`; None means 0.
      train: True for training mode. A traced bool compiles both modes under `jax.lax.cond`, so `x`
        must then be fit for training.
      update_stats: whether to fold the batch into the statistics; None for `train`. False in
        training leaves them to another pass over the same batch, as in sharpness-aware or
        adversarial training. True in inference lets statistics that normalize follow new data. A
        traced bool computes the moments for either value.
      momentum: weight of the new batch, in [0, 1]; None for the cumulative average.
      unbiased: whether the running variance is the unbiased one; the output never depends on it.
      axis: the channel axis of `x`: 1 for torch's layouts, -1 for channels last.
      epsilon: added to the variance inside the square root; a Python number, positive in training.
      dtype: the dtype of `y`; None for that of `x`.
      axis_name: name of a mapped axis, or a tuple of names, of `jax.vmap`, `jax.pmap` or
        `jax.shard_map`: the batch is the one on all its devices.
      axis_index_groups: groups of indices along the one axis, each a batch: `[[0, 1], [2, 3]]`.
      virtual_batch_size: splits the samples (of each device, where an axis is named) into groups of
        so many neighbours, each normalized by itself: ghost batch norm. The running statistics take
        the merged moments. None for one group.
      mask: True, or 1, where a value counts; broadcasts against `x`. Masked entries, even NaN,
        never affect a result or a derivative; the output there is zero.
      activation: None, "relu", "leaky_relu", "silu" or "gelu" (those of `jax.nn`), or a function
        that keeps the shape; it may close over arrays, and gradients reach them.
      residual: added before the activation; in the shape of `x` and the dtype of `y`.
      skip_nonfinite: keep the statistics of a channel if the batch has NaN or infinity in it; a
        bool, traced or not.
      renorm: corrects a batch towards the running statistics in training: batch renormalization
        with limits on the correction. None for batch norm.
      domain: which of k sets of statistics, stacked as mean and var of shape `[k, C]` and count of
        shape `[k]`: an integer, or one for each sample, shape `[N]`; traced or not. `scale` and
        `bias` are shared, `[C]`, or of shape `[k, C]`. Samples of a domain are normalized among
        themselves. Where there is one domain for each sample, a domain without samples keeps its
        count. One for the batch must be the same on all devices of `axis_name`. Where it is not, or
        where there is no such domain, y is NaN.
      keep_output: whether training keeps `y` for the backward pass in place of `x`; see
        `batch_normalize`.

    Returns:
      `(y, stats)`: `y` in the shape of `x`; the new statistics, without gradient, or None
      where `stats` is None.

    Raises:
      TypeError: an array is not real floating point, `stats` is no BatchStats or narrower than
        float32, `train`, `update_stats` or `skip_nonfinite` is not a bool; as `normalize`.
      ValueError: there is one value per channel in training, a shape does not fit, `epsilon` or
        `momentum` is out of range; as `normalize`.
      NameError: `axis_name` is not bound, in training.
      NotImplementedError: `axis_index_groups` is given for an axis of `jax.vmap`, or `axis_name` is
        one inside of `jax.shard_map` with `check_vma=True`.

    Example:
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
    """The statistics after a batch, or as they were; a traced `update` takes its moments anyway."""
    old = jax.lax.stop_gradient(stats)
    traced = isinstance(update, jax.core.Tracer)
    if not traced and not update:
        return old
    new = update_batch_stats(stats, moments(), **options)
    return jax.tree.map(functools.partial(jnp.where, update), new, old) if traced else new


def _either(train: jax.Array, in_training: Mode, in_inference: Mode) -> tuple[jax.Array, Any]:
    """Both modes, of which the traced `train` runs one."""

    def alike() -> tuple[jax.Array, Any]:
        # In `jax.shard_map` the statistics of one device's batch differ from those of the next.
        types = jax.tree.map(jax.typeof, jax.eval_shape(in_training))
        y, stats = jax.tree.map(spread, in_inference(), types)
        return y, stats

    y, stats = jax.lax.cond(train, in_training, alike)
    return y, stats
