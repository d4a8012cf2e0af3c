"""Folding of a batch norm into the linear layer before or after it, for inference."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbn._checks import check_known_bool, checked_float, statistics_dtype
from jaxbn._core.axes import total
from jaxbn._folding.kernels import (
    LinearLayer,
    Padding,
    check_padding,
    checked_channels,
    checked_layer,
)
from jaxbn._normalize import normalize
from jaxbn._types import Bool, Integer, Number


def fold_into_conv(
    kernel: ArrayLike,
    kernel_bias: ArrayLike | None,
    mean: ArrayLike,
    var: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    epsilon: Number = 1e-5,
    layout: str = "HWIO",
    feature_group_count: Integer = 1,
    transposed: Bool = False,
    before: Bool = False,
    padding: Padding | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Folds a batch norm into a convolution, and returns the new kernel and bias.

    With `k = scale / √(var + epsilon)`, output channels o and input channels i, for a batch norm
    after or before the convolution:

        after   kernel' = kernel·k[o]    bias' = (kernel_bias − mean)·k + bias
        before  kernel' = kernel·k[i]    bias' = kernel_bias + Σ kernel·(bias − mean·k)[i]

    The sum runs over all positions and inputs of the kernel. For `before`, it is exact only where
    the whole kernel covers normalized values. Zeros between the two layers break this: padding,
    `input_dilation`, or the stride of a transposed convolution. Strides and kernel dilation do not
    matter.

    Args:
      kernel: kernel of the convolution, with the axes of `layout`; float16, bfloat16, float32 or
        float64.
      kernel_bias: bias of the convolution itself, shape `[outputs]`; None means 0.
      mean: running mean, shape `[C]`: one number for each output channel, or for each input channel
        with `before`.
      var: running variance, shape `[C]`.
      scale: γ, shape `[C]`; None means 1.
      bias: β, shape `[C]`; None means 0.
      epsilon: added to the variance inside the square root; a non-negative Python number.
      layout: a letter for each axis of the kernel: I for inputs, O for outputs, and D, H or W for
        each spatial axis. "HWIO" for `flax.linen.Conv` and `ConvTranspose` ("HWOI" with
        `transpose_kernel`), "OIHW" for `torch.nn.Conv2d`, "IOHW" for `torch.nn.ConvTranspose2d`.
      feature_group_count: number of groups of channels. The axis I then has the inputs of one
        group, and O has all outputs. In a depthwise convolution, I is 1.
      transposed: whether the groups lie along I, and O has the outputs of one group, as in
        `torch.nn.ConvTranspose2d`.
      before: whether the batch norm comes before the convolution, with nothing in between.
      padding: padding of the convolution, in the forms of `flax.linen.Conv`. Required for `before`
        if the kernel has more than one position: "VALID", pads of 0, "CIRCULAR" or "REFLECT".
        Without it, a kernel of one position is assumed to have no padding.

    Returns:
      `(kernel, bias)`, computed in at least float32 and rounded once. The kernel has the dtype of
        `kernel`. The bias has shape `[outputs]` and the dtype of `kernel_bias`, or of `kernel` if
        that is None.

    Raises:
      TypeError: an array is not real floating point, or a flag is not a bool.
      ValueError: `layout` does not fit the kernel, a vector does not fit the channels, the groups
        do not divide them, `epsilon` or a variance is negative (if it is traced, the results are
        NaN), the result would not be exact for `before`, or `padding` is given but has no effect.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxbn
      >>> kernel = jax.random.normal(jax.random.key(0), (3, 3, 2, 4))
      >>> mean, var, x = jnp.arange(4.0), 1 + jnp.arange(4.0), jnp.ones((1, 8, 8, 2))
      >>> def conv(kernel):
      ...     layouts = ("NHWC", "HWIO", "NHWC")
      ...     return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", None, None, layouts)
      >>> folded, bias = jaxbn.fold_into_conv(kernel, None, mean, var)
      >>> y = jaxbn.normalize(conv(kernel), mean, var)
      >>> bool(jnp.allclose(conv(folded) + bias.reshape(1, 1, 1, -1), y, atol=1e-5))
      True

    References:
      Jacob et al., "Quantization and Training of Neural Networks for Efficient
      Integer-Arithmetic-Only Inference", 2018, section 3.2, https://arxiv.org/abs/1712.05877;
      `torch.nn.utils.fusion.fuse_conv_bn_eval`.
    """
    kernel = checked_float(kernel, "kernel")
    check_known_bool(before, "before")
    layer = checked_layer(kernel.shape, layout, "DHW", feature_group_count, transposed)
    check_padding(padding, layer, before)
    return _fold(kernel, kernel_bias, mean, var, scale, bias, epsilon, layer, before)


