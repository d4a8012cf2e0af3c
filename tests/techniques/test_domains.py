"""Statistics of several domains: each is batch norm of its own samples."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx
from helpers.compare import assert_close
from helpers.numpy_reference import problem, sample
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn import linen, nnx

X, _, _, DY = problem((16, 3, 4), -1)
SCALE, BIAS = sample((3, 4), 7, 1.0, 0.5, np.float32), sample((3, 4), 8, -0.5, 1.0, np.float32)
RESIDUAL = sample(X.shape, 9, 0.2, 1.0, np.float32)
MASK = np.arange(48).reshape(16, 3, 1) % 5 != 0
STATS = jaxbn.BatchStats(
    jnp.asarray(sample((3, 4), 10, 2.0, 1.0, np.float32)),
    jnp.asarray(sample((3, 4), 11, 4.0, 0.5, np.float32)),
    jnp.array([5, 6, 7]),
)
DOMAINS = np.array([0, 2, 2, 0, 0, 2, 2, 0, 2, 0, 0, 2, 2, 0, 2, 0])  # none of the second
OPTIONS = {
    "plain": {},
    "mask": {"mask": MASK, "activation": "relu"},
    "residual": {"residual": RESIDUAL, "activation": "silu", "momentum": None},
    "groups": {"virtual_batch_size": 8, "unbiased": False},
    "renorm": {"renorm": jaxbn.Renorm(1.5, 0.5)},
}


def of(domain, tree):
    return jax.tree.map(lambda v: v[domain], tree)


def gradients(function, *arguments):
    """The output, the statistics and the gradients of both."""

    def loss(*arguments):
        y, stats = function(*arguments)
        return (y * DY[: len(y)]).sum(), (y, stats)

    return jax.grad(loss, tuple(range(len(arguments))), has_aux=True)(*arguments)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_batch_of_one_domain(options, train):
    """Traced: one compilation for all domains."""
    options = OPTIONS[options] | {"train": train}

    @jax.jit
    def run(domain):
        return gradients(
            lambda *v: jaxbn.batch_norm(v[0], STATS, *v[1:], domain=domain, **options),
            X,
            SCALE,
            BIAS,
        )

    for domain in range(3):
        (dx, *vectors), (y, stats) = run(domain)
        (same, *others), (expected, new) = gradients(
            lambda *v, d=domain: jaxbn.batch_norm(v[0], of(d, STATS), *v[1:], **options),
            X,
            SCALE[domain],
            BIAS[domain],
        )
        assert_close((dx, y), (same, expected))
        assert_close(of(domain, (*vectors, stats)), (*others, new))
        rest = [d for d in range(3) if d != domain]
        assert_close(of(jnp.array(rest), stats), of(jnp.array(rest), STATS), 0)
        assert all((v[jnp.array(rest)] == 0).all() for v in vectors)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("options", [name for name in OPTIONS if name != "groups"])
def test_samples_of_several_domains(options, train):
    """A domain without samples keeps its count."""
    options = OPTIONS[options]

    def run(x, scale, bias, **more):
        arguments = {"train": train, "domain": DOMAINS, **options, **more}
        return jaxbn.batch_norm(x, STATS, scale, bias, **arguments)

    (dx, *vectors), (y, stats) = jax.jit(functools.partial(gradients, run))(X, SCALE, BIAS)
    for domain in (0, 2):
        here = domain == DOMAINS
        rows = {k: v[here] if k in ("mask", "residual") else v for k, v in options.items()}

        def alone(*v, rows=rows, domain=domain, here=here):
            y, stats = jaxbn.batch_norm(v[0], of(domain, STATS), *v[1:], train=train, **rows)
            return jnp.zeros(X.shape).at[here].set(y), stats

        (same, *others), (expected, new) = gradients(alone, X[here], SCALE[domain], BIAS[domain])
        assert_close((dx[here], y[here]), (same, expected[here]))
        assert_close(of(domain, (*vectors, stats)), (*others, new))
    assert_close(of(1, stats), of(1, STATS), 0)


def test_a_function_of_ones_own_sees_the_whole_batch():
    own = lambda z: z - z.mean()  # noqa: E731
    options = {"train": True, "domain": DOMAINS, "mask": MASK, "residual": RESIDUAL}
    y, _ = jaxbn.batch_norm(X, STATS, SCALE, BIAS, **options)
    actual, _ = jaxbn.batch_norm(X, STATS, SCALE, BIAS, activation=own, **options)
    assert_close(actual, jnp.where(MASK, own(y), 0), 1e-5)
    half = {**options, "residual": RESIDUAL.astype(jnp.bfloat16)}
    low, _ = jaxbn.batch_norm(X.astype(jnp.bfloat16), STATS, SCALE, BIAS, activation=own, **half)
    assert low.dtype == jnp.bfloat16
    assert_close(low.astype(np.float32), actual, 0.06)


def test_a_shared_scale():
    full = np.tile(SCALE[0], (3, 1)), np.tile(BIAS[0], (3, 1))
    options = {"train": True, "domain": DOMAINS}
    actual = jaxbn.batch_norm(X, STATS, SCALE[0], BIAS[0], **options)
    assert_close(actual, jaxbn.batch_norm(X, STATS, *full, **options), 0)


@pytest.mark.parametrize("transform", ["vmap", "shard_map", "sharded"])
def test_devices(transform):
    """Moments of a domain are those of all devices, also where a device has none of its samples."""
    order = np.argsort(DOMAINS, kind="stable")
    x, domains = X[order], DOMAINS[order]
    expected = jaxbn.batch_norm(x, STATS, SCALE, BIAS, train=True, domain=domains)

    def run(x, domains, axis_name="devices"):
        options = {"train": True, "domain": domains, "axis_name": axis_name}
        return jaxbn.batch_norm(x, STATS, SCALE, BIAS, **options)

    mesh = jax.make_mesh((4,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    if transform == "vmap":
        mapped = jax.vmap(run, out_axes=(0, None), axis_name="devices")
        y, stats = mapped(x.reshape(4, 4, 3, 4), domains.reshape(4, 4))
        y = y.reshape(x.shape)
    elif transform == "shard_map":
        split = P("devices")
        mapped = jax.shard_map(run, mesh=mesh, in_specs=split, out_specs=(split, P()))
        y, stats = jax.jit(mapped)(x, domains)
    else:
        put = functools.partial(jax.device_put, device=jax.NamedSharding(mesh, P("devices")))
        y, stats = jax.jit(functools.partial(run, axis_name=None))(put(x), put(domains))
    assert_close((y, stats), expected)


def test_no_such_domain():
    """NaN where it is traced; padding may belong to none."""
    run = jax.jit(
        lambda domain, mask=True: jaxbn.batch_norm(X, STATS, train=True, domain=domain, mask=mask)
    )
    for domain in (-1, 3):
        y, stats = run(domain)
        assert np.isnan(y).all()
        assert_close(stats, STATS, 0)
    wrong, padded = np.where(DOMAINS == 2, 3, DOMAINS), (DOMAINS != 2)[:, None, None]
    assert (np.isnan(run(wrong)[0]).all((1, 2)) == (DOMAINS == 2)).all()
    assert np.isfinite(run(wrong, padded)[0]).all()


def test_one_domain_of_the_batch_is_that_of_all_devices():
    """NaN where devices name different ones: each would mix its samples with the others'."""
    x = X.reshape(4, 4, 3, 4)

    def run(x, domain):
        return jaxbn.batch_norm(x, STATS, train=True, domain=domain, axis_name="devices")

    mapped = jax.vmap(run, (0, 0), axis_name="devices")
    y, stats = mapped(x, jnp.full(4, 2))
    expected = jaxbn.batch_norm(X, STATS, train=True, domain=2)
    assert_close((y.reshape(X.shape), of(0, stats)), expected)
    for different in ([0, 1, 2, 1], [1, 1, 1, 0]):
        y, stats = mapped(x, jnp.array(different))
        assert np.isnan(y).all()
        assert_close(stats, jax.tree.map(lambda v: jnp.stack([v] * 4), STATS), 0)


