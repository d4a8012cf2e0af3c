"""The referee: batch norm in float64 NumPy, written from the definition, and the tolerances."""

from types import SimpleNamespace

import numpy as np

EPSILON = 1e-5


def per_channel(vector, ndim, axis):
    """`vector`, shape `[C]`, broadcastable along `axis`."""
    return np.reshape(vector, [-1 if i == axis % ndim else 1 for i in range(ndim)])


def channel_moments(x, axis):
    """Mean and biased variance per channel, and the number of values that each is taken of."""
    rows = np.moveaxis(np.asarray(x, np.float64), axis, -1).reshape(-1, x.shape[axis])
    return rows.mean(0), rows.var(0), len(rows)


def normalized(x, mean, var, scale, bias, axis, epsilon=EPSILON):
    """`(x − mean) · scale / √(var + epsilon) + bias`."""
    mean, var, scale, bias = (per_channel(v, x.ndim, axis) for v in (mean, var, scale, bias))
    return (np.asarray(x, np.float64) - mean) / np.sqrt(var + epsilon) * scale + bias


def train(x, scale, bias, dy, axis, epsilon=EPSILON):
    """Output and moments in training mode, and the gradients of `sum(dy · y)`."""
    x, scale, bias, dy = (np.asarray(v, np.float64) for v in (x, scale, bias, dy))
    mean, var, n = channel_moments(x, axis)
    ones, zeros = np.ones_like(mean), np.zeros_like(mean)
    centered = normalized(x, mean, var, ones, zeros, axis, epsilon)
    others = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    dbias, dscale = dy.sum(others), (dy * centered).sum(others)
    inner = per_channel(dbias / n, x.ndim, axis) + centered * per_channel(dscale / n, x.ndim, axis)
    dx = per_channel(scale / np.sqrt(var + epsilon), x.ndim, axis) * (dy - inner)
    y = normalized(x, mean, var, scale, bias, axis, epsilon)
    return SimpleNamespace(y=y, mean=mean, var=var, count=n, dx=dx, dscale=dscale, dbias=dbias)


def masked_train(x, scale, bias, dy, axis, mask, epsilon=EPSILON):
    """`train` of what the mask leaves, channel by channel; zeros where there is nothing."""
    mask, channels = np.broadcast_to(mask, x.shape), x.shape[axis]
    y, dx = np.zeros(x.shape), np.zeros(x.shape)
    vectors = {name: np.zeros(channels) for name in ("mean", "var", "count", "dscale", "dbias")}
    for c in range(channels):
        channel = tuple(c if i == axis % x.ndim else slice(None) for i in range(x.ndim))
        keep = mask[channel]
        if keep.any():
            rows, cotangents = x[channel][keep][:, None], dy[channel][keep][:, None]
            one = train(rows, scale[[c]], bias[[c]], cotangents, 1, epsilon)
            y[channel][keep], dx[channel][keep] = one.y[:, 0], one.dx[:, 0]
            for name, vector in vectors.items():
                vector[c] = np.ravel(getattr(one, name))[0]
    return SimpleNamespace(y=y, dx=dx, **vectors)


def evaluate(x, mean, var, scale, bias, dy, axis, epsilon=EPSILON):
    """Output in inference mode, and the gradients of `sum(dy · y)`."""
    x, mean, var, scale, bias, dy = (
        np.asarray(v, np.float64) for v in (x, mean, var, scale, bias, dy)
    )
    ones, zeros = np.ones_like(mean), np.zeros_like(mean)
    centered = normalized(x, mean, var, ones, zeros, axis, epsilon)
    others = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    dx = dy * per_channel(scale / np.sqrt(var + epsilon), x.ndim, axis)
    y = normalized(x, mean, var, scale, bias, axis, epsilon)
    return SimpleNamespace(y=y, dx=dx, dscale=(dy * centered).sum(others), dbias=dy.sum(others))


def running(old_mean, old_var, mean, var, count, momentum, unbiased=True):
    """Running statistics after one batch; `momentum` is the weight of the batch."""
    bessel = count / (count - 1) if unbiased else 1.0
    return (
        (1 - momentum) * old_mean + momentum * mean,
        (1 - momentum) * old_var + momentum * var * bessel,
    )


def error(actual, expected):
    """Largest difference over the largest expected magnitude, in float64."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    return np.abs(actual - expected).max() / np.abs(expected).max()


def tolerance(dtype, count=1):
    """Allowed `error` of a quantity that is reduced over `count` values and rounded to `dtype`.

    Half a unit of rounding for the result, and a few units of float32 (or float64) for a
    computation whose rounding errors grow with the logarithm of the number of terms. In float64
    the referee rounds as much as what it judges, and sums less carefully.
    """
    unit = {"float64": 2.0**-50}.get(str(np.dtype(dtype)), 2.0**-23)
    result = {"bfloat16": 2.0**-8, "float16": 2.0**-11}.get(str(np.dtype(dtype)), 0.0)
    return result + unit * (4 + np.log2(count))


def sample(shape, seed, mean=3.0, std=2.0, dtype=np.float64):
    """Normal numbers of a stream that NumPy keeps frozen."""
    return (np.random.RandomState(seed).standard_normal(shape) * std + mean).astype(dtype)


def problem(shape, axis, seed=0, dtype=np.float32, mean=3.0, std=2.0):
    """`(x, scale, bias, dy)` with nothing at 0 or 1."""
    features = shape[axis]
    return (
        sample(shape, seed, mean, std, dtype),
        sample(features, seed + 1, 1.0, 0.5, dtype),
        sample(features, seed + 2, -0.5, 1.0, dtype),
        sample(shape, seed + 3, 0.3, 1.0, dtype),
    )
