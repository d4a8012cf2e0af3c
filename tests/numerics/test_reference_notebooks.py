"""Every number that the reference notebooks print, at print precision.

Inputs that a notebook does not print are completed so that the printed moments hold.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from jaxbn import linen

PRINTED = {"rtol": 0, "atol": 1.01e-4}  # four decimals on both sides: inputs and outputs rounded


def train(x, scale=None, momentum=0.1, axis=1):
    """One step from fresh statistics, through the functions."""
    x = jnp.asarray(x)
    stats = jaxbn.init_batch_stats(x.shape[axis], x.dtype)
    return jaxbn.batch_norm(x, stats, scale, train=True, momentum=momentum, axis=axis)


def train_layer(layer, x, variables=None):
    """One step through a Linen module: output, variables before and after."""
    variables = variables or layer.init(jax.random.key(0), x, use_running_average=False)
    y, updates = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
    return y, variables, {**variables, **updates}


def with_moments(known, size, mean, var):
    """`known` and further values, `size` in all, of exactly this mean and biased variance."""
    rest = size - known.size
    total, squares = mean * size - known.sum(), (var + mean**2) * size - (known**2).sum()
    center = total / rest
    spread = np.sqrt(squares / rest - center**2)
    signs = np.resize([1.0, -1.0], rest)
    if rest % 2:
        signs[-1] = 0.0
    return np.concatenate([known, center + spread * signs * np.sqrt(rest / (rest - rest % 2))])


# 000_3fb11072fcc1fb50: the three input layouts

X_1D = [
    [-0.7035, -1.0251, 0.1915, 0.3051, -1.1906],
    [-1.0093, 0.1770, -0.4498, -0.7264, -0.6747],
    [0.2758, -1.6039, 1.9133, 3.1144, -0.9229],
    [-1.2051, 1.2022, -0.4152, 1.8852, -1.4377],
]
Y_1D = [
    [-0.0755, -0.6568, -0.1233, -0.5714, -0.4691],
    [-0.6125, 0.4511, -0.7913, -1.2735, 1.3353],
    [1.6445, -1.1902, 1.6698, 1.3408, 0.4672],
    [-0.9564, 1.3959, -0.7552, 0.5041, -1.3334],
]
X_2D = [
    [
        [[-1.9415, 1.0114], [0.5231, 1.6091]],
        [[0.3676, 1.7730], [-0.3558, 0.7318]],
        [[-0.5402, 0.4773], [0.6035, -1.9266]],
    ],
    [
        [[2.7025, -1.8741], [-1.3372, -0.7653]],
        [[-1.9585, -2.9105], [-0.5275, -0.1459]],
        [[1.0650, 0.7406], [2.0530, 0.4535]],
    ],
]
Y_2D = [
    [
        [[-1.1972, 0.6322], [0.3296, 1.0024]],
        [[0.5375, 1.5504], [0.0162, 0.8000]],
        [[-0.8258, 0.1016], [0.2167, -2.0895]],
    ],
    [
        [[1.6798, -1.1554], [-0.8229, -0.4686]],
        [[-1.1389, -1.8250], [-0.1075, 0.1674]],
        [[0.6374, 0.3417], [1.5379, 0.0800]],
    ],
]
X_3D = [
    [[0.0117, -1.0647], [-0.3778, -0.2873], [0.3219, -0.3013]],
    [[-0.0512, -1.4496], [-0.4920, 0.7124], [2.3050, -0.5957]],
]
Y_3D = [
    [[1.0257, -0.6724], [-0.5544, -0.3661], [-0.0978, -0.6490]],
    [[0.9264, -1.2796], [-0.7917, 1.7122], [1.6560, -0.9093]],
]
LAYOUTS = {
    "(4, 5)": (linen.BatchNorm1d(5), X_1D, Y_1D, 1e-4),  # std prints 0.9999 in one channel
    "(2, 3, 2, 2)": (linen.BatchNorm2d(3), X_2D, Y_2D, 5e-5),
    "(2, 3, 2)": (linen.BatchNorm1d(3), X_3D, Y_3D, 5e-5),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_000_layouts(name):
    layer, x, expected, std_precision = LAYOUTS[name]
    x = jnp.asarray(x)
    y, _ = train(x)
    np.testing.assert_allclose(y, expected, **PRINTED)
    others = (0, *range(2, x.ndim))
    np.testing.assert_allclose(y.mean(others), 0, atol=2e-7)  # the notebook prints up to 1.8e-07
    np.testing.assert_allclose(y.std(others), 1, atol=std_precision)
    np.testing.assert_allclose(train_layer(layer, x)[0], expected, **PRINTED)


def test_000_initial_parameters():
    _, variables, _ = train_layer(linen.BatchNorm1d(5), jnp.asarray(X_1D))
    np.testing.assert_array_equal(variables["params"]["scale"], np.ones(5))
    np.testing.assert_array_equal(variables["params"]["bias"], np.zeros(5))


# 001_2a34cf0f5fef5370: the hand-written NumPy version and its running statistics

STATISTIC_MEAN = [0.014776679358404921, 0.05635309876238154]
STATISTIC_VAR = [0.93756777599325, 0.9465390281782048]
NORMALIZED = [-0.59243467, 0.93604603, 0.88346365, 0.35842368]
NORMALIZED += [0.8117685, -2.04183014, 0.51963757, -0.87507462]
STD, STD_UNBIASED = 0.9999971117586312, 1.069041879989797


def hand_written(x):
    """Momentum 0.1, biased variance to normalize, unbiased variance into the statistics."""
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
    y = (x - mean[:, None, None]) / np.sqrt(var[:, None, None] + 1e-5)
    return y, 0.9 * 0.0 + 0.1 * mean, 0.9 * 1.0 + 0.1 * x.var((0, 2, 3), ddof=1)


@pytest.mark.usefixtures("x64")
def test_001_running_statistics():
    mean = np.array(STATISTIC_MEAN) / 0.1
    var = (np.array(STATISTIC_VAR) - 0.9) / 0.1 * 7 / 8
    channels = [with_moments(np.array([]), 8, m, v) for m, v in zip(mean, var, strict=True)]
    x = np.stack([c.reshape(2, 2, 2) for c in channels], 1)
    y, stats = train(x)
    expected, expected_mean, expected_var = hand_written(x)
    np.testing.assert_allclose(y, expected, atol=1e-14)
    np.testing.assert_allclose(expected_mean, STATISTIC_MEAN, rtol=1e-14)
    np.testing.assert_allclose(stats.mean, STATISTIC_MEAN, rtol=1e-14)
    np.testing.assert_allclose(expected_var, STATISTIC_VAR, rtol=1e-14)
    np.testing.assert_allclose(stats.var, STATISTIC_VAR, rtol=1e-14)
    # The notebook prints the module's buffers in float32, to four decimals.
    _, _, after = train_layer(linen.BatchNorm2d(2), jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(after["batch_stats"]["mean"], [0.0148, 0.0564], atol=5.1e-5)
    np.testing.assert_allclose(after["batch_stats"]["var"], [0.9376, 0.9465], atol=5.1e-5)


@pytest.mark.usefixtures("x64")
def test_001_normalized_channel_and_its_deviations():
    # A channel normalized with eps has std √(var / (var + eps)): the printed one gives back var.
    var = 1e-5 * STD**2 / (1 - STD**2)
    x = (7.0 + np.array(NORMALIZED) * np.sqrt(var + 1e-5)).reshape(8, 1)
    y, moments = jaxbn.batch_normalize(x, axis=1)
    np.testing.assert_allclose(y[:, 0], NORMALIZED, atol=1e-8)
    assert abs(float(y.mean())) < 1e-15  # prints 2.8e-17
    np.testing.assert_allclose(float(y.std()), STD, atol=1e-8)
    np.testing.assert_allclose(float(y.std(ddof=1)), STD_UNBIASED, atol=1e-8)
    difference = float(y.std()) * moments.count**0.5 - float(y.std(ddof=1)) * (8 - 1) ** 0.5
    assert abs(difference) <= 2 * 4.440892098500626e-16  # prints -4.4e-16


X_1234 = [
    [
        [
            [-1.5798, -2.5201, 0.3904, 1.5037],
            [0.2580, 0.3442, 1.2225, 1.0226],
            [-0.4528, -0.3625, 1.8377, -0.0065],
        ],
        [
            [1.2658, -0.5274, -1.7758, -1.0991],
            [0.6457, 1.5849, 0.0869, -0.3118],
            [0.3529, -0.3111, 0.2038, 1.2938],
        ],
    ]
]
Y_1234 = [
    [
        [
            [-1.4238, -2.2031, 0.2091, 1.1317],
            [0.0994, 0.1708, 0.8987, 0.7331],
            [-0.4897, -0.4149, 1.4086, -0.1199],
        ],
        [
            [1.1970, -0.6720, -1.9732, -1.2679],
            [0.5507, 1.5295, -0.0318, -0.4473],
            [0.2454, -0.4466, 0.0901, 1.2261],
        ],
    ]
]


def test_001_one_image():
    y, variables, _ = train_layer(linen.BatchNorm2d(2, affine=True), jnp.asarray(X_1234))
    np.testing.assert_allclose(y, Y_1234, **PRINTED)
    assert y.shape == (1, 2, 3, 4)
    np.testing.assert_array_equal(variables["params"]["scale"], [1, 1])  # hasattr(m, "weight")
    np.testing.assert_array_equal(variables["params"]["bias"], [0, 0])


# 002_bbeebb5b52e04e00: a printed input cut short, and the textbook version

X_3255 = [
    [
        [0.1051, -0.6054, 2.2077, 0.5354, -0.0786],
        [1.3807, -1.1156, 0.8601, -1.0424, -0.8200],
        [-3.1862, -1.2547, 0.0289, 0.0565, 0.2643],
        [-0.5624, -0.6070, -0.1709, -1.2398, -0.1952],
        [1.8700, 0.4523, 0.4213, 0.3290, 1.1165],
        [1.5962, -0.8092, -0.6239, 1.1259, 0.2702],
        [1.8706, 0.4997, 0.0581, -0.5668, 0.7331],
        [-0.3854, 2.4003, -0.2957, -1.2770, 0.5103],
    ],
    [
        [-1.8195, 2.0410, 0.9786, 0.2387, 0.4347],
        [-0.2031, 1.6943, 2.3971, 1.0378, -1.3072],
        [-0.4515, 1.6716, -2.5988, -1.0309, 1.1623],
        [0.4303, -0.4173, -0.3568, -0.4327, -1.5390],
        [0.8908, -0.4774, 0.5983, -0.4060, 0.4000],
    ],
]
Y_3255 = [
    [
        [4.5405e-02, -6.5842e-01, 2.1280e00, 4.7161e-01, -1.3659e-01],
        [1.3089e00, -1.1638e00, 7.9322e-01, -1.0912e00, -8.7098e-01],
        [-3.2148e00, -1.3016e00, -3.0113e-02, -2.7728e-03, 2.0310e-01],
        [-6.1581e-01, -6.6001e-01, -2.2805e-01, -1.2868e00, -2.5212e-01],
        [1.7935e00, 3.8927e-01, 3.5856e-01, 2.6712e-01, 1.0472e00],
        [1.5224e00, -8.6029e-01, -6.7676e-01, 1.0565e00, 2.0892e-01],
        [1.7942e00, 4.3625e-01, -1.2221e-03, -6.2016e-01, 6.6742e-01],
        [-4.4046e-01, 2.3188e00, -3.5164e-01, -1.3236e00, None],
    ],
    [
        [-1.8457e00, 2.0053e00, 9.4556e-01, 2.0742e-01, 4.0299e-01],
        [-2.3329e-01, 1.6595e00, 2.3605e00, 1.0046e00, -1.3346e00],
        [-4.8102e-01, 1.6369e00, -2.6231e00, -1.0590e00, 1.1288e00],
        [3.9858e-01, -4.4690e-01, -3.8660e-01, -4.6225e-01, -1.5659e00],
        [8.5797e-01, -5.0693e-01, 5.6620e-01, -4.3564e-01, 3.6835e-01],
    ],
]
MEAN_3255 = [0.0593, 0.0307]


@pytest.mark.parametrize("channel", [0, 1])
def test_002_output_of_a_printed_input(channel):
    # The printed mean is given; the variance, which is not printed, is that of the printed output.
    x = np.ravel(X_3255[channel])
    expected = np.ravel(np.array(Y_3255[channel], np.float64))  # None, cut off in print, is NaN
    printed = ~np.isnan(expected)
    x, expected = x[printed], expected[printed]
    std = np.ptp(x) / np.ptp(expected)
    whole = with_moments(x, 75, MEAN_3255[channel], std**2 - 1e-5)
    y, moments = jaxbn.batch_normalize(jnp.asarray(whole, jnp.float32)[:, None])
    np.testing.assert_allclose(moments.mean, MEAN_3255[channel], atol=1e-6)
    np.testing.assert_allclose(y[: x.size, 0], expected, **PRINTED)


def textbook(x, scale, bias, moving_mean, moving_var):
    """Momentum 0.9 keeps, and the moving variance is the biased one."""
    mean, var = x.mean(0), x.var(0)
    y = scale * (x - mean) / np.sqrt(var + 1e-5) + bias
    return y, 0.9 * moving_mean + (1 - 0.9) * mean, 0.9 * moving_var + (1 - 0.9) * var


@pytest.mark.usefixtures("x64")
def test_002_textbook_convention():
    x = np.asarray(X_3255[0])
    scale, bias = np.linspace(0.5, 1.5, 5), np.linspace(-1, 1, 5)
    moving = np.zeros(5), np.ones(5)
    stats = jaxbn.init_batch_stats(5, jnp.float64)
    layer = linen.BatchNorm(momentum=0.9, param_dtype=jnp.float64, force_float32_reductions=False)
    variables = layer.init(jax.random.key(0), x, use_running_average=False)
    variables["params"] = {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}
    for _ in range(3):
        expected, *moving = textbook(x, scale, bias, *moving)
        y, stats = jaxbn.batch_norm(
            x, stats, scale, bias, train=True, momentum=1 - 0.9, unbiased=False
        )
        y_layer, _, variables = train_layer(layer, x, variables)
        for actual in (y, y_layer):
            np.testing.assert_allclose(actual, expected, atol=1e-13)
        for actual in (stats[:2], tuple(variables["batch_stats"][k] for k in ("mean", "var"))):
            np.testing.assert_allclose(actual, moving, atol=1e-13)
    expected = scale * (x - moving[0]) / np.sqrt(moving[1] + 1e-5) + bias  # gradients disabled
    y, _ = jaxbn.batch_norm(x, stats, scale, bias, train=False)
    np.testing.assert_allclose(y, expected, atol=1e-13)


# 003_705bb51778455261: the scale of an old random initialization

X_SCALED = [
    [
        [
            [-1.1622, -0.9170, -0.6798, -0.0270],
            [0.2687, -1.6046, -0.2142, -0.3561],
            [0.2908, -0.1012, 1.3594, 1.1316],
        ],
        [
            [0.4689, 1.4049, 1.2324, -1.3721],
            [-0.1498, -0.3207, 0.5072, -1.2563],
            [1.5934, -0.8010, 0.1270, 0.5993],
        ],
    ]
]
Y_SCALED = [
    [
        [
            [-1.0344, -0.7794, -0.5326, 0.1463],
            [0.4538, -1.4945, -0.0484, -0.1960],
            [0.4767, 0.0691, 1.5881, 1.3512],
        ],
        [
            [0.2279, 0.9400, 0.8088, -1.1729],
            [-0.2429, -0.3729, 0.2570, -1.0848],
            [1.0834, -0.7384, -0.0323, 0.3271],
        ],
    ]
]


def test_003_scale_of_an_old_initialization():
    x, scale = jnp.asarray(X_SCALED), jnp.array([0.8681, 0.7207])
    y, _ = train(x, scale)
    np.testing.assert_allclose(y, Y_SCALED, **PRINTED)
    moments = jaxbn.batch_moments(x, axis=1)
    np.testing.assert_allclose(moments.mean[0], -0.1676, atol=6e-5)
    np.testing.assert_allclose(moments.var[0], 0.6967, atol=6e-5)
    first = jaxbn.normalize(x[:, :1], moments.mean[:1], moments.var[:1], scale[:1], axis=1)
    np.testing.assert_allclose(first[0, 0, 0, 0], -1.0344, **PRINTED)


# 004_0370dfb2e597ce5f: arange(15) and three momenta

DATA = np.arange(15, dtype=np.float32).reshape(3, 5)
MOMENTA = {
    0.1: ([0.5, 0.6, 0.7, 0.8, 0.9], 3.4),
    1: ([5.0, 6.0, 7.0, 8.0, 9.0], 25.0),
    0.5: ([2.5, 3.0, 3.5, 4.0, 4.5], 13.0),
}


@pytest.mark.parametrize("momentum", MOMENTA)
def test_004_momentum(momentum):
    running_mean, running_var = MOMENTA[momentum]
    y, variables, after = train_layer(linen.BatchNorm1d(5, momentum=momentum), DATA)
    y_function, stats = train(DATA, momentum=momentum)
    for output in (y, y_function):
        np.testing.assert_allclose(output, np.outer([-1.2247, 0, 1.2247], np.ones(5)), atol=5e-5)
    before = variables["params"] | variables["batch_stats"]
    for name, value in {"scale": 1, "bias": 0, "mean": 0, "var": 1}.items():
        np.testing.assert_array_equal(before[name], np.full(5, value))
    assert before["count"] == 0
    for actual in (jaxbn.BatchStats(**after["batch_stats"]), stats):
        np.testing.assert_allclose(actual.mean, running_mean, rtol=1e-6)
        np.testing.assert_allclose(actual.var, np.full(5, running_var), rtol=1e-6)
        assert actual.count == 1


def test_004_both_variances():
    moments = jaxbn.batch_moments(DATA)
    np.testing.assert_allclose(moments.mean, [5, 6, 7, 8, 9])
    np.testing.assert_allclose(moments.var, np.full(5, 16.6667), atol=5e-5)
    unbiased = jaxbn.update_batch_stats(jaxbn.init_batch_stats(5), moments, momentum=1.0).var
    np.testing.assert_allclose(unbiased, np.full(5, 25.0), rtol=1e-6)
    whitened = jaxbn.normalize(DATA, moments.mean, moments.var, epsilon=0.0)
    np.testing.assert_allclose(whitened, np.outer([-1.2247, 0, 1.2247], np.ones(5)), atol=5e-5)


def test_004_three_by_three():
    a = jnp.array([[0.7976, 0.7063, 0.5399], [0.9518, -0.9554, -0.4935], [-1.4796, 0.9450, 0.3082]])
    moments = jaxbn.batch_moments(a)
    np.testing.assert_allclose(moments.mean, [0.0899, 0.2320, 0.1182], atol=1.1e-4)
    np.testing.assert_allclose(moments.var, [1.2357, 0.7144, 0.1960], atol=1.1e-4)
    stats = jaxbn.update_batch_stats(jaxbn.init_batch_stats(3), moments, momentum=1.0)
    np.testing.assert_allclose(stats.var, [1.8536, 1.0716, 0.2940], atol=1.1e-4)
    with pytest.raises(ValueError, match=r"`var` must have shape \(3,\)"):
        jaxbn.normalize(a, moments.mean, np.full(5, 25.0, np.float32))
