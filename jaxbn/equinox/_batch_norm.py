"""`BatchNorm` with the constructor, the call and the state of `equinox.nn.BatchNorm`."""

from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxbn._activation import Activation
from jaxbn._checks import check_known_bool, checked_dtype, statistics_dtype
from jaxbn._core.devices import AxisName
from jaxbn._moments import Moments
from jaxbn._normalize import batch_normalize, normalize
from jaxbn._stats import (
    BatchStats,
    check_number,
    checked_stats,
    init_batch_stats,
    sum_of_weights,
    update_batch_stats,
)
from jaxbn._types import Bool, Integer, Number

Averages = tuple[jax.Array, jax.Array]


class BatchNorm(eqx.nn.StatefulLayer):
    """Batch norm with the constructor, the call and the state of `equinox.nn.BatchNorm`.

        train      y = (x − E[x]) · weight / √(Var[x] + eps) + bias
                   mean' = (1 − w)·mean + w·E[x]
                   var'  = (1 − w)·var  + w·Var[x]
        inference  y = (x − mean) · weight / √(var + eps) + bias

    The layer takes one sample, with the channels first, under `jax.vmap` with an axis name. The
    samples along that axis are the batch. `batched` takes a whole batch.

    `momentum` is Equinox's: the weight of the **old** statistics. `mode` selects how the statistics
    start, and how the state stores them. Checkpoints of Equinox load in the same mode:

        mode="batch"   the t-th batch has w = (1 − momentum) / (1 − momentum**t);
                       the state is a counter, and the averages times 1 − momentum**counter
        mode="ema"     the first batch has w = 1, all others w = 1 − momentum;
                       the state is whether no batch has come, and the averages

    In both modes, the first batch replaces the initial mean of 0 and variance of 1. A channel that
    is masked throughout the first batch keeps them, as if they were its first batch. A batch that
    is masked throughout is not counted.

    The layer differs from Equinox's in these points:

    - The running variance has no share of the initial variance. In Equinox's mode "batch", it has
      one for hundreds of batches.
    - A training batch is normalized by its own moments, in mode "ema", too. Equinox uses the
      running statistics there.
    - The default mode is "batch". In Equinox, it is "ema", with a warning.
    - The computation is at least float32, and the output has the dtype of `x`.
    - One value per channel is an error in training mode.
    - Before the first batch, inference in mode "ema" uses a mean of 0 and a variance of 1.

    Attributes:
      weight: γ, shape `[C]`, or None.
      bias: β, shape `[C]`, or None.
      ema_first_time_index: `StateIndex` of the flag of mode "ema"; None in mode "batch".
      ema_state_index: `StateIndex` of the averages of mode "ema"; None in mode "batch".
      batch_counter: `StateIndex` of the counter of mode "batch"; None in mode "ema".
      batch_state_index: `StateIndex` of the averages of mode "batch"; None in mode "ema". In either
        mode, `jaxbn.interop.from_equinox` converts the state to `BatchStats`.

    Args:
      input_size: number of channels, C.
      axis_name: name of the axis of `jax.vmap` that is the batch. A tuple or a list names more
        axes, also of `jax.pmap` or `jax.shard_map`. None if training mode uses `batched` only.
      eps: added to the variance inside the square root.
      channelwise_affine: whether there are a `weight` and a `bias`.
      momentum: weight of the **old** running statistics, in [0, 1).
      inference: whether to normalize by the running statistics (inference mode).
        `equinox.nn.inference_mode` sets it. A value in the call takes precedence.
      dtype: dtype of `weight` and `bias`; None for JAX's default float. The running statistics have
        it, too, but are at least float32.
      mode: "batch" or "ema".
      activation: None, "relu", "leaky_relu", "silu" or "gelu" (as in `jax.nn`), or a function that
        keeps the shape. If it is a module, its parameters are part of the layer.
      skip_nonfinite: whether a channel keeps its running statistics if the batch has NaN or
        infinity in it.

    Raises:
      TypeError: an argument or the input has a wrong type, or the state is narrower than float32.
      ValueError: a number or `mode` is out of range, or `axis_name` is None when training mode
        calls the layer with one sample; see also `jaxbn.batch_normalize`.
      NameError: `axis_name` is not bound, in training mode.
      NotImplementedError: `axis_name` is an axis of `jax.vmap` inside `jax.shard_map` with
        `check_vma=True`.

    Examples:
      >>> import equinox as eqx, jax, jax.numpy as jnp
      >>> from jaxbn.equinox import BatchNorm
      >>> layer, state = eqx.nn.make_with_state(BatchNorm)(2, "batch")
      >>> x = jnp.array([[1.0, 2.0], [3.0, 6.0]])
      >>> y, state = jax.vmap(layer, (0, None), (0, None), axis_name="batch")(x, state)
      >>> y.round(3)
      Array([[-1., -1.],
             [ 1.,  1.]], dtype=float32)
      >>> y, _ = eqx.nn.inference_mode(layer).batched(x, state)
      >>> y.round(3)
      Array([[-1., -1.],
             [ 1.,  1.]], dtype=float32)

    References:
      `equinox.nn.BatchNorm` of equinox 0.13.8.
    """

    weight: jax.Array | None
    bias: jax.Array | None
    ema_first_time_index: eqx.nn.StateIndex[jax.Array] | None
    ema_state_index: eqx.nn.StateIndex[Averages] | None
    batch_counter: eqx.nn.StateIndex[jax.Array] | None
    batch_state_index: eqx.nn.StateIndex[Averages] | None
    axis_name: AxisName
    inference: Bool
    activation: str | Activation | None
    input_size: int = eqx.field(static=True)
    eps: Number = eqx.field(static=True)
    channelwise_affine: bool = eqx.field(static=True)
    momentum: float = eqx.field(static=True)
    mode: Literal["ema", "batch"] = eqx.field(static=True)
    skip_nonfinite: Bool = eqx.field(static=True)

    def __init__(
        self,
        input_size: int,
        axis_name: AxisName = None,
        eps: Number = 1e-5,
        channelwise_affine: bool = True,
        momentum: Number = 0.99,
        inference: Bool = False,
        dtype: DTypeLike | None = None,
        mode: Literal["ema", "batch"] = "batch",
        *,
        activation: str | Activation | None = None,
        skip_nonfinite: Bool = False,
    ):
        check_number("input_size", input_size, "channels")
        if not 0 <= momentum < 1:
            raise ValueError(
                "`momentum` must be in [0, 1), the weight of the old statistics in "
                f"momentum * old + (1 - momentum) * batch; got {momentum}."
            )
        if mode not in ("ema", "batch"):
            raise ValueError(f'`mode` must be "batch" or "ema"; got {mode!r}.')
        dtype = checked_dtype(dtype, jnp.zeros(()))
        self.weight = jnp.ones(input_size, dtype) if channelwise_affine else None
        self.bias = jnp.zeros(input_size, dtype) if channelwise_affine else None
        averages = init_batch_stats(input_size, statistics_dtype(dtype))[:2]
        counter = jnp.array(True) if mode == "ema" else jnp.array(0)
        indices = eqx.nn.StateIndex(counter), eqx.nn.StateIndex(averages)
        none = None, None
        self.ema_first_time_index, self.ema_state_index = indices if mode == "ema" else none
        self.batch_counter, self.batch_state_index = indices if mode == "batch" else none
        self.axis_name = tuple(axis_name) if isinstance(axis_name, list) else axis_name
        self.inference = inference
        self.activation = activation
        self.input_size = input_size
        self.eps = eps
        self.channelwise_affine = channelwise_affine
        self.momentum = float(momentum)
        self.mode = mode
        self.skip_nonfinite = skip_nonfinite

    def __call__(
        self,
        x: ArrayLike,
        state: eqx.nn.State,
        *,
        key: ArrayLike | None = None,
        inference: Bool | None = None,
        mask: ArrayLike | None = None,
        residual: ArrayLike | None = None,
    ) -> tuple[jax.Array, eqx.nn.State]:
        """Normalizes one sample, in training mode by the moments of all samples along `axis_name`.

        Args:
          x: a sample, shape `[C, *spatial]`; float16, bfloat16, float32 or float64.
          state: holds the running statistics.
          key: not used. Containers of Equinox pass a key to every layer.
          inference: whether to normalize by the running statistics; None for the `inference` of the
            layer.
          mask: True, or 1, where a value counts; broadcasts against `x`. Masked entries, even NaN,
            never affect a result or a derivative; the output there is zero.
          residual: added before the activation; shape and dtype of `x`.

        Returns:
          `(y, state)`: `activation(normalized + residual)` in the shape and the dtype of `x`, and
            the state with the new running statistics, which is the same for all samples.
        """
        del key
        inference = self._mode(inference)
        if self.axis_name is None and not inference:
            raise ValueError(
                "`axis_name` must name the axis of jax.vmap that is the batch, since a layer is "
                "called with one sample; got None. Make the layer with a name, or call "
                "`layer.batched` with the whole batch."
            )
        options = {"axis": 0, "mask": mask, "residual": residual}
        return self._run(x, state, inference, self.axis_name, options)

    def batched(
        self,
        x: ArrayLike,
        state: eqx.nn.State,
        *,
        axis: Integer = 1,
        axis_name: AxisName = None,
        inference: Bool | None = None,
        mask: ArrayLike | None = None,
        residual: ArrayLike | None = None,
    ) -> tuple[jax.Array, eqx.nn.State]:
        """Normalizes a whole batch, in training mode by its own moments, without `jax.vmap`.

        Args:
          x: a batch, shape `[N, C, *spatial]`, or any layout with the channels at `axis`; float16,
            bfloat16, float32 or float64.
          state: holds the running statistics.
          axis: channel axis of `x`; all other axes are reduced.
          axis_name: name of a mapped axis of `jax.vmap`, `jax.pmap` or `jax.shard_map`, or a tuple
            of names. In training mode, the batch then extends over all devices along it. The
            `axis_name` of the layer is for single samples, and is not used here.
          inference: whether to normalize by the running statistics; None for the `inference` of the
            layer.
          mask: True, or 1, where a value counts; broadcasts against the whole `x`. With `x` of
            shape `[N, C]`, one value per sample has shape `[N, 1]`. Masked entries, even NaN, never
            affect a result or a derivative; the output there is zero.
          residual: added before the activation; shape and dtype of `x`.

        Returns:
          `(y, state)`: `activation(normalized + residual)` in the shape and the dtype of `x`, and
            the state with the new running statistics.
        """
        options = {"axis": axis, "mask": mask, "residual": residual}
        return self._run(x, state, self._mode(inference), axis_name, options)

    def _mode(self, inference: Bool | None) -> Bool:
        inference = self.inference if inference is None else inference
        check_known_bool(inference, "inference")
        return inference

    def _run(
        self,
        x: ArrayLike,
        state: eqx.nn.State,
        inference: Bool,
        axis_name: AxisName,
        options: dict[str, Any],
    ) -> tuple[jax.Array, eqx.nn.State]:
        stats = self._stats(state)
        options |= {"epsilon": self.eps, "activation": self.activation}
        affine = self.weight, self.bias
        if inference:
            return normalize(x, stats.mean, stats.var, *affine, **options), state
        y, moments = batch_normalize(x, *affine, axis_name=axis_name, **options)
        return y, self._updated(state, stats, moments)

    @property
    def _indices(self) -> tuple[Any, Any]:
        """The indices of the counter, or of the flag, and of the averages."""
        if self.mode == "ema":
            return self.ema_first_time_index, self.ema_state_index
        return self.batch_counter, self.batch_state_index

    def _weights(self, stats: BatchStats) -> jax.Array:
        """The factor of the averages in the state."""
        if self.mode == "ema":
            return jnp.ones((), stats.mean.dtype)
        return sum_of_weights(stats, self.momentum)

    def _stats(self, state: eqx.nn.State) -> BatchStats:
        """The running statistics. In mode "ema", `count` is 0, and 1 after one or more batches."""
        counter, (mean, var) = (state.get(index) for index in self._indices)
        count = jnp.logical_not(counter).astype("int32") if self.mode == "ema" else counter
        stats = checked_stats(BatchStats(mean, var, count))
        weights = self._weights(stats)
        return stats._replace(mean=stats.mean / weights, var=stats.var / weights)

    def _updated(self, state: eqx.nn.State, stats: BatchStats, moments: Moments) -> eqx.nn.State:
        of_batch = 1 - self.momentum
        of_old = self.momentum * jnp.where(stats.count == 0, 0, self._weights(stats))
        new = update_batch_stats(
            stats,
            moments,
            momentum=of_batch / (of_batch + of_old),  # 1 for the first batch
            unbiased=False,
            skip_nonfinite=self.skip_nonfinite,
        )
        # A batch that is masked throughout does not count, so a later one is the first.
        counted = (new.count > stats.count) & (moments.count > 0).any()
        new = new._replace(count=jnp.where(counted, stats.count + 1, stats.count))
        weights = self._weights(new)
        counter, averages = self._indices
        state = state.set(counter, new.count == 0 if self.mode == "ema" else new.count)
        return state.set(averages, (new.mean * weights, new.var * weights))