@pytest.mark.parametrize("domain", [1, DOMAINS])
def test_inference_asks_for_no_devices(domain):
    def run(x, axis_name):
        options = {"train": False, "domain": domain, "axis_name": axis_name}
        return jaxbn.batch_norm(x, STATS, SCALE, BIAS, **options)[0]

    alone = functools.partial(run, axis_name="devices")
    assert_close([alone(X), jax.jit(alone)(X)], [run(X, None)] * 2, 1e-6)


def test_initial_statistics():
    stats, one = jaxbn.init_batch_stats(4, num_domains=3), jaxbn.init_batch_stats(4)
    for domain in range(3):
        assert_close(of(domain, stats), one, 0)
    assert jax.tree.map(jnp.shape, stats) == jaxbn.BatchStats((3, 4), (3, 4), (3,))


def linen_layers(**options):
    return {
        "Flax": linen.BatchNorm(momentum=0.9, num_domains=3, **options),
        "torch": linen.BatchNorm1d(4, axis=-1, num_domains=3, **options),
    }


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", ["Flax", "torch"])
def test_linen(name, shared):
    layer = linen_layers(shared_affine=shared)[name]
    variables = layer.init(jax.random.key(0), X, True, domain=0)
    affine = {"scale": SCALE[0], "bias": BIAS[0]} if shared else {"scale": SCALE, "bias": BIAS}
    assert jax.tree.map(jnp.shape, variables["params"]) == jax.tree.map(jnp.shape, affine)
    variables, stats = {**variables, "params": affine}, jaxbn.init_batch_stats(4, num_domains=3)
    step = jax.jit(functools.partial(layer.apply, mutable=["batch_stats"]), static_argnums=2)
    for domain in (0, 2, DOMAINS):
        y, updates = step(variables, X, False, domain=domain)
        expected, stats = jaxbn.batch_norm(
            X, stats, **affine, train=True, domain=domain, unbiased=name == "torch"
        )
        variables |= updates
        assert_close(y, expected)
    assert_close(updates["batch_stats"], {k: stats._asdict()[k] for k in updates["batch_stats"]})
    expected, _ = jaxbn.batch_norm(X, stats, **affine, train=False, domain=DOMAINS)
    assert_close(layer.apply(variables, X, True, domain=DOMAINS), expected)