def fold_into_dense(
    kernel: ArrayLike,
    kernel_bias: ArrayLike | None,
    mean: ArrayLike,
    var: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    epsilon: Number = 1e-5,
    layout: str = "IO",
    before: Bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Folds a batch norm into a dense layer, and returns the new kernel and bias.

    With `k = scale / √(var + epsilon)`, outputs o and inputs i, for a batch norm after or before
    the dense layer:

        after   kernel' = kernel·k[o]    bias' = (kernel_bias − mean)·k + bias
        before  kernel' = kernel·k[i]    bias' = kernel_bias + Σ kernel·(bias − mean·k)[i]

    Args:
      kernel: kernel of the dense layer, shape `[I, O]`; float16, bfloat16, float32 or float64.
      kernel_bias: bias of the dense layer itself, shape `[O]`; None means 0.
      mean: running mean, shape `[O]`, or `[I]` with `before`.
      var: running variance, in the shape of `mean`.
      scale: γ, in the shape of `mean`; None means 1.
      bias: β, in the shape of `mean`; None means 0.
      epsilon: added to the variance inside the square root; a non-negative Python number.
      layout: "IO" for `flax.linen.Dense`, "OI" for `torch.nn.Linear`, with shape `[O, I]`.
      before: whether the batch norm comes before the dense layer, with nothing in between.

    Returns:
      `(kernel, bias)`, as `fold_into_conv` returns them.

    Raises:
      TypeError: an array is not real floating point, or `before` is not a bool.
      ValueError: `layout` does not fit the kernel, a vector does not fit the channels, or `epsilon`
        or a variance is negative (if it is traced, the results are NaN).

    Examples:
      >>> import jax.numpy as jnp, jaxbn
      >>> kernel, mean, var = jnp.array([[1.0, 2.0]]), jnp.array([3.0, 4.0]), jnp.array([4.0, 1.0])
      >>> jaxbn.fold_into_dense(kernel, None, mean, var, epsilon=0.0)
      (Array([[0.5, 2. ]], dtype=float32), Array([-1.5, -4. ], dtype=float32))

    References:
      `torch.nn.utils.fusion.fuse_linear_bn_eval`.
    """
    kernel = checked_float(kernel, "kernel")
    check_known_bool(before, "before")
    layer = checked_layer(kernel.shape, layout, "")
    return _fold(kernel, kernel_bias, mean, var, scale, bias, epsilon, layer, before)


def _fold(
    kernel: jax.Array,
    kernel_bias: ArrayLike | None,
    mean: ArrayLike,
    var: ArrayLike,
    scale: ArrayLike | None,
    bias: ArrayLike | None,
    epsilon: Number,
    layer: LinearLayer,
    before: Bool,
) -> tuple[jax.Array, jax.Array]:
    mean, var = (checked_channels(v, n, layer, before) for n, v in (("mean", mean), ("var", var)))
    scale, bias = (
        None if v is None else checked_channels(v, n, layer, before)
        for n, v in (("scale", scale), ("bias", bias))
    )
    outputs = layer.channels[1]
    if kernel_bias is None:
        kernel_bias = jnp.zeros(outputs, kernel.dtype)
    kernel_bias = checked_channels(kernel_bias, "kernel_bias", layer, before=False)
    _check_variance(var)
    wide = statistics_dtype(kernel.dtype, kernel_bias.dtype, mean.dtype, var.dtype)
    zeros = jnp.zeros(mean.shape, wide)
    # The slope of batch norm is its output for 1 at mean 0.
    slope = normalize(zeros + 1, zeros, var, scale, epsilon=epsilon).reshape(layer.groups, -1)
    normalized = functools.partial(
        normalize, mean=mean, var=var, scale=scale, bias=bias, epsilon=epsilon
    )
    parts, offset = layer.split(kernel.astype(wide)), kernel_bias.astype(wide)
    spatial = tuple(range(parts.ndim - 3))
    if before:
        constant = normalized(zeros).reshape(layer.groups, -1)
        constant, slope = (jnp.expand_dims(v, (*spatial, -1)) for v in (constant, slope))
        shares = jnp.moveaxis(parts * constant, -2, 0).reshape(-1, outputs)
        parts, offset = parts * slope, offset + total(shares, axis=1)
    else:
        parts, offset = parts * jnp.expand_dims(slope, (*spatial, -2)), normalized(offset)
    return layer.joined(parts).astype(kernel.dtype), offset.astype(kernel_bias.dtype)


def _check_variance(var: jax.Array) -> None:
    """Refuses a known negative variance. A traced one gives NaN."""
    if isinstance(var, jax.core.Tracer):
        return
    with jax.ensure_compile_time_eval():  # also for constants under `jax.jit`
        negative = int((var < 0).sum())
    if negative:
        raise ValueError(
            f"`var` must not be negative; got {negative} of {var.size} values that are. The "
            "running variance of a batch norm never is: check where it was read from."
        )
