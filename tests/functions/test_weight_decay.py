"""Weight decay leaves normalization alone, in every tree of parameters and inside of optax."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze
from helpers.numpy_reference import sample

import jaxbn
from jaxbn import linen

NORM = {"bias": False, "scale": False}
DENSE = {"bias": True, "kernel": True}


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), name="conv")(x)
        x = linen.BatchNorm2d(4, axis=-1, name="torch_norm")(x, True)
        x = linen.BatchNorm(True, name="flax_norm")(x)
        x = nn.LayerNorm(name="layer_norm")(x)
        x = nn.GroupNorm(2, name="group_norm")(x)
        x = nn.Dense(3, use_bias=False, name="scale")(x)  # a module of that name is no scale
        return nn.BatchNorm(True, name="norm")(x)


def linen_params():
    return Network().init(jax.random.key(0), jnp.ones((1, 4, 4, 1)))["params"]


EXPECTED = {
    "conv": DENSE,
    "flax_norm": NORM,
    "group_norm": NORM,
    "layer_norm": NORM,
    "norm": NORM,
    "scale": {"kernel": True},
    "torch_norm": NORM,
}


@pytest.mark.parametrize("kind", [dict, freeze])
def test_linen(kind):
    params = kind(linen_params())
    mask = jaxbn.weight_decay_mask(params)
    assert mask == kind(EXPECTED)
    assert jax.tree.structure(mask) == jax.tree.structure(params)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: jax.Array | None
    bias: jax.Array
    scale: jax.Array | None = None


V = jnp.ones(2)
TREES = {
    "framework-free": (
        {"w1": V, "w2": V, "scale": V, "bias": V},
        {"w1": True, "w2": True, "scale": False, "bias": False},
    ),
    "beside a kernel": ({"kernel": V, "bias": V, "scale": V}, {**DENSE, "scale": False}),
    "no kernel in the same module": (
        {"norm": {"bias": V, "inner": {"kernel": V}}, "kernel": V},
        {"norm": {"bias": False, "inner": {"kernel": True}}, "kernel": True},
    ),
    "a kernel of parts": (
        {"kernel": {"values": V, "scale": V}, "bias": V},
        {"kernel": {"values": True, "scale": False}, "bias": True},
    ),
    "parts of a bias": ({"bias": {"scale": V, "w": V}}, {"bias": {"scale": False, "w": True}}),
    "list": ([{"kernel": V, "bias": V}, {"scale": V, "bias": V}], [DENSE, NORM]),
    "tuple": (({"bias": V}, V, V), ({"bias": False}, True, True)),
    "dataclass": (
        {"a": Layer(V, V), "b": Layer(None, V, V)},
        {"a": Layer(True, True), "b": Layer(None, False, False)},
    ),
    "named tuple": (jaxbn.BatchStats(V, V, V), jaxbn.BatchStats(True, True, True)),
    "other names": ({"scales": V, "biases": V}, {"scales": True, "biases": True}),
    "empty": ({}, {}),
    "one array": (V, True),
}


@pytest.mark.parametrize("case", TREES)
def test_tree(case):
    params, expected = TREES[case]
    assert jaxbn.weight_decay_mask(params) == expected


class NNXNetwork(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(4, 3, rngs=rngs), nnx.LayerNorm(3, rngs=rngs)])

    def __call__(self, x):
        x = self.norm(self.conv(x))
        for block in self.blocks:
            x = block(x)
        return x


def test_nnx():
    state = nnx.state(NNXNetwork(), nnx.Param)
    mask = jaxbn.weight_decay_mask(state)
    assert jax.tree.structure(mask) == jax.tree.structure(state)
    names = {jax.tree_util.keystr(p): v for p, v in jax.tree_util.tree_leaves_with_path(mask)}
    assert {name for name, decayed in names.items() if not decayed} == {
        "['blocks'][1]['bias'].value",
        "['blocks'][1]['scale'].value",
        "['norm']['bias'].value",
        "['norm']['scale'].value",
    }
    assert len(names) == 8


pytestmark = pytest.mark.usefixtures("standard_promotion")


def decayed(optimizer, params):
    """Which parameters change where all gradients are zero, as only weight decay makes them."""
    updates, _ = optimizer.update(
        jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
    )
    return jax.tree.map(lambda update: bool((update != 0).all()), updates)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda mask: optax.adamw(0.1, mask=mask),
        lambda mask: optax.lion(0.1, weight_decay=0.1, mask=mask),
        lambda mask: optax.chain(optax.add_decayed_weights(0.1, mask), optax.sgd(0.1)),
    ],
)
def test_in_optax(optimizer):
    params = jax.tree.map(lambda p: p + 1.0, linen_params())
    assert decayed(optimizer(jaxbn.weight_decay_mask), params) == EXPECTED
    assert decayed(optimizer(jaxbn.weight_decay_mask(params)), params) == EXPECTED
    assert set(jax.tree.leaves(decayed(optimizer(None), params))) == {True}


def test_in_an_nnx_optimizer():
    model = NNXNetwork()
    nnx.update(model, jax.tree.map(lambda p: p + 1.0, nnx.state(model, nnx.Param)))
    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    optimizer = nnx.Optimizer(model, optax.adamw(0.1, mask=jaxbn.weight_decay_mask), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        gradients = nnx.grad(lambda model: 0.0 * model(x).sum())(model)
        optimizer.update(model, gradients)

    step(model, optimizer, jnp.asarray(sample((2, 4, 4, 1), 0, dtype=np.float32)))
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    changed = jax.tree.map(lambda a, b: bool((a != b).all()), before, after)
    assert changed == {"conv": DENSE, "norm": NORM, "blocks": {0: DENSE, 1: NORM}}


def test_the_names_of_equinox():
    dense = {"weight": jnp.ones((4, 2)), "bias": jnp.zeros(4)}
    norm = {"weight": jnp.ones(4), "bias": jnp.zeros(4)}
    assert jaxbn.weight_decay_mask({"dense": dense, "norm": norm}) == {
        "dense": {"weight": True, "bias": True},
        "norm": {"weight": False, "bias": False},
    }


def test_the_names_of_haiku():
    dense = {"w": jnp.ones((4, 2)), "b": jnp.zeros(2)}
    norm = {"scale": jnp.ones((1, 1, 1, 4)), "offset": jnp.zeros((1, 1, 1, 4))}
    assert jaxbn.weight_decay_mask({"linear": dense, "batch_norm": norm}) == {
        "linear": {"w": True, "b": True},
        "batch_norm": {"scale": False, "offset": False},
    }


VECTOR, MATRIX = np.ones(3), np.ones((3, 3))
OTHER_TREES = {
    "several axes": ({"weight": MATRIX, "bias": MATRIX}, {"weight": False, "bias": False}),
    "Keras": (
        {"bn": {"gamma": VECTOR, "beta": VECTOR}, "dense": {"kernel": MATRIX, "bias": VECTOR}},
        {"bn": {"gamma": False, "beta": False}, "dense": {"kernel": True, "bias": True}},
    ),
    "slashes": (
        {"bn/scale": VECTOR, "bn/bias": VECTOR, "dense/kernel": MATRIX, "dense/bias": VECTOR},
        {"bn/scale": False, "bn/bias": False, "dense/kernel": True, "dense/bias": True},
    ),
    "dots": (
        {"bn.weight": VECTOR, "bn.bias": VECTOR, "fc.weight": MATRIX, "fc.bias": VECTOR},
        {"bn.weight": False, "bn.bias": False, "fc.weight": True, "fc.bias": True},
    ),
    "tuples": (
        {("bn", "scale"): VECTOR, ("bn", "bias"): VECTOR, ("fc", "kernel"): MATRIX},
        {("bn", "scale"): False, ("bn", "bias"): False, ("fc", "kernel"): True},
    ),
}


@pytest.mark.parametrize("name", OTHER_TREES)
def test_other_trees(name):
    params, expected = OTHER_TREES[name]
    assert jaxbn.weight_decay_mask(params) == expected


def test_a_tree_without_names_is_refused():
    flat = nnx.to_flat_state(nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.Param))
    with pytest.raises(ValueError, match="`params` must tell the names of its leaves"):
        jaxbn.weight_decay_mask(flat)
