"""`BatchNorm1d`, `BatchNorm2d` and `BatchNorm3d` with torch's constructors and conventions."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jax.typing import ArrayLike

from jaxbn._activation import Activation
from jaxbn._checks import checked_float, statistics_dtype
from jaxbn._core.devices import AxisIndexGroups, AxisName
from jaxbn._flax.layer import affine, affine_shape, check_channels, check_layout, torch_layer
from jaxbn._renorm import Renorm
from jaxbn._stats import BatchStats, init_batch_stats
from jaxbn._types import Flag, Integer, Number
from jaxbn.nnx._variables import BatchNormLayer, parameter, value


class _TorchBatchNorm(BatchNormLayer):
    """The base of `BatchNorm1d`, `BatchNorm2d` and `BatchNorm3d`, which differ in their layouts."""

    layouts: ClassVar[tuple[str, ...]] = ()  # without C, which is at `axis`

    def __init__(
        self,
        num_features: int,
        eps: Number = 1e-5,
        momentum: Number | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        bias: bool = True,
        axis: Integer = 1,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        scale_init: Initializer = nnx.initializers.ones,
        bias_init: Initializer = nnx.initializers.zeros,
        axis_name: AxisName = None,
        use_running_average: Flag | None = False,
        activation: str | Activation | None = None,
        skip_nonfinite: Flag = False,
        axis_index_groups: AxisIndexGroups = None,
        virtual_batch_size: Integer | None = None,
        update_stats: Flag | None = None,
        train_affine: bool = True,
        frozen: bool = False,
        renorm: Renorm | None = None,
        num_domains: Integer | None = None,
        shared_affine: bool = False,
        keep_output: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        shape = affine_shape(num_features, num_domains=num_domains, shared=shared_affine)
        self.scale = parameter(affine, scale_init, shape, param_dtype, rngs, {})
        self.bias = parameter(affine and bias, bias_init, shape, param_dtype, rngs, {})
        dtype_of_stats = statistics_dtype(param_dtype)
        stats = init_batch_stats(num_features, dtype_of_stats, num_domains=num_domains)
        for name, initial in stats._asdict().items():
            kept = nnx.BatchStat(initial) if track_running_stats else nnx.data(None)
            setattr(self, name, kept)
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.axis = axis
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.axis_name = axis_name
        self.use_running_average = use_running_average
        self.activation = activation
        self.skip_nonfinite = skip_nonfinite
        self.axis_index_groups = axis_index_groups
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
          x: input, with the channels at `axis`; float16, bfloat16, float32 or float64.
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
        x = checked_float(x, "x")
        check_layout(self, x.shape)
        check_channels(self, x.shape, (self.num_features,))
        train, update = self._modes(use_running_average)
        y, new = torch_layer(
            self,
            x,
            self._kept(BatchStats._fields),
            affine(self, "scale", value(self.scale), scale),
            affine(self, "bias", value(self.bias), bias),
            train,
            update,
            activation=self._activation(),
            mask=mask,
            residual=residual,
            domain=domain,
        )
        self._store(new, self.track_running_stats and update is not False)
        return y


class BatchNorm1d(_TorchBatchNorm):
    """Batch norm over `(N, C)` or `(N, C, L)`, with the constructor of `torch.nn.BatchNorm1d`.

        train      y = (x − E[x]) · scale / √(Var[x] + eps) + bias
                   mean' = (1 − momentum)·mean + momentum·E[x]
                   var'  = (1 − momentum)·var  + momentum·Var[x]·n/(n − 1)
        inference  y = (x − mean) · scale / √(var + eps) + bias

    `momentum` is torch's: the weight of the **new** batch. None keeps the cumulative average.
    `Var[x]` is biased: it is divided by n, the number of values per channel.

    Variables: `scale` and `bias` (torch `weight` and `bias`) are `nnx.Param`. `mean`, `var`
    (`running_mean`, `running_var`) and `count` (`num_batches_tracked`, int32) are `nnx.BatchStat`.
    A variable that a layer does not have is None. Results equal those of `jaxbn.linen.BatchNorm1d`,
    bit for bit.

    Args:
      num_features: number of channels, C.
      eps: added to the variance inside the square root.
      momentum: weight of the **new** batch, between 0 and 1; None for the cumulative average.
      affine: whether there are a `scale` and a `bias`.
      track_running_stats: whether the layer keeps running statistics. Without them, the batch
        normalizes itself in inference mode, too. If statistics are present anyway, they are used
        but not updated.
      bias: whether a layer with `affine` has a `bias`.
      axis: channel axis of the input: 1 as in torch, -1 for channels last.
      dtype: dtype of the output; None for the dtype of the input.
      param_dtype: dtype of `scale` and `bias`. The running statistics are float32, or float64 if
        `param_dtype` is.
      scale_init: initializer of `scale`.
      bias_init: initializer of `bias`.
      axis_name: name of a mapped axis of `jax.vmap`, `jax.pmap` or `jax.shard_map`, or a tuple of
        names. In training mode, the batch then extends over all devices along it.
      use_running_average: whether to normalize by the running statistics (inference mode, torch's
        `eval()`). `train()`, `eval()` and `nnx.view` set it. A value in the call takes precedence;
        it may be a traced bool.
      activation: None, "relu", "leaky_relu", "silu" or "gelu" (as in `jax.nn`), or a function that
        keeps the shape.
      skip_nonfinite: whether a channel keeps its running statistics if the batch has NaN or
        infinity in it; a bool, traced or not.
      axis_index_groups: groups of indices along the one axis `axis_name`, such as
        `[[0, 1], [2, 3]]`. Each group is a batch of its own.
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
      rngs: random numbers for the initializers.

    Raises:
      TypeError: the input is not real floating point.
      ValueError: the input has another number of dimensions or channels, there is one value per
        channel in training mode, or neither the layer nor the call chooses a mode; see also
        `jaxbn.batch_norm`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxbn.nnx import BatchNorm1d
      >>> layer = BatchNorm1d(5, momentum=0.5, rngs=nnx.Rngs(0))
      >>> y = layer(jnp.arange(15.0).reshape(3, 5))
      >>> layer.mean[...], int(layer.count[...])
      (Array([2.5, 3. , 3.5, 4. , 4.5], dtype=float32), 1)

    References:
      `torch.nn.BatchNorm1d`.
    """

    layouts: ClassVar[tuple[str, ...]] = ("N", "NL")


class BatchNorm2d(_TorchBatchNorm):
    """Batch norm over `(N, C, H, W)`, with the constructor of `torch.nn.BatchNorm2d`.

    Arguments, formulas and variables are those of `BatchNorm1d`; its entry explains
    them. With `axis=-1`, the layout is `(N, H, W, C)`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxbn.nnx import BatchNorm2d
      >>> layer = BatchNorm2d(3, axis=-1, activation="relu", rngs=nnx.Rngs(0))
      >>> layer(jnp.arange(96.0).reshape(2, 4, 4, 3)).shape
      (2, 4, 4, 3)

    References:
      `torch.nn.BatchNorm2d`.
    """

    layouts: ClassVar[tuple[str, ...]] = ("NHW",)


class BatchNorm3d(_TorchBatchNorm):
    """Batch norm over `(N, C, D, H, W)`, with the constructor of `torch.nn.BatchNorm3d`.

    Arguments, formulas and variables are those of `BatchNorm1d`; its entry explains
    them. With `axis=-1`, the layout is `(N, D, H, W, C)`.

    Examples:
      >>> from flax import nnx
      >>> from jaxbn.nnx import BatchNorm3d
      >>> layer = BatchNorm3d(2, affine=False, rngs=nnx.Rngs(0))
      >>> layer.scale is None, layer.var[...]
      (True, Array([1., 1.], dtype=float32))

    References:
      `torch.nn.BatchNorm3d`.
    """

    layouts: ClassVar[tuple[str, ...]] = ("NDHW",)
