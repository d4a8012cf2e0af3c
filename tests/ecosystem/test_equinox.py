"""`jaxbn.equinox.BatchNorm`: values, state, Equinox's own tools, and Equinox's layer beside it."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.numpy_reference import (
    channel_moments,
    error,
    evaluate,
    masked_train,
    problem,
    running,
    sample,
    tolerance,
    train,
)
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn import interop

eqx = pytest.importorskip("equinox", reason="equinox is not installed")

from jaxbn.equinox import BatchNorm  # noqa: E402

SHAPE = (6, 4, 3, 2)
MODES = ["batch", "ema"]
ours = eqx.nn.make_with_state(BatchNorm)
theirs = eqx.nn.make_with_state(eqx.nn.BatchNorm)


def by_sample(layer, x, state, **options):
    """A call in Equinox's way; the arrays among the options are of samples, too."""
    arrays = {name: v for name, v in options.items() if isinstance(v, jax.Array | np.ndarray)}
    fixed = {name: v for name, v in options.items() if name not in arrays}

    def call(x, state, arrays):
        return layer(x, state, **fixed, **arrays)

    return jax.vmap(call, (0, None, 0), (0, None), axis_name="batch")(x, state, arrays)


def by_batch(layer, x, state, **options):
    return layer.batched(x, state, **options)


CALLS = [by_sample, by_batch]
compiled = eqx.filter_jit(lambda call, layer, x, state, options: call(layer, x, state, **options))


def indices(layer):
    if layer.mode == "ema":
        return layer.ema_first_time_index, layer.ema_state_index
    return layer.batch_counter, layer.batch_state_index


def kept(layer, state):
    """The state as running statistics."""
    momentum = None if layer.mode == "ema" else layer.momentum
    return interop.from_equinox(*map(state.get, indices(layer)), momentum=momentum)


def with_affine(layer, scale, bias):
    return eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, (scale, bias))


def copied(state):
    """Equinox makes a state unusable when it is written."""
    return jax.tree.map(lambda v: v, state)


def after(layer, state, xs):
    """The state after these batches."""
    return jax.lax.scan(lambda state, x: by_sample(layer, x, state)[::-1], state, xs)[0]


def shares(mode, momentum, batches):
    """The weight of each batch when it comes."""
    if mode == "ema":
        return [1.0] + [1 - momentum] * (batches - 1)
    return [(1 - momentum) / (1 - momentum**t) for t in range(1, batches + 1)]


@functools.cache
def trained(mode):
    """A layer after three batches, its parameters away from 1 and 0."""
    layer, state = ours(4, "batch", momentum=0.9, mode=mode)
    x, scale, bias, _ = problem(SHAPE, 1)
    layer = with_affine(layer, jnp.asarray(scale), jnp.asarray(bias))
    for i in range(3):
        _, state = compiled(by_batch, layer, x + i, state, {})
    return layer, state


def test_the_arguments_are_those_of_equinox():
    own = {"axis_name": None, "mode": "batch"}
    for name in ("__init__", "__call__"):
        expected = inspect.signature(getattr(eqx.nn.BatchNorm, name)).parameters
        actual = inspect.signature(getattr(BatchNorm, name)).parameters
        assert [*actual][: len(expected)] == [*expected]
        for argument, parameter in expected.items():
            assert actual[argument].kind == parameter.kind
            assert actual[argument].default == own.get(argument, parameter.default)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_the_state_is_that_of_equinox(mode, wide):
    """In number, shape, dtype and weakness of type; in mode "ema" Equinox's starts undefined."""
    options = {"momentum": 0.9, "mode": mode}
    with jax.enable_x64(wide):
        (layer, state), (other, expected) = (make(3, "batch", **options) for make in (ours, theirs))
    for actual, like in zip(*map(jax.tree.leaves, (state, expected)), strict=True):
        assert jax.typeof(actual) == jax.typeof(like)
        assert actual.weak_type == like.weak_type
        if mode == "batch":
            np.testing.assert_array_equal(actual, like)
    for name, value in vars(other).items():
        assert type(getattr(layer, name)) is type(value), name
        if not isinstance(value, jax.Array | eqx.nn.StateIndex):
            assert getattr(layer, name) == value, name


