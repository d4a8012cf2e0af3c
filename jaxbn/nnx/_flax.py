"""`BatchNorm` with the constructor and the conventions of `flax.nnx.BatchNorm`."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.typing import Dtype, Initializer, PromoteDtypeFn
from jax.typing import ArrayLike

from jaxbn._activation import Activation
from jaxbn._checks import checked_array
from jaxbn._core.devices import AxisIndexGroups, AxisName
from jaxbn._flax.layer import affine, affine_shape, check_channels, flax_layer
from jaxbn._renorm import Renorm
from jaxbn._stats import init_batch_stats
from jaxbn._types import Flag, Integer, Number
from jaxbn.nnx._variables import BatchNormLayer, parameter, value


class BatchNorm(BatchNormLayer):
    """Batch norm with the constructor, defaults and variables of `flax.nnx.BatchNorm`.

        train      y = (x − E[x]) · scale / √(Var[x] + epsilon) + bias
                   mean' = momentum·mean + (1 − momentum)·E[x]
                   var'  = momentum·var  + (1 − momentum)·Var[x]
        inference  y = (x − mean) · scale / √(var + epsilon) + bias

    `momentum` is Flax's: the weight of the **old** statistics. 0.99 keeps 99 %.

    Variables: `scale` and `bias` are `nnx.Param`, and `mean` and `var` are `nnx.BatchStat`, all of
    shape `[C]`. Names and formats are Flax's, so checkpoints of Flax load unchanged. A layer
    without `scale` or `bias` holds None instead.

    Results equal those of `jaxbn.linen.BatchNorm`, bit for bit. Its docstring lists the differences
    from Flax.

    Args:
      num_features: number of channels, C, or their product with several channel axes.
      use_running_average: whether to normalize by the running statistics (inference mode).
        `train()`, `eval()` and `nnx.view` set it. A value in the call takes precedence; it may be a
        traced bool.
      axis: channel axis of the input, or a sequence of channel axes.
      momentum: weight of the **old** running statistics, between 0 and 1.
      epsilon: added to the variance inside the square root.
      dtype: dtype of the output; None for the promoted dtype of the input, the parameters and the
        statistics. The computation is at least float32 in either case.
      param_dtype: dtype of `scale` and `bias`. The running statistics are float32.
      use_bias: whether there is a `bias`.
      use_scale: whether there is a `scale`.
      bias_init: initializer of `bias`.
      scale_init: initializer of `scale`.
      axis_name: name of a mapped axis of `jax.vmap`, `jax.pmap` or `jax.shard_map`, or a tuple of
        names. In training mode, the batch then extends over all devices along it.
      axis_index_groups: groups of indices along the one axis `axis_name`, such as
        `[[0, 1], [2, 3]]`. Each group is a batch of its own.
      use_fast_variance: has no effect: the variance is fast and exact in either case.
      promote_dtype: function of the tuple `(x, mean, var, scale, bias)` and a keyword `dtype` that
        returns these arrays. The output has the dtype of the returned `x`. A function of your own
        also replaces `x`, `scale` and `bias`, but not the statistics. By default, nothing is
        rounded before the computation.
      rngs: random numbers for the initializers.
      bias_metadata: metadata of the variable `bias`, such as `{"out_sharding": ("model",)}`.
      scale_metadata: metadata of the variable `scale`.
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
      ValueError: the input does not have `num_features` channels, or neither the layer nor the call
        chooses a mode; see also `jaxbn.batch_norm`.
      NotImplementedError: `axis_index_groups` is given for an axis of `jax.vmap`, or `axis_name` is
        an axis of `jax.vmap` inside `jax.shard_map` with `check_vma=True`; or complex input has an
        activation, a residual, `virtual_batch_size`, `renorm`, `domain`, `keep_output` or
        `update_stats`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxbn.nnx import BatchNorm
      >>> layer = BatchNorm(2, momentum=0.75, rngs=nnx.Rngs(0))
      >>> y = layer(jnp.arange(8.0).reshape(4, 2))
      >>> layer.mean[...]
      Array([0.75, 1.  ], dtype=float32)
      >>> layer.eval()
      >>> layer(jnp.ones((1, 2))).shape
      (1, 2)

    References:
      `flax.nnx.BatchNorm`.
    """

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: Flag | None = False,
        axis: Integer | Sequence[Integer] = -1,
        momentum: Number = 0.99,
        epsilon: Number = 1e-5,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = nnx.initializers.zeros,
        scale_init: Initializer = nnx.initializers.ones,
        axis_name: AxisName = None,
        axis_index_groups: AxisIndexGroups = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        activation: str | Activation | None = None,
        skip_nonfinite: Flag = False,
        virtual_batch_size: Integer | None = None,
        update_stats: Flag | None = None,
        train_affine: bool = True,
        frozen: bool = False,
        renorm: Renorm | None = None,
        num_domains: Integer | None = None,
        shared_affine: bool = False,
        keep_output: bool = False,
    ) -> None:
        stats = init_batch_stats(num_features, num_domains=num_domains)
        self.mean = nnx.BatchStat(stats.mean)
        self.var = nnx.BatchStat(stats.var)
        make, shape = (
            parameter,
            affine_shape(num_features, num_domains=num_domains, shared=shared_affine),
        )
        self.scale = make(use_scale, scale_init, shape, param_dtype, rngs, scale_metadata)
        self.bias = make(use_bias, bias_init, shape, param_dtype, rngs, bias_metadata)
        self.num_features = num_features
        self.use_running_average = use_running_average
        self.axis = axis
        self.momentum = momentum
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.axis_name = axis_name
        self.axis_index_groups = axis_index_groups
        self.use_fast_variance = use_fast_variance
        self.promote_dtype = promote_dtype
        self.activation = activation
        self.skip_nonfinite = skip_nonfinite
        self.virtual_batch_size = virtual_batch_size
        self.update_stats = update_stats
        self.train_affine = train_affine
        self.frozen = frozen
        self.renorm = renorm
        self.num_domains = num_domains
        self.shared_affine = shared_affine
        self.keep_output = keep_output
        self.moments = nnx.data(None)

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
          use_running_average: whether to normalize by the running statistics; None for the mode of
            the layer.
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
        check_channels(self, x.shape, (self.num_features,))
        train, update = self._modes(use_running_average)
        kept = self._kept(("mean", "var"))
        scale = affine(self, "scale", value(self.scale), scale)
        bias = affine(self, "bias", value(self.bias), bias)
        arrays = (x, kept.running["mean"], kept.running["var"], scale, bias)
        with jax.numpy_dtype_promotion("standard"):  # by definition of `dtype=None`
            promoted = self.promote_dtype(arrays, dtype=self.dtype)
        dtype = promoted[0].dtype
        if self.promote_dtype is not dtypes.promote_dtype:
            x, _, _, scale, bias = promoted
        y, new = flax_layer(
            self,
            x,
            kept,
            scale,
            bias,
            train,
            update,
            dtype=dtype,
            activation=self._activation(),
            mask=mask,
            residual=residual,
            domain=domain,
        )
        self._store(new, update is not False)
        return y
