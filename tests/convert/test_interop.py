"""Running statistics to and from the layers of other libraries, which are the referees."""

import re
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.numpy_reference import error, sample

import jaxbn
from jaxbn import interop

CHANNELS = 5
STATS = jaxbn.BatchStats(
    *(jnp.asarray(sample(CHANNELS, seed, 3.0, 0.5, np.float32)) for seed in (7, 8)), jnp.int32(4)
)
INITIAL = jaxbn.init_batch_stats(CHANNELS)
SIX = jaxbn.init_batch_stats(6)._replace(count=jnp.int32(1))


def batches(steps, seed=0, dtype=np.float32):
    """Batches whose mean moves, so that every one of them matters."""
    return [sample((6, 4, CHANNELS), seed + i, 3 + i, 2.0, dtype) for i in range(steps)]


def assert_same(actual, expected):
    """Bit for bit, types included."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def assert_errors_within(actual, expected, limit=1e-6):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert error(a, b) <= limit


def inference(x, stats, scale, bias, epsilon=1e-5):
    return jaxbn.batch_norm(x, stats, scale, bias, train=False, epsilon=epsilon)[0]


def continued(stats, xs, momentum):
    """The statistics after more batches; `momentum` takes the old ones."""
    for x in xs:
        _, stats = jaxbn.batch_norm(x, stats, train=True, momentum=momentum(stats), unbiased=False)
    return stats


def plain(m):
    return lambda stats: 1 - m


def debiased(m):
    return lambda stats: (1 - m) / (1 - m ** (stats.count + 1))


class Haiku:
    """A trained `haiku.BatchNorm` inside of another module."""

    def __init__(self, decay_rate, dtype=np.float32, **options):
        hk = pytest.importorskip("haiku", reason="dm-haiku is not installed")

        class Block(hk.Module):
            def __init__(self):
                super().__init__()
                self.norm = hk.BatchNorm(True, True, decay_rate, **options)

            def __call__(self, x, train):
                return self.norm(x, is_training=train)

        self.f = hk.transform_with_state(lambda x, train: Block()(x, train))
        self.channels_first = "data_format" in options
        self.params, self.state = self.f.init(None, self.placed(batches(1, dtype=dtype)[0]), True)
        self.module = "block/~/batch_norm"
        for i, name in enumerate(("scale", "offset")):
            value = self.params[self.module][name]
            self.params[self.module][name] = jnp.asarray(
                sample(value.size, i, dtype=dtype)
            ).reshape(value.shape)

    @property
    def vectors(self):
        return [self.params[self.module][name].ravel() for name in ("scale", "offset")]

    def placed(self, x):
        return jnp.swapaxes(x, 1, 2) if self.channels_first else x

    def train(self, xs):
        for x in xs:
            _, self.state = self.f.apply(self.params, self.state, None, self.placed(x), True)

    def evaluate(self, x, state=None):
        y, _ = self.f.apply(self.params, state or self.state, None, self.placed(x), False)
        return self.placed(y)

    def statistics(self):
        return interop.from_haiku(self.state, self.module)


@pytest.mark.parametrize(
    ("decay_rate", "steps", "options"),
    [
        *((0.0, 1, {}), (0.99, 20, {})),
        *((0.0, 20, {"data_format": "NC..."}), (0.99, 1, {"data_format": "NC..."})),
    ],
)
def test_haiku(decay_rate, steps, options):
    layer = Haiku(decay_rate, **options)
    *xs, x = batches(steps + 1)
    initial = layer.state
    layer.train(xs)
    stats = layer.statistics()
    assert stats.count == steps
    assert_errors_within(inference(x, stats, *layer.vectors), layer.evaluate(x))
    back = interop.to_haiku(stats, initial, layer.module, decay_rate=decay_rate)
    for name, ema in layer.state.items():
        for key in ("average", "counter"):
            assert_same(back[name][key], ema[key])
    assert_errors_within(back, layer.state)
    assert_same(interop.from_haiku(back, layer.module), stats)
    np.testing.assert_array_equal(layer.evaluate(x, back), layer.evaluate(x))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("steps", [1, 20])
@pytest.mark.parametrize("decay_rate", [0.0, 0.99])
def test_haiku_continues(decay_rate, steps):
    layer = Haiku(decay_rate, np.float64)
    initial = layer.state
    layer.train(batches(steps, dtype=np.float64))
    stats = layer.statistics()
    more = batches(5, 50, np.float64)
    layer.train(more)
    trained = layer.statistics()
    assert_errors_within(continued(stats, more, debiased(decay_rate)), trained, 1e-12)
    layer.state = interop.to_haiku(stats, initial, layer.module, decay_rate=decay_rate)
    layer.train(more)
    assert_errors_within(layer.statistics(), trained, 1e-12)


@pytest.mark.usefixtures("x64")
def test_haiku_from_the_first_batch():
    layer = Haiku(0.9, np.float64)
    xs = batches(6, dtype=np.float64)
    layer.train(xs)
    initial = jaxbn.init_batch_stats(CHANNELS, np.float64)
    assert_errors_within(continued(initial, xs, debiased(0.9)), layer.statistics(), 1e-12)


def test_haiku_takes_statistics_that_it_did_not_make():
    layer = Haiku(0.9)
    before = dict(layer.state, other={"w": jnp.ones(2)})
    state = interop.to_haiku(STATS, before, layer.module, decay_rate=0.9)
    assert_same(state["other"], before["other"])
    assert before[f"{layer.module}/~/mean_ema"]["counter"] == 0
    x = batches(1)[0]
    assert_errors_within(layer.evaluate(x, state), inference(x, STATS, *layer.vectors))


class Equinox:
    """An `equinox.nn.BatchNorm` of either mode, over a batch."""

    def __init__(self, mode, momentum, dtype=np.float32):
        self.eqx = pytest.importorskip("equinox", reason="equinox is not installed")
        make = self.eqx.nn.make_with_state(self.eqx.nn.BatchNorm)
        self.layer, self.state = make(CHANNELS, "batch", momentum=momentum, mode=mode, dtype=dtype)
        vectors = [jnp.asarray(sample(CHANNELS, i, dtype=dtype)) for i in range(2)]
        self.layer = self.eqx.tree_at(lambda m: (m.weight, m.bias), self.layer, vectors)
        self.options = {} if mode == "ema" else {"momentum": momentum}
        self.indices = (
            (self.layer.ema_first_time_index, self.layer.ema_state_index)
            if mode == "ema"
            else (self.layer.batch_counter, self.layer.batch_state_index)
        )

    @property
    def vectors(self):
        return self.layer.weight, self.layer.bias

    @property
    def values(self):
        return tuple(self.state.get(index) for index in self.indices)

    @values.setter
    def values(self, values):
        for index, value in zip(self.indices, values, strict=True):
            self.state = self.state.set(index, value)

    def call(self, x, inference):
        layer = self.eqx.nn.inference_mode(self.layer, inference)
        mapped = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        y, state = mapped(jnp.swapaxes(x, 1, 2), self.state)
        return jnp.swapaxes(y, 1, 2), state

    def train(self, xs):
        for x in xs:
            _, self.state = self.call(x, False)

    def evaluate(self, x):
        return self.call(x, True)[0]

    def statistics(self):
        return interop.from_equinox(*self.values, **self.options)


@pytest.mark.parametrize(
    ("mode", "momentum", "steps"),
    [("ema", 0.5, 1), ("ema", 0.99, 20), ("batch", 0.5, 20), ("batch", 0.99, 1)],
)
def test_equinox(mode, momentum, steps):
    layer = Equinox(mode, momentum)
    *xs, x = batches(steps + 1)
    layer.train(xs)
    stats = layer.statistics()
    assert stats.count == (0 if mode == "ema" else steps)
    y = layer.evaluate(x)
    assert_errors_within(inference(x, stats, *layer.vectors), y)
    before = layer.values
    layer.values = interop.to_equinox(stats, **layer.options)
    if mode == "ema":
        assert_same(layer.values, before)
    else:
        assert_same(layer.values[0], before[0])
        assert_errors_within(layer.values[1], before[1])
    assert_errors_within(layer.evaluate(x), y)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("steps", [1, 20])
@pytest.mark.parametrize(("mode", "weight"), [("ema", plain), ("batch", debiased)])
def test_equinox_continues(mode, weight, steps):
    layer = Equinox(mode, 0.9, np.float64)
    layer.train(batches(steps, dtype=np.float64))
    stats = layer.statistics()
    more = batches(5, 50, np.float64)
    layer.train(more)
    trained = layer.statistics()
    assert_errors_within(continued(stats, more, weight(0.9))[:2], trained[:2], 1e-12)
    layer.values = interop.to_equinox(stats, **layer.options)
    layer.train(more)
    assert_errors_within(layer.statistics()[:2], trained[:2], 1e-12)


@pytest.mark.parametrize("mode", ["ema", "batch"])
def test_equinox_takes_statistics_that_it_did_not_make(mode):
    layer = Equinox(mode, 0.9)
    stats = STATS._replace(count=jnp.int32(0)) if mode == "ema" else STATS
    layer.values = interop.to_equinox(stats, **layer.options)
    x = batches(1)[0]
    assert_errors_within(layer.evaluate(x), inference(x, stats, *layer.vectors))


def test_equinox_before_the_first_batch():
    layer = Equinox("batch", 0.9)
    assert_same(layer.statistics(), INITIAL)
    values = interop.to_equinox(INITIAL, momentum=0.9)
    assert_same(values, layer.values)
    layer = Equinox("ema", 0.9)
    with pytest.raises(ValueError, match="no averages before a batch; use init_batch_stats"):
        layer.statistics()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras
@pytest.mark.parametrize("momentum", [0.5, 0.99])
@pytest.mark.parametrize("options", [{}, {"scale": False}, {"scale": False, "center": False}])
def test_keras(options, momentum, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras", reason="keras is not installed")
    layer = keras.layers.BatchNormalization(momentum=momentum, **options)
    x = batches(1)[0]
    layer(x)
    vectors = [sample(CHANNELS, i, dtype=np.float32) for i in range(len(layer.trainable_weights))]
    layer.set_weights([*vectors, *layer.get_weights()[-2:]])
    for batch in batches(3):
        layer(batch, training=True)
    stats = interop.from_keras(layer.get_weights())
    scale, bias = [None] * (2 - len(vectors)) + vectors
    y = np.asarray(layer(x, training=False))
    assert_errors_within(inference(x, stats, scale, bias, epsilon=1e-3), y)
    before = layer.get_weights()
    layer.set_weights([*vectors, *interop.to_keras(stats)])
    assert_same(layer.get_weights(), before)

    more = batches(5, seed=50)
    for batch in more:
        layer(batch, training=True)
    expected = interop.from_keras(layer.get_weights())
    assert_errors_within(continued(stats, more, plain(momentum))[:2], expected[:2])


def test_flax_needs_no_converter():
    layer = nn.BatchNorm(momentum=0.9, use_running_average=False, use_fast_variance=False)
    variables = layer.init(jax.random.key(0), batches(1)[0])

    def train(variables, xs):
        for x in xs:
            variables = {**variables, **layer.apply(variables, x, mutable=["batch_stats"])[1]}
        return variables

    variables = train(variables, batches(3))
    stats = jaxbn.BatchStats.from_mapping({**variables["batch_stats"], "count": 0})
    assert_same([stats.mean, stats.var], [variables["batch_stats"][n] for n in ("mean", "var")])
    more = batches(5, seed=50)
    trained = train(variables, more)["batch_stats"]
    actual = continued(stats, more, plain(0.9))
    assert_errors_within([actual.mean, actual.var], [trained["mean"], trained["var"]])


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_half_precision_becomes_float32(dtype):
    mean, var = (np.asarray(vector).astype(dtype) for vector in STATS[:2])
    state = haiku_state(mean[None])
    state["batch_norm/~/var_ema"]["average"] = jnp.asarray(var)
    for stats in (
        interop.from_haiku(state),
        interop.from_equinox(jnp.array(False), (jnp.asarray(mean), jnp.asarray(var))),
        interop.from_keras([mean, var]),
    ):
        assert_same(stats[:2], (jnp.float32(mean), jnp.float32(var)))
        _, after = jaxbn.batch_norm(batches(1)[0], stats, train=True)
        assert [v.dtype for v in after] == [v.dtype for v in stats]


def test_no_library_is_imported():
    libraries = {"equinox", "flax", "haiku", "keras", "safetensors", "torch"}
    check = (
        "import sys, numpy, jaxbn.interop, jaxbn.torch; "
        "jaxbn.torch.from_state_dict({'weight': numpy.ones(3), 'bias': numpy.ones(3)}); "
        f"assert not {libraries} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


def haiku_state(average=STATS.mean[None], counter=3, other=None):
    other = counter if other is None else other
    return {
        "batch_norm/~/mean_ema": {"average": average, "counter": jnp.int32(counter)},
        "batch_norm/~/var_ema": {"average": average, "counter": jnp.int32(other)},
    }


CASES = {
    "another name": (
        lambda: interop.from_haiku(haiku_state(), "norm"),
        ValueError,
        "`state` must have norm/~/mean_ema and norm/~/var_ema; it has batch_norm/~/mean_ema,",
    ),
    "no batch in haiku": (
        lambda: interop.from_haiku(haiku_state(counter=0)),
        ValueError,
        "averaged the same number of batches, at least 1; got 0 and 0. Before the first, use init_",
    ),
    "different batches in haiku": (
        lambda: interop.from_haiku(haiku_state(other=5)),
        ValueError,
        "got 3 and 5.",
    ),
    "several axes": (
        lambda: interop.from_haiku(haiku_state(jnp.ones((1, 2, 3)))),
        ValueError,
        "one axis longer than 1, the channel axis; got shape (1, 2, 3).",
    ),
    "no batch for haiku": (
        lambda: interop.to_haiku(INITIAL, haiku_state(), decay_rate=0.9),
        ValueError,
        "`stats` must have at least 1 batch; got 0. Use stats._replace(count=…).",
    ),
    "other channels for haiku": (
        lambda: interop.to_haiku(STATS, haiku_state(jnp.ones((1, 3))), decay_rate=0.9),
        ValueError,
        "the channels of batch_norm/~/mean_ema, which has shape (1, 3); got 5 channels.",
    ),
    "several axes for haiku": (
        lambda: interop.to_haiku(SIX, haiku_state(jnp.ones((1, 2, 3))), decay_rate=0.9),
        ValueError,
        "the channels of batch_norm/~/mean_ema, which has shape (1, 2, 3); got 6 channels.",
    ),
    "decay rate": (
        lambda: interop.to_haiku(STATS, haiku_state(), decay_rate=1.0),
        ValueError,
        "The weight of the old statistics must be in [0, 1); got 1.0.",
    ),
    "momentum of ema": (
        lambda: interop.from_equinox(jnp.array(False), STATS[:2], momentum=0.9),
        ValueError,
        '`momentum` must be None in mode "ema", where `counter` is a bool, and that of the layer '
        'in mode "batch", where it is an integer; got 0.9 beside False.',
    ),
    "no momentum of batch": (
        lambda: interop.from_equinox(jnp.array(3), STATS[:2]),
        ValueError,
        "got None beside 3.",
    ),
    "negative momentum": (
        lambda: interop.to_equinox(STATS, momentum=-0.1),
        ValueError,
        "must be in [0, 1); got -0.1.",
    ),
    "count of ema": (
        lambda: interop.to_equinox(STATS),
        ValueError,
        'Equinox in mode "ema" keeps no count of batches: 4, that of `stats`, would be lost. To '
        "drop it, pass stats._replace(count=jnp.int32(0)).",
    ),
    "no count for equinox": (
        lambda: interop.to_equinox(STATS._replace(count=jnp.int32(0)), momentum=0.9),
        ValueError,
        "`stats` of 0 batches must have mean 0 and variance 1; got other values.",
    ),
    "count for keras": (
        lambda: interop.to_keras(STATS),
        ValueError,
        "Keras keeps no count of batches: 4",
    ),
    "weights of renormalization": (
        lambda: interop.from_keras([STATS.mean] * 7),
        ValueError,
        "`weights` must be gamma and beta, if there are any, moving_mean and moving_variance; "
        "got 7 arrays.",
    ),
    "shapes": (
        lambda: interop.from_keras([STATS.mean, STATS.var[:2]]),
        ValueError,
        "vectors of the same channels, and `count` a scalar; got the shapes (5,), (2,) and ().",
    ),
    "float64": (
        lambda: interop.from_keras([np.zeros(3), np.ones(3)]),
        TypeError,
        "`mean` is float64, which would be rounded to float32.",
    ),
    "no statistics": (lambda: interop.to_keras(STATS[:2]), TypeError, "must be a BatchStats"),
}


@pytest.mark.parametrize("case", CASES)
def test_message(case):
    call, error, message = CASES[case]
    with pytest.raises(error, match=re.escape(message)):
        call()