@pytest.mark.parametrize("call", CALLS)
def test_training(call):
    x, scale, bias, dy = problem(SHAPE, 1)
    expected = train(x, scale, bias, dy, 1)
    layer, state = ours(4, "batch", momentum=0.9)
    layer = with_affine(layer, jnp.asarray(scale), jnp.asarray(bias))

    @eqx.filter_jit
    @functools.partial(eqx.filter_value_and_grad, has_aux=True)
    def loss(arguments, state):
        y, state = call(*arguments, state)
        return (y * dy).sum(), (y, state)

    (_, (y, state)), (gradient, dx) = loss((layer, jnp.asarray(x)), state)
    limit = tolerance("float32", x.size // 4)
    actual = {"y": y, "dx": dx, "dscale": gradient.weight, "dbias": gradient.bias}
    for name, value in actual.items():
        assert error(value, getattr(expected, name)) <= limit, name
    stats = kept(layer, state)
    assert stats.count == 1
    assert error(stats.mean, expected.mean) <= 2 * limit
    assert error(stats.var, expected.var) <= 2 * limit


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("mode", MODES)
def test_inference(mode, call):
    layer, state = trained(mode)
    x, scale, bias, dy = problem(SHAPE, 1, seed=10)
    stats = kept(layer, state)
    expected = evaluate(x, stats.mean, stats.var, scale, bias, dy, 1)
    layer = with_affine(layer, jnp.asarray(scale), jnp.asarray(bias))
    for chosen, options in ((eqx.nn.inference_mode(layer), {}), (layer, {"inference": True})):
        y, after = compiled(call, chosen, x, copied(state), options)
        assert error(y, expected.y) <= tolerance("float32")
        jax.tree.map(np.testing.assert_array_equal, after, state)
    training = eqx.nn.inference_mode(eqx.nn.inference_mode(layer), value=False)
    y, _ = compiled(call, training, x, copied(state), {})
    assert error(y, train(x, scale, bias, dy, 1).y) <= tolerance("float32", x.size // 4)


@pytest.mark.parametrize("mode", MODES)
def test_running_statistics(mode, x64):
    """Against the formula in float64, beside Equinox's: its variance is right in mode "ema"."""
    momentum, steps = 0.9, 20
    xs = np.stack([sample((6, 4), i, 3 + i, 2.0) for i in range(steps)])
    mean, var = np.zeros(4), np.ones(4)
    for x, share in zip(xs, shares(mode, momentum, steps), strict=True):
        mean, var = running(mean, var, *channel_moments(x, 1), share, unbiased=False)
    found = []
    for make in (ours, theirs):
        layer, state = make(4, "batch", momentum=momentum, mode=mode)
        found.append(kept(layer, after(layer, state, xs)))
    stats, of_equinox = found
    assert stats.count == (0 if mode == "ema" else steps)
    assert error(stats.mean, mean) <= 1e-13
    assert error(stats.var, var) <= 1e-13
    assert error(of_equinox.mean, mean) <= 1e-13
    share = 0 if mode == "ema" else momentum**steps / (1 - momentum**steps)  # of the initial 1
    assert error(of_equinox.var, var + share) <= 1e-13


@pytest.mark.parametrize("mode", MODES)
def test_the_variance_is_not_biased_by_its_start(mode):
    """After 100 batches with the default momentum, Equinox adds 0.58 in mode "batch"."""
    x = jnp.asarray(sample((16, 4), 0, 3.0, 1.0, np.float32))
    expected = x.var(0)
    found = {}
    for make in (ours, theirs):
        layer, state = make(4, "batch", mode=mode)
        found[make] = kept(layer, after(layer, state, jnp.stack([x] * 100))).var
    np.testing.assert_allclose(found[ours], expected, 1e-5)
    np.testing.assert_allclose(found[theirs] - expected, 0.577 if mode == "batch" else 0, atol=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_inference_before_the_first_batch(mode):
    layer, state = ours(4, "batch", mode=mode, inference=True, dtype="float32")
    x = jnp.asarray(sample(SHAPE, 0, dtype=np.float32))
    y, _ = by_sample(layer, x, state)
    np.testing.assert_allclose(y, x / np.float32(np.sqrt(1 + 1e-5)), 1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_checkpoints_of_equinox_and_back(mode, tmp_path):
    """In the same mode a file of one loads into the other, which evaluates alike."""
    x = jnp.asarray(sample(SHAPE, 50, 4.0, 2.0, np.float32))
    options = {"momentum": 0.9, "mode": mode}
    for i, (make, other) in enumerate(((theirs, ours), (ours, theirs), (ours, ours))):
        layer, state = make(4, "batch", **options)
        vectors = (jnp.asarray(sample(4, seed, dtype=np.float32)) for seed in (1, 2))
        layer = with_affine(layer, *vectors)
        for _ in range(3):
            _, state = by_sample(layer, x, state)
        path = tmp_path / f"{i}.eqx"
        eqx.tree_serialise_leaves(path, (layer, state))
        loaded, restored = eqx.tree_deserialise_leaves(path, other(4, "batch", **options))
        assert loaded.mode == mode
        expected = by_sample(eqx.nn.inference_mode(layer), x, copied(state))[0]
        y = by_sample(eqx.nn.inference_mode(loaded), x, copied(restored))[0]
        assert error(y, expected) <= 1e-6
        _, after = by_sample(loaded, x, restored)  # it goes on
        assert kept(loaded, after).count == (0 if mode == "ema" else 4)


def test_a_checkpoint_of_the_other_mode_does_not_load(tmp_path):
    path = tmp_path / "ema.eqx"
    eqx.tree_serialise_leaves(path, theirs(4, "batch", mode="ema"))
    with pytest.raises(RuntimeError, match="dtype"):
        eqx.tree_deserialise_leaves(path, ours(4, "batch"))


@pytest.mark.parametrize("mode", MODES)
def test_statistics_that_it_did_not_make(mode):
    layer, state = ours(4, "batch", mode=mode)
    count = 0 if mode == "ema" else 7
    vectors = (jnp.asarray(sample(4, seed, 3.0, 0.5, np.float32)) for seed in (7, 8))
    stats = jaxbn.BatchStats(*vectors, jnp.int32(count))
    momentum = None if mode == "ema" else layer.momentum
    for index, value in zip(
        indices(layer), interop.to_equinox(stats, momentum=momentum), strict=True
    ):
        state = state.set(index, value)
    x = jnp.asarray(sample(SHAPE, 0, dtype=np.float32))
    y, _ = layer.batched(x, copied(state), inference=True)
    assert error(y, jaxbn.normalize(x, stats.mean, stats.var, axis=1)) <= 1e-6
    _, state = layer.batched(x, state)
    share = 0.01 if mode == "ema" else (1 - 0.99) / (1 - 0.99**8)
    _, expected = jaxbn.batch_norm(x, stats, train=True, momentum=share, unbiased=False, axis=1)
    assert error(kept(layer, state).var, expected.var) <= 1e-6


def test_names_of_axes():
    """Several names, in a tuple or a list, and axes of vmap without a name around them."""
    x = jnp.asarray(sample((2, 3, 4, 5), 0, dtype=np.float32))
    layer, state = ours(4, "batch")
    whole, expected = by_batch(layer, x.reshape(6, 4, 5), copied(state))
    for names in (("outer", "inner"), ["outer", "inner"]):
        layer, state = ours(4, names)
        call = layer
        for name in reversed(layer.axis_name):
            call = eqx.filter_vmap(call, in_axes=(0, None), out_axes=(0, None), axis_name=name)
        y, new = call(x, state)
        assert error(y, whole.reshape(x.shape)) <= 1e-6
        assert error(kept(layer, new).var, kept(layer, expected).var) <= 1e-6
    layer, state = ours(4, "batch")
    mapped = jax.vmap(lambda x, state: by_sample(layer, x, state), (0, None))
    y, new = mapped(x, state)
    mean, var = new.get(layer.batch_state_index)
    assert mean.shape == var.shape == (2, 4)
    for part, found in zip(x, y, strict=True):
        assert error(found, by_batch(layer, part, copied(expected))[0]) <= 1e-6


def test_ensemble():
    """Layers and states that `filter_vmap` makes and maps."""
    layers, states = eqx.filter_vmap(lambda _: ours(4, "batch"))(jnp.arange(3))
    x = jnp.asarray(sample((3, *SHAPE), 0, dtype=np.float32))
    y, states = eqx.filter_vmap(by_sample)(layers, x, states)
    layer, state = ours(4, "batch")
    for i, part in enumerate(x):
        expected, new = by_sample(layer, part, copied(state))
        assert error(y[i], expected) <= 1e-6
        mean, _ = states.get(layers.batch_state_index)
        assert error(mean[i], new.get(layer.batch_state_index)[0]) <= 1e-6


@pytest.mark.parametrize("check_vma", [True, False])
def test_devices_share_a_batch(check_vma):
    x = jnp.asarray(sample((8, 4, 3), 0, dtype=np.float32))
    layer, state = ours(4, ("batch", "devices"))
    y, expected = layer.batched(x, copied(state))
    mesh = jax.make_mesh((4,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"in_specs": (P("devices"), P()), "out_specs": (P("devices"), P())}
    step = jax.shard_map(
        functools.partial(layer.batched, axis_name="devices"),
        mesh=mesh,
        check_vma=check_vma,
        **specs,
    )
    calls = [step]
    if not check_vma:
        mapped = jax.vmap(layer, (0, None), (0, None), axis_name="batch")
        calls.append(jax.shard_map(mapped, mesh=mesh, check_vma=False, **specs))
    for call in calls:
        same, new = jax.jit(call)(x, copied(state))
        assert error(same, y) <= 1e-6
        assert error(kept(layer, new).var, kept(layer, expected).var) <= 1e-6


@pytest.mark.parametrize("call", CALLS)
def test_mask(call):
    x, scale, bias, dy = problem(SHAPE, 1)
    mask = np.ones((6, 1, 3, 2), bool)
    mask[4:], mask[0, :, 1] = False, False
    expected = masked_train(x, scale, bias, dy, 1, mask)
    padded = jnp.where(mask, x, jnp.nan)
    layer, state = ours(4, "batch")
    layer = with_affine(layer, jnp.asarray(scale), jnp.asarray(bias))
    y, state = compiled(call, layer, padded, state, {"mask": mask})
    limit = tolerance("float32", x.size // 4)
    assert error(y, expected.y) <= limit
    assert error(kept(layer, state).var, expected.var) <= 2 * limit
    y, _ = compiled(
        call, layer, padded, copied(state), {"mask": jnp.asarray(mask), "inference": True}
    )
    assert np.isfinite(y).all()


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("mode", MODES)
def test_a_batch_that_is_masked_everywhere_is_none(mode, call):
    x = sample(SHAPE, 0, dtype=np.float32)
    layer, state = ours(4, "batch", mode=mode)
    whole, nothing = ({"mask": np.full((6, 1, 1, 1), counts)} for counts in (True, False))
    _, once = compiled(call, layer, x, copied(state), whole)
    for first, second in ((nothing, whole), (whole, nothing)):
        new = copied(state)
        for options in (first, second):
            _, new = compiled(call, layer, x, new, options)
        for actual, expected in zip(kept(layer, new), kept(layer, once), strict=True):
            np.testing.assert_allclose(actual, expected, 1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_a_channel_that_is_masked_in_the_first_batch(mode):
    x, mask = sample(SHAPE, 0, dtype=np.float32), np.ones((6, 4, 1, 1), bool)
    mask[:, 1] = False
    layer, state = ours(4, "batch", momentum=0.9, mode=mode)
    for counts in (mask, np.ones_like(mask)):
        _, state = compiled(by_sample, layer, x, state, {"mask": counts})
    mean, var, _ = channel_moments(x, 1)
    share = shares(mode, 0.9, 2)[1]
    mean[1], var[1] = share * mean[1], 1 - share + share * var[1]
    stats = kept(layer, state)
    assert error(stats.mean, mean) <= 2e-6
    assert error(stats.var, var) <= 2e-6


@pytest.mark.parametrize("mode", MODES)
def test_skip_nonfinite(mode):
    x = sample(SHAPE, 0, dtype=np.float32)
    layer, state = ours(4, "batch", mode=mode, skip_nonfinite=True)
    _, once = compiled(by_sample, layer, x, copied(state), {})
    bad = np.full(SHAPE, np.inf, np.float32)
    for first, second in ((bad, x), (x, bad)):
        new = copied(state)
        for batch in (first, second):
            _, new = compiled(by_sample, layer, batch, new, {})
        for actual, expected in zip(kept(layer, new), kept(layer, once), strict=True):
            np.testing.assert_allclose(actual, expected, 1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype):
    """The output has the dtype of the input, and the statistics stay in float32."""
    x, scale, bias, dy = problem(SHAPE, 1)
    x = jnp.asarray(x, dtype)
    layer, state = ours(4, "batch", dtype=dtype)
    layer = with_affine(layer, *(jnp.asarray(v, dtype) for v in (scale, bias)))
    y, state = compiled(by_sample, layer, x, state, {})
    expected = train(x, layer.weight, layer.bias, dy, 1)
    assert (layer.weight.dtype, y.dtype) == (dtype, dtype)
    assert error(y, expected.y) <= tolerance(dtype, x.size // 4)
    stats = kept(layer, state)
    assert [v.dtype for v in stats[:2]] == [np.float32] * 2
    assert error(stats.var, expected.var) <= 1e-6
    mixed, _ = by_sample(ours(4, "batch")[0], x, copied(state))
    assert mixed.dtype == dtype


def test_activation_and_residual():
    """A module as activation is part of the layer: its parameters have gradients."""
    x, _, _, dy = problem(SHAPE, 1)
    residual = jnp.cos(x)
    plain = train(x, np.ones(4), np.zeros(4), dy, 1).y + np.asarray(residual)
    layer, state = ours(4, "batch", activation="relu")
    for call in CALLS:
        y, _ = call(layer, x, copied(state), residual=residual)
        assert error(y, np.maximum(plain, 0)) <= 1e-6

    layer, state = ours(4, "batch", activation=eqx.nn.PReLU(0.3))

    @eqx.filter_jit
    @functools.partial(eqx.filter_value_and_grad, has_aux=True)
    def loss(layer, call, state):
        y, state = call(layer, x, state, residual=residual)
        return (y * dy).sum(), y

    for call in CALLS:
        (_, y), gradient = loss(layer, call, copied(state))
        assert error(y, np.where(plain >= 0, plain, 0.3 * plain)) <= 1e-6
        slope = gradient.activation.negative_slope
        assert error(slope, (dy * np.minimum(plain, 0)).sum()) <= 1e-4


def test_channels_last_and_no_affine():
    x = sample((6, 3, 2, 4), 0, dtype=np.float32)
    layer, state = ours(4, channelwise_affine=False)
    assert layer.weight is None
    assert layer.bias is None
    y, _ = layer.batched(x, state, axis=-1)
    expected = train(x, np.ones(4), np.zeros(4), x, -1)
    assert error(y, expected.y) <= tolerance("float32", 36)


class Network(eqx.Module):
    """One that takes a sample and names its batch norm."""

    layers: eqx.nn.Sequential
    head: eqx.nn.Linear

    def __init__(self, norm, key):
        keys = jax.random.split(key)
        conv = eqx.nn.Conv2d(2, 4, 3, use_bias=False, key=keys[0])
        relu = eqx.nn.Lambda(jax.nn.relu)
        self.layers = eqx.nn.Sequential([conv, norm(4, axis_name="batch", mode="batch"), relu])
        self.head = eqx.nn.Linear(4, 3, key=keys[1])

    def __call__(self, x, state):
        x, state = self.layers(x, state)
        return self.head(x.mean((1, 2))), state


def test_it_takes_the_place_of_equinox():
    """Outputs, gradients and a training of some steps, in a network of Equinox."""
    x = jnp.asarray(sample((6, 2, 5, 5), 0, dtype=np.float32))
    weights = jnp.asarray(sample((6, 3), 1, dtype=np.float32))

    @functools.partial(eqx.filter_value_and_grad, has_aux=True)
    def loss(model, state):
        y, state = jax.vmap(model, (0, None), (0, None), axis_name="batch")(x, state)
        return (jnp.sin(y) * weights).sum(), state

    @eqx.filter_jit
    def step(model, state):
        (value, state), gradient = loss(model, state)
        return eqx.apply_updates(model, jax.tree.map(lambda g: -0.01 * g, gradient)), state, value

    found = []
    for norm in (BatchNorm, eqx.nn.BatchNorm):
        model, state = eqx.nn.make_with_state(Network)(norm, jax.random.key(0))
        values = []
        for _ in range(5):
            model, state, value = step(model, state)
            values.append(value)
        found.append((values, jax.tree.leaves(eqx.filter(model, eqx.is_array))))
    for actual, expected in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(actual, expected, 1e-3, 1e-4)
    assert found[0][0][-1] < found[0][0][0]


def fresh(call, *arguments, rows=4, dtype=np.float32, **options):
    """A call of a new layer, with three channels."""
    layer, state = ours(*arguments)
    return call(layer, np.zeros((rows, 3), dtype), state, **options)


def narrowed(layer, x, state):
    """A call after statistics were cast beside the parameters."""
    cast = lambda v: v.astype("bfloat16") if v.ndim else v  # noqa: E731
    return layer.batched(x, jax.tree.map(cast, state))


ONE = "Expected more than 1 value per channel when training"
CASES = {
    "input_size": (lambda: BatchNorm(0), ValueError, "`input_size` must be at least 1"),
    "channels": (lambda: BatchNorm(2.5), TypeError, "`input_size` must be an int"),
    "momentum": (
        lambda: BatchNorm(3, momentum=1.0),
        ValueError,
        r"`momentum` must be in \[0, 1\), the weight of the old statistics in .*; got 1.0",
    ),
    "mode": (
        lambda: BatchNorm(3, mode="legacy"),
        ValueError,
        '`mode` must be "batch" or "ema"; got \'legacy\'',
    ),
    "dtype": (lambda: BatchNorm(3, dtype=int), TypeError, "`dtype` must be one of"),
    "no axis": (
        lambda: fresh(by_sample, 3),
        ValueError,
        "`axis_name` must name the axis of jax.vmap that is the batch, .* or call `layer.batched`",
    ),
    "another axis": (
        lambda: fresh(by_sample, 3, "other"),
        NameError,
        "got 'other', which is not bound here",
    ),
    "one sample": (lambda: fresh(by_sample, 3, "batch", rows=1), ValueError, ONE),
    "one sample, batched": (lambda: fresh(by_batch, 3, rows=1), ValueError, ONE),
    "other channels": (
        lambda: fresh(by_batch, 5),
        ValueError,
        r"`scale` must have shape \(3,\), the size of `x` along axis=1; got \(5,\)",
    ),
    "integers": (lambda: fresh(by_batch, 3, dtype=int), TypeError, "`x` must have one of"),
    "inference": (
        lambda: fresh(by_batch, 3, inference=1),
        TypeError,
        "`inference` must be True or False, known when traced; got 1",
    ),
    "narrow statistics": (
        lambda: fresh(narrowed, 3),
        TypeError,
        "must be float32 or float64; got stats.mean of dtype bfloat16",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_message(case):
    call, kind, message = CASES[case]
    with pytest.raises(kind, match=message):
        call()