@pytest.mark.parametrize("shared", [True, False])
def test_nnx(shared):
    stats = jaxbn.init_batch_stats(4, num_domains=3)
    expected, stats = jaxbn.batch_norm(X, stats, train=True, domain=DOMAINS, unbiased=False)
    _, unbiased = jaxbn.batch_norm(
        X, jaxbn.init_batch_stats(4, num_domains=3), train=True, domain=DOMAINS
    )
    options = {"num_domains": 3, "shared_affine": shared, "rngs": flax_nnx.Rngs(0)}
    flax = nnx.BatchNorm(4, momentum=0.9, **options)
    torch = nnx.BatchNorm1d(4, axis=-1, **options)
    run = flax_nnx.jit(lambda layer, domain: layer(X, domain=domain))
    for layer, right in ((flax, stats), (torch, unbiased)):
        assert_close(run(layer, DOMAINS), expected)
        assert_close([layer.mean[...], layer.var[...]], list(right[:2]))
        assert layer.scale[...].shape == ((4,) if shared else (3, 4))
    assert (torch.count[...] == np.array([1, 0, 1])).all()


def test_several_channel_axes():
    layer = linen.BatchNorm(axis=(1, 2), num_domains=2)
    variables, domain = layer.init(jax.random.key(0), X, True, domain=0), np.arange(16) % 2
    assert variables["batch_stats"]["mean"].shape == (2, 3, 4)
    y, updates = layer.apply(variables, X, False, domain=domain, mutable=["batch_stats"])
    flat, start = X.reshape(16, 12), jaxbn.init_batch_stats(12, num_domains=2)
    expected, stats = jaxbn.batch_norm(
        flat, start, train=True, domain=domain, unbiased=False, momentum=0.01
    )
    assert_close(y.reshape(16, 12), expected)
    assert_close(updates["batch_stats"]["var"].reshape(2, 12), stats.var)


def flax_call(domain=None, **options):
    return linen.BatchNorm(**options).init_with_output(jax.random.key(0), X, False, domain=domain)


def functional(domain=0, stats=STATS, scale=None, x=X):
    return jaxbn.batch_norm(x, stats, scale, train=True, domain=domain)


ERRORS = {
    "one set": (
        lambda: functional(stats=jaxbn.init_batch_stats(4)),
        "as `init_batch_stats(C, num_domains=k)` makes them; got (4,) and (4,) and ().",
    ),
    "no statistics": (lambda: functional(stats=None), "makes them; got None."),
    "out of range": (lambda: functional(3), "`domain` must be from 0 to 2; got 3."),
    "negative": (lambda: functional(np.full(16, -1)), "`domain` must be from 0 to 2; got [-1"),
    "samples": (
        lambda: functional(np.zeros(3, int)),
        "or one for each sample, of shape (16,); got int32 of shape (3,).",
    ),
    "floats": (lambda: functional(0.5), "`domain` must be an integer, or one for each sample"),
    "scale": (
        lambda: functional(scale=X[:, 0]),
        "With `domain`, `scale` must have shape [C], shared, or [k, C]; got (16, 4) for stats.mean "
        "of shape (3, 4).",
    ),
    "no domains": (lambda: jaxbn.init_batch_stats(4, num_domains=0), "`num_domains` must be at"),
    "a layer without": (lambda: flax_call(1), "got domain=1 for a layer with num_domains=None."),
    "a call without": (
        lambda: flax_call(num_domains=2),
        "got domain=None for a layer with num_domains=2.",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    call, words = ERRORS[case]
    with pytest.raises(ValueError, match=re.escape(words)):
        call()
