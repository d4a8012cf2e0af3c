"""`BatchNorm` with the constructor and the conventions of `flax.linen.BatchNorm`."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype
from flax.typing import Dtype, Initializer
from jax.typing import ArrayLike

from jaxbn._activation import Activation
from jaxbn._checks import checked_array
from jaxbn._core.devices import AxisIndexGroups, AxisName
from jaxbn._flax.features import feature_axes
from jaxbn._flax.layer import affine, check_channels, flax_layer
from jaxbn._renorm import Renorm
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


class BatchNorm(nn.Module):
    """Batch norm with the constructor, defaults and variables of `flax.linen.BatchNorm`.

        train      y = (x − E[x]) · scale / √(Var[x] + epsilon) + bias
                   mean' = momentum·mean + (1 − momentum)·E[x]
                   var'  = momentum·var  + (1 − momentum)·Var[x]
        inference  y = (x − mean) · scale / √(var + epsilon) + bias

    `momentum` is Flax's: the weight of the **old** statistics, 0.99 to keep 99 %.

    Variables: `params` holds `scale` and `bias`, `batch_stats` holds `mean` and `var`, all of shape
    `[C]`, as Flax names and stores them, so its checkpoints read unchanged. Initialization leaves
    the statistics at mean 0 and variance 1. Complex input has a complex mean and a real variance,
    `E[|x − E[x]|²]`.

    It differs from Flax where Flax's numbers are wrong: the variance does not cancel under a large
    mean, no gradient flows into the statistics, one value per channel in training is an error, an
    empty batch leaves the statistics as they were, masked entries put out zero, whatever stands
    there, and statistics keep their dtype, which is never narrower than float32.

    Attributes:
      use_running_average: whether to normalize by the running statistics (inference); given either
        here or in the call. In the call it may be a traced bool; `batch_stats` must then be
        mutable in inference too.
      axis: the channel axis of the input, or several: the variables then have a shape with as many
        dimensions.
      momentum: weight of the old running statistics, between 0 and 1.
      epsilon: added to the variance inside the square root.
      dtype: dtype of the output; None for the promotion of the input's and the parameters' dtypes.
        The computation is at least float32 in any case.
      param_dtype: dtype of `scale` and `bias`.
      use_bias: whether there is a `bias`.
      use_scale: whether there is a `scale`.
      bias_init: initializer of `bias`.
      scale_init: initializer of `scale`.
      axis_name: name of a mapped axis of devices, or a tuple of names, over which the batch extends
        in training. It need not be bound in initialization.
      axis_index_groups: groups of indices along the one axis, each a batch: `[[0, 1], [2, 3]]`.
      use_fast_variance: without effect, for either value: the variance is as fast and exact.
      force_float32_reductions: False stores the running statistics in `param_dtype` where that is
        float64; reductions are at least float32 in any case.
      activation: None, "relu", "leaky_relu", "silu" or "gelu" (those of `jax.nn`), or a function.
      skip_nonfinite: keep the statistics of a channel if the batch has NaN or infinity in it.
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
      TypeError: the input is bool, or complex where `dtype` is not; `axis` is not made of ints.
      ValueError: see `jaxbn.batch_norm`; `use_running_average` given twice or not at all.
      NotImplementedError: `axis_index_groups` is given for an axis of `jax.vmap`; an activation, a
        residual or groups for complex input.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxbn.linen import BatchNorm
      >>> layer = BatchNorm(momentum=0.75)
      >>> x = jnp.arange(8.0).reshape(4, 2)
      >>> variables = layer.init(jax.random.key(0), x, use_running_average=False)
      >>> y, updates = layer.apply(
      ...     variables, x, use_running_average=False, mutable=["batch_stats"]
      ... )
      >>> updates["batch_stats"]["mean"]
      Array([0.75, 1.  ], dtype=float32)

    References:
      `flax.linen.BatchNorm`.
    """

    use_running_average: Flag | None = None
    axis: Integer | Sequence[Integer] = -1
    momentum: Number = 0.99
    epsilon: Number = 1e-5
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = nn.initializers.zeros
    scale_init: Initializer = nn.initializers.ones
    axis_name: AxisName = None
    axis_index_groups: AxisIndexGroups = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    activation: str | Activation | None = None
    skip_nonfinite: Flag = False
    virtual_batch_size: Integer | None = None
    update_stats: Flag | None = None
    train_affine: bool = True
    frozen: bool = False
    renorm: Renorm | None = None
    num_domains: Integer | None = None
    shared_affine: bool = False
    keep_output: bool = False

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
          x: input, channels at `axis`.
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
        x = checked_array(x, "x")
        features = tuple(x.shape[axis] for axis in feature_axes(self.axis, x.shape))
        train, update = training_mode(self, use_running_average)
        running = running_statistics(
            self,
            features,
            jnp.float32 if self.force_float32_reductions else self.param_dtype,
            ("mean", "var"),
            train,
            update,
        )
        moments = moments_of(self)
        before = values(running, moments)
        check_channels(self, x.shape, before.running["mean"].shape[-len(features) :])
        own = scale_and_bias(self, features, self.use_scale, self.use_bias)
        scale, bias = affine(self, "scale", own[0], scale), affine(self, "bias", own[1], bias)
        with jax.numpy_dtype_promotion("standard"):  # by definition of `dtype=None`
            dtype = canonicalize_dtype(x, scale, bias, dtype=self.dtype)
        y, after = flax_layer(
            self,
            x,
            before,
            scale,
            bias,
            train,
            update,
            dtype=dtype,
            activation=activation(self, x.shape),
            mask=mask,
            residual=residual,
            domain=domain,
            initializing=self.is_initializing(),
        )
        store(moments, after.moments)
        if update is not False and not moments:
            store(running, after.running)
        return y
