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

    `momentum` is Flax's: the weight of the **old** statistics. 0.99 keeps 99 %.

    Variables: `params` holds `scale` and `bias`, and `batch_stats` holds `mean` and `var`, all of
    shape `[C]`. Names and formats are Flax's, so checkpoints of Flax load unchanged. Initialization
    leaves the running statistics at mean 0 and variance 1. Complex input has a complex mean and a
    real variance, `E[|x − E[x]|²]`.

    The layer differs from Flax's where Flax's numbers are wrong:

    - The variance stays exact if the mean is large.
    - No gradient flows into the running statistics.
    - One value per channel in training mode is an error.
    - An empty batch leaves the running statistics unchanged.
    - The output is zero where the input is masked.
    - The running statistics keep their dtype, which is at least float32.

    Args:
      use_running_average: whether to normalize by the running statistics (inference mode). Give it
        either here or in the call. In the call, it may be a traced bool; `batch_stats` must then be
        mutable in inference mode, too.
      axis: channel axis of the input, or a sequence of channel axes. With several, the variables
        have one dimension for each.
      momentum: weight of the **old** running statistics, between 0 and 1.
      epsilon: added to the variance inside the square root.
      dtype: dtype of the output; None for the promoted dtype of the input and the parameters. The
        computation is at least float32 in either case.
      param_dtype: dtype of `scale` and `bias`.
      use_bias: whether there is a `bias`.
      use_scale: whether there is a `scale`.
      bias_init: initializer of `bias`.
      scale_init: initializer of `scale`.
      axis_name: name of a mapped axis of `jax.vmap`, `jax.pmap` or `jax.shard_map`, or a tuple of
        names. In training mode, the batch then extends over all devices along it. It need not be
        bound in initialization.
      axis_index_groups: groups of indices along the one axis `axis_name`, such as
        `[[0, 1], [2, 3]]`. Each group is a batch of its own.
      use_fast_variance: has no effect: the variance is fast and exact in either case.
      force_float32_reductions: False stores the running statistics in `param_dtype` if that is
        float64. Reductions are at least float32 in either case.
      activation: None, "relu", "leaky_relu", "silu" or "gelu" (as in `jax.nn`), or a function that
        keeps the shape.
      skip_nonfinite: whether a channel keeps its running statistics if the batch has NaN or
        infinity in it; a bool, traced or not.
      virtual_batch_size: number of consecutive samples that are normalized together in training
        mode, on each device: ghost batch norm. It must divide the number of samples. The merged
        moments go into the running statistics. None for the whole batch. See `jaxbn.batch_norm`.
      update_stats: whether the batch updates the running statistics; None means in training mode
        only.
      train_affine: whether gradients reach `scale` and `bias`.
      frozen: whether the layer normalizes by its running statistics and never updates them, in
        either mode.
      renorm: batch renormalization (`jaxbn.Renorm`), which corrects the batch toward the running
        statistics in training mode; None for batch norm.
      num_domains: number k of sets of running statistics; `domain` in the call selects one. None
        for one set.
      shared_affine: whether all domains share `scale` and `bias`. By default, each domain has its
        own.
      keep_output: whether training mode keeps the output instead of the input for the backward
        pass; see `jaxbn.batch_normalize`.

    Raises:
      TypeError: the input is bool, or is complex and `dtype` is not, or `axis` is not made of ints.
      ValueError: `use_running_average` is given twice or not at all, or the input has other
        channels than the variables; see also `jaxbn.batch_norm`.
      NotImplementedError: `axis_index_groups` is given for an axis of `jax.vmap`, or `axis_name` is
        an axis of `jax.vmap` inside `jax.shard_map` with `check_vma=True`; or complex input has an
        activation, a residual, `virtual_batch_size`, `renorm`, `domain`, `keep_output` or
        `update_stats`.

    Examples:
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
        """Normalizes `x`, in training mode by its own moments, and updates the running statistics.

        Args:
          x: input, with the channels at `axis`; floating point, complex or integer.
          use_running_average: whether to normalize by the running statistics; give it either here
            or in the constructor.
          mask: True, or 1, where a value counts; broadcasts against `x`. Masked entries, even NaN,
            never affect a result or a derivative; the output there is zero.
          residual: added before the activation; shape of `x`, dtype of the output.
          scale: γ for this call, shape `[C]` or `[N, C]`, if the layer has no `scale` of its own:
            conditional batch norm.
          bias: β for this call, shape `[C]` or `[N, C]`, if the layer has no `bias` of its own.
          domain: which set of running statistics to use, for a layer with `num_domains`: an integer
            for the batch, or one for each sample, shape `[N]`; traced or not.

        Returns:
          `activation(normalized + residual)`, in the shape of `x`.
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
