"""Numbers, names and layouts stay those of the release, as docs/compatibility.md promises."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx as flax_nnx
from golden import make_golden

import jaxbn
from jaxbn import linen, nnx

RECORDED, GOLDEN = make_golden.read()


def test_every_case_is_recorded():
    assert GOLDEN.keys() == {*make_golden.NAMES}


@pytest.mark.optimized
@pytest.mark.parametrize("name", make_golden.NAMES)
def test_results(name):
    """Bit for bit where the file was made, and within a few roundings elsewhere."""
    exact = make_golden.environment() == RECORDED
    found = make_golden.differences(name, GOLDEN[name])
    assert all(ulps <= (0 if exact else limit) for ulps, limit in found.values()), found


def leaves(tree):
    """Shape and dtype of each leaf, by its path."""
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(p, simple=True, separator="/"): (v.shape, v.dtype) for p, v in found
    }


def vectors(names, shape=(3,)):
    return {name: (shape, jnp.dtype("float32")) for name in names}


PARAMS, MOMENTS = vectors(("scale", "bias")), vectors(("mean", "var"))
STATS = MOMENTS | {"count": ((), jnp.dtype("int32"))}
DOMAINS = vectors(("mean", "var"), (2, 3)) | {"count": ((2,), jnp.dtype("int32"))}


def test_functions_keep_their_fields():
    assert jaxbn.BatchStats._fields == jaxbn.Moments._fields == ("mean", "var", "count")
    assert leaves(jaxbn.init_batch_stats(3)._asdict()) == STATS
    assert leaves(jaxbn.init_batch_stats(3, num_domains=2)._asdict()) == DOMAINS


@pytest.mark.parametrize(
    ("layer", "stats"), [(linen.BatchNorm(), MOMENTS), (linen.BatchNorm1d(3), STATS)]
)
def test_linen_layers_keep_their_variables(layer, stats):
    variables = layer.init(jax.random.key(0), jnp.ones((2, 3)), use_running_average=True)
    assert variables.keys() == {"params", "batch_stats"}
    assert leaves(variables["params"]) == PARAMS
    assert leaves(variables["batch_stats"]) == stats


@pytest.mark.parametrize(("make", "stats"), [(nnx.BatchNorm, MOMENTS), (nnx.BatchNorm1d, STATS)])
def test_nnx_layers_keep_their_variables(make, stats):
    layer = make(3, rngs=flax_nnx.Rngs(0))
    kinds = {flax_nnx.Param: PARAMS, flax_nnx.BatchStat: stats}
    for kind, expected in kinds.items():
        assert leaves(flax_nnx.to_pure_dict(flax_nnx.state(layer, kind))) == expected
