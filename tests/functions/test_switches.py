"""What normalizes, what the statistics learn and what trains: three switches."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.compare import assert_close
from helpers.numpy_reference import problem

import jaxbn
from jaxbn import linen
from jaxbn import nnx as nnx_bn

X, SCALE, BIAS, DY = problem((8, 3, 4), -1, mean=2.0, dtype=np.float32)
MASK = np.arange(24).reshape(8, 3, 1) % 4 != 0
STATS = jaxbn.BatchStats(jnp.linspace(1.0, 2.0, 4), jnp.linspace(2.0, 3.0, 4), jnp.int32(5))
OPTIONS = [{}, {"mask": MASK, "activation": "silu"}, {"virtual_batch_size": 4, "momentum": None}]


def composed(x, train, update, **options):
    """The output and the statistics, each from the function that makes it."""
    momentum = {"momentum": options.pop("momentum", 0.1)}
    groups = {"virtual_batch_size": options.pop("virtual_batch_size", None)}
    if train:
        y, _ = jaxbn.batch_normalize(x, SCALE, BIAS, **groups, **options)
    else:
        y = jaxbn.normalize(x, STATS.mean, STATS.var, SCALE, BIAS, **options)
    moments = jaxbn.batch_moments(x, mask=options.get("mask"))
    return y, jaxbn.update_batch_stats(STATS, moments, **momentum) if update else STATS


def gradients(function, x):
    """The output, the statistics, and the gradient of both."""

    def loss(x):
        y, stats = function(x)
        return (y * DY).sum() + sum(v.astype(jnp.float32).sum() for v in stats), (y, stats)

    return jax.grad(loss, has_aux=True)(x)


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "mask", "groups"])
@pytest.mark.parametrize("traced", [(), ("train",), ("update_stats",), ("train", "update_stats")])
def test_every_combination(options, traced):
    static = [name for name in ("train", "update_stats") if name not in traced]

    @functools.partial(jax.jit, static_argnames=static)
    def run(x, **flags):
        return gradients(lambda x: jaxbn.batch_norm(x, STATS, SCALE, BIAS, **flags, **options), x)

    for train, update in itertools.product((True, False), repeat=2):
        expected = gradients(lambda x, t=train, u=update: composed(x, t, u, **options), X)
        assert_close(run(X, train=train, update_stats=update), expected, 1e-5)


def test_by_default_training_alone_updates():
    for train in (True, False, jnp.array(True), jnp.array(False)):
        run = jax.jit(jaxbn.batch_norm) if isinstance(train, jax.Array) else jaxbn.batch_norm
        actual = run(X, STATS, SCALE, BIAS, train=train)
        assert_close(actual, composed(X, bool(train), bool(train)), 1e-5)


def test_devices_share_the_batch_that_is_folded_in():
    run = functools.partial(jaxbn.batch_norm, train=False, update_stats=True, axis_name="devices")
    apart = X.reshape(2, 4, 3, 4)
    mapped = jax.vmap(lambda x: run(x, STATS, SCALE, BIAS), axis_name="devices", out_axes=(0, None))
    y, stats = mapped(apart)
    assert_close((y.reshape(X.shape), stats), composed(X, False, True), 1e-5)


LAYERS = {
    "BatchNorm": lambda module, **o: module.BatchNorm(momentum=0.9, **o),
    "BatchNorm1d": lambda module, **o: module.BatchNorm1d(**o, axis=-1),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("train", "update"), list(itertools.product((True, False), repeat=2)))
def test_layers(name, train, update):
    unbiased, size = name == "BatchNorm1d", {} if name == "BatchNorm" else {"num_features": 4}
    layer = LAYERS[name](linen, update_stats=update, **size)
    held = {k: v for k, v in STATS._asdict().items() if unbiased or k != "count"}
    variables = {"params": {"scale": SCALE, "bias": BIAS}, "batch_stats": held}
    mutable = ["batch_stats"] if update else False
    result = layer.apply(variables, X, not train, mutable=mutable)
    y, updates = result if update else (result, {"batch_stats": held})
    expected, stats = composed(X, train, False)[0], STATS
    if update:
        moments = jaxbn.batch_moments(X)
        stats = jaxbn.update_batch_stats(STATS, moments, unbiased=unbiased)
    assert_close(
        (y, updates["batch_stats"]), (expected, {k: stats._asdict()[k] for k in held}), 1e-5
    )

    of_nnx = LAYERS[name](nnx_bn, num_features=4, update_stats=update, rngs=nnx.Rngs(0))
    for key, value in {"scale": SCALE, "bias": BIAS, **held}.items():
        getattr(of_nnx, key).set_value(jnp.asarray(value))
    z = of_nnx(X, not train)
    assert_close((z, {k: getattr(of_nnx, k)[...] for k in held}), (y, updates["batch_stats"]), 1e-6)


def test_initialization_folds_nothing_in():
    for inference in (False, True):
        layer = linen.BatchNorm1d(4, axis=-1, update_stats=True)
        variables = layer.init(jax.random.key(0), X, inference)
        assert variables["batch_stats"]["count"] == 0
        np.testing.assert_array_equal(variables["batch_stats"]["mean"], 0)


def test_a_view_that_updates_nothing():
    model = nnx.Sequential(nnx_bn.BatchNorm(4, rngs=nnx.Rngs(0)))
    second = nnx.view(model, update_stats=False) if hasattr(nnx, "view") else None
    if second is None:
        pytest.skip("this flax has no nnx.view")
    y = second(X)
    np.testing.assert_array_equal(model.layers[0].mean[...], 0)
    np.testing.assert_array_equal(model(X), y)
    assert (model.layers[0].mean[...] != 0).all()


class Network(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.backbone = nnx.Sequential(nnx.Linear(4, 4, rngs=rngs), nnx_bn.BatchNorm(4, rngs=rngs))
        self.head = nnx_bn.BatchNorm1d(4, axis=-1, rngs=rngs)

    def __call__(self, x):
        return self.head(self.backbone(x))


def trained(model):
    """The gradients of a training step, which also updates what is not frozen."""
    model.train()
    gradient = nnx.grad(lambda model: jnp.square(model(X) - 1).sum())
    return nnx.to_pure_dict(gradient(model))


@pytest.mark.parametrize("affine", [True, False])
def test_frozen_layers_stay_in_inference(affine):
    model, other = Network(), Network()
    nnx_bn.freeze(model, nnx.PathContains("backbone"), affine=affine)
    gradients = trained(model)
    norm = model.backbone.layers[1]
    np.testing.assert_array_equal(norm.mean[...], 0)
    assert model.head.count[...] == 1

    other.backbone.layers[1].eval()
    other.head.train()
    expected = nnx.to_pure_dict(nnx.grad(lambda m: jnp.square(m(X) - 1).sum())(other))
    of_norm = expected["backbone"]["layers"][1]
    if affine:
        expected["backbone"]["layers"][1] = jax.tree.map(jnp.zeros_like, of_norm)
    assert_close(gradients, expected, 1e-5)

    nnx_bn.unfreeze(model)
    trained(model)
    assert (norm.mean[...] != 0).all()


def test_freezing_nothing_is_an_error():
    message = "`where` must choose at least one batch norm of jaxbn.nnx; got 'body' for a model wi"
    with pytest.raises(ValueError, match=message):
        nnx_bn.freeze(Network(), "body")
    with pytest.raises(ValueError, match="for a model with none"):
        nnx_bn.unfreeze(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    mixed = Network()
    mixed.other = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"of another library: 'other'\. Convert the model"):
        nnx_bn.freeze(mixed)
    nnx_bn.freeze(mixed, nnx.Not(nnx.PathContains("other")))


def test_frozen_linen_layers():
    layer = linen.BatchNorm(frozen=True, train_affine=False)
    variables = layer.init(jax.random.key(0), X, False)

    def loss(params, x):
        return jnp.square(layer.apply({**variables, "params": params}, x, False) - 1).sum()

    of_params, of_x = jax.grad(loss, (0, 1))(variables["params"], X)
    assert not any(v.any() for v in jax.tree.leaves(of_params))
    assert_close(of_x, 2 * (X / np.sqrt(1 + 1e-5) - 1) / np.sqrt(1 + 1e-5), 1e-5)


def test_a_mask_of_batch_norms_for_optax():
    model = Network()
    params, stats = nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat)
    mask = jaxbn.batch_norm_mask(
        {"params": params, "batch_stats": stats}, lambda path: path.startswith("backbone")
    )
    optimizer = optax.chain(optax.sgd(0.1), optax.masked(optax.set_to_zero(), mask))
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(ones, optimizer.init(params), params)
    updates = nnx.to_pure_dict(updates)
    frozen = updates["backbone"]["layers"][1]
    assert not any(v.any() for v in jax.tree.leaves(frozen))
    moving = updates["backbone"]["layers"][0], updates["head"]
    assert all(v.all() for v in jax.tree.leaves(moving))

    with pytest.raises(ValueError, match="`variables` must have the collections params and bat"):
        jaxbn.batch_norm_mask({"params": {}})
    tree = {"params": {}, "batch_stats": {"norm": {"mean": SCALE, "var": SCALE}}}
    with pytest.raises(ValueError, match="must choose at least one batch norm; got none of 'norm'"):
        jaxbn.batch_norm_mask(tree, lambda path: False)
