"""`BatchNorm1d`, `BatchNorm2d` and `BatchNorm3d` with torch's constructors and conventions."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer
from jax.typing import ArrayLike

from jaxbn._activation import Activation
from jaxbn._checks import checked_float
from jaxbn._core.devices import AxisIndexGroups, AxisName
from jaxbn._flax.layer import affine, check_channels, check_layout, torch_layer
from jaxbn._renorm import Renorm
from jaxbn._stats import BatchStats
from jaxbn._types import Flag, Integer, Number
from jaxbn.linen._variables import (
    activation,
    moments_of,
    running_statistics,
    scale_and_bias,
    store,
    training_mode,
    values,
)


class _TorchBatchNorm(nn.Module):
    """What `BatchNorm1d`, `BatchNorm2d` and `BatchNorm3d` share: all but the layouts they take."""

    num_features: int
    eps: Number = 1e-5
    momentum: Number | None = 0.1
    affine: bool = True
    track_running_stats: bool = True
    bias: bool = True
    axis: Integer = 1
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    scale_init: Initializer = nn.initializers.ones
    bias_init: Initializer = nn.initializers.zeros
    axis_name: AxisName = None
    use_running_average: Flag | None = None
    activation: str | Activation | None = None
    skip_nonfinite: Flag = False
    axis_index_groups: AxisIndexGroups = None
    virtual_batch_size: Integer | None = None
    update_stats: Flag | None = None
    train_affine: bool = True
    frozen: bool = False
    renorm: Renorm | None = None
    num_domains: Integer | None = None
    shared_affine: bool = False
    keep_output: bool = False

    layouts: ClassVar[tuple[str, ...]] = ()  # without the C, whose place is `axis`

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        use_running_average: Flag | None = None,
        *,
        mask: ArrayLike | None = None,
        residual: ArrayLike | None = None,
        scale: ArrayLike | None = None,
        bias: ArrayLike | None = None,
        domain: ArrayLike | None = None,
    ) -> jax.Array:
        """Normalizes `x`, in training mode by its own statistics, which it then folds in.

        Args:
          x: input, channels at `axis`; float16, bfloat16, float32 or float64.
          use_running_average: see the attribute of this name.
          mask: True, or 1, where a value counts; broadcasts against `x`. Masked entries, even
            NaN, never affect a result or a derivative; the output there is zero.
          residual: added before the activation; in the shape of `x` and the dtype of the output.
          scale: γ of this call, shape `[C]` or `[N, C]`, for a layer without one of its own:
            conditional batch norm.
          bias: β of this call, likewise.
          domain: which set of statistics, for a layer with `num_domains`: an integer, or one for
            each sample; traced or not.

        Returns:
          `activation(normalized + residual)`, of the shape of `x`.
        """
        x = checked_float(x, "x")
        check_layout(self, x.shape)
        features = (self.num_features,)
        check_channels(self, x.shape, features)
        train, update = training_mode(self, use_running_average)
        running = {}
        if self.track_running_stats or self.has_variable("batch_stats", "mean"):
            running = running_statistics(
                self, features, self.param_dtype, BatchStats._fields, train, update
            )
        moments = moments_of(self)
        own = scale_and_bias(self, features, self.affine, self.affine and self.bias)
        scale, bias = affine(self, "scale", own[0], scale), affine(self, "bias", own[1], bias)
        y, after = torch_layer(
            self,
            x,
            values(running, moments),
            scale,
            bias,
            train,
            update,
            activation=activation(self, x.shape),
            mask=mask,
            residual=residual,
            domain=domain,
            initializing=self.is_initializing(),
        )
        store(moments, after.moments)
        if self.track_running_stats and update is not False and not moments:
            store(running, after.running)
        return y


class BatchNorm1d(_TorchBatchNorm):
    """Batch norm over `(N, C)` or `(N, C, L)`, with `torch.nn.BatchNorm1d`'s constructor.

        train      y = (x − E[x]) · scale / √(Var[x] + eps) + bias
                   mean' = (1 − momentum)·mean + momentum·E[x]
                   var'  = (1 − momentum)·var  + momentum·Var[x]·n/(n − 1)
        inference  y = (x − mean) · scale / √(var + eps) + bias

    `momentum` is torch's: the weight of the **new** batch; None keeps the cumulative average.
    `Var[x]` is biased, divided by n, the number of values per channel.

    Variables: `params` holds `scale` and `bias` (torch `weight` and `bias`), `batch_stats` holds
    `mean`, `var` (`running_mean`, `running_var`) and `count` (`num_batches_tracked`, int32).
    Initialization does not count as a batch.

    Attributes:
      num_features: the number of channels, C.
      eps: added to the variance inside the square root.
      momentum: weight of the new batch in the running statistics, between 0 and 1, or None.
      affine: whether there are a `scale` and a `bias`.
      track_running_stats: whether running statistics are kept. Without them the batch normalizes
        itself in inference too; statistics that are there all the same are used, and not updated.
      bias: whether an affine layer has a `bias`.
      axis: the channel axis of the input: 1 as in torch, -1 for channels last.
      dtype: dtype of the output; None for the dtype of the input.
      param_dtype: dtype of `scale` and `bias`; the statistics are float32, or float64 where it is.
      scale_init: initializer of `scale`.
      bias_init: initializer of `bias`.
      axis_name: name of a mapped axis of devices, or a tuple of names, over which the batch extends
        in training. It need not be bound in initialization.
      use_running_average: whether to normalize by the running statistics (torch `eval()`); given
        either here or in the call. In the call it may be a traced bool; `batch_stats` must then be
        mutable in inference too.
      activation: None, "relu", "leaky_relu", "silu" or "gelu" (those of `jax.nn`), or a function.
      skip_nonfinite: keep the statistics of a channel if the batch has NaN or infinity in it.
      axis_index_groups: groups of indices along the one axis, each a batch: `[[0, 1], [2, 3]]`.
      virtual_batch_size: splits the samples of a training batch into groups of so many neighbours,
        each normalized by itself: ghost batch norm. The running statistics take the merged moments.
      update_stats: whether a batch goes into the running statistics; None for training mode alone.
      train_affine: False stops the gradients of `scale` and `bias`.
      frozen: whether to normalize by the running statistics and leave them, in every mode.
      renorm: corrects batches towards the running statistics in training: `jaxbn.Renorm`.
      num_domains: k for so many sets of statistics, `[k, C]`, for `domain` of the call.
      shared_affine: whether domains share `scale` and `bias`; by default each has its own.
      keep_output: whether training keeps the output for the backward pass in place of the input,
        for the activations None and "leaky_relu"; see `jaxbn.batch_normalize`.

    Raises:
      TypeError: the input is not real floating point.
      ValueError: the input has another number of dimensions or channels, one value per channel in
        training; `use_running_average` given twice or not at all; see `jaxbn.batch_norm`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxbn.linen import BatchNorm1d
      >>> layer = BatchNorm1d(5, momentum=0.5)
      >>> x = jnp.arange(15.0).reshape(3, 5)
      >>> variables = layer.init(jax.random.key(0), x, use_running_average=False)
      >>> y, updates = layer.apply(
      ...     variables, x, use_running_average=False, mutable=["batch_stats"]
      ... )
      >>> updates["batch_stats"]["mean"], int(updates["batch_stats"]["count"])
      (Array([2.5, 3. , 3.5, 4. , 4.5], dtype=float32), 1)

    References:
      `torch.nn.BatchNorm1d`.
    """

    layouts: ClassVar[tuple[str, ...]] = ("N", "NL")


class BatchNorm2d(_TorchBatchNorm):
    """Batch norm over `(N, C, H, W)`, with `torch.nn.BatchNorm2d`'s constructor.

    All else is as in `BatchNorm1d`; with `axis=-1` the layout is `(N, H, W, C)`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxbn.linen import BatchNorm2d
      >>> layer = BatchNorm2d(3, axis=-1)
      >>> x = jax.random.normal(jax.random.key(1), (8, 4, 4, 3))
      >>> variables = layer.init(jax.random.key(0), x, use_running_average=True)
      >>> layer.apply(variables, x, use_running_average=True).shape
      (8, 4, 4, 3)

    References:
      `torch.nn.BatchNorm2d`.
    """

    layouts: ClassVar[tuple[str, ...]] = ("NHW",)


class BatchNorm3d(_TorchBatchNorm):
    """Batch norm over `(N, C, D, H, W)`, with `torch.nn.BatchNorm3d`'s constructor.

    All else is as in `BatchNorm1d`; with `axis=-1` the layout is `(N, D, H, W, C)`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxbn.linen import BatchNorm3d
      >>> layer = BatchNorm3d(2, affine=False)
      >>> x = jax.random.normal(jax.random.key(1), (4, 2, 3, 3, 3))
      >>> sorted(layer.init(jax.random.key(0), x, use_running_average=True))
      ['batch_stats']

    References:
      `torch.nn.BatchNorm3d`.
    """

    layouts: ClassVar[tuple[str, ...]] = ("NDHW",)
