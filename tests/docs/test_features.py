"""The README compares libraries by what each of them does here.

A run is `(x, mask=None, **options) -> (y, running variance)`: the library's batch norm of `[N, C]`
in training. The first batch is all that its running variance keeps.
"""

import contextlib
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import numpy_reference
from helpers.reader import ROOT

from benchmarks import measuring

os.environ.setdefault("KERAS_BACKEND", "jax")


def table():
    """`{feature: {library: cell}}` of the README."""
    text = (ROOT / "README.md").read_text()
    lines = re.search(r"^\| feature \|.*?(?=\n\n)", text, re.DOTALL | re.MULTILINE)[0]
    head, _, *rows = ([c.strip() for c in line[1:-1].split("|")] for line in lines.split("\n"))
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


def with_jaxbn(x, mask=None, momentum=1.0, unbiased=False, **options):
    import jaxbn

    if mask is not None:
        options["mask"] = mask[:, None]
    stats = jaxbn.init_batch_stats(x.shape[1])
    options |= {"momentum": momentum, "unbiased": unbiased}
    y, stats = jaxbn.batch_norm(x, stats, train=True, **options)
    return y, stats.var


def with_flax(x, mask=None, momentum=0.0, **options):
    import flax.linen as nn

    layer = nn.BatchNorm(use_running_average=False, momentum=momentum, **options)
    variables = layer.init(jax.random.key(0), x)
    masks = {} if mask is None else {"mask": mask[:, None]}
    y, updates = layer.apply(variables, x, mutable=["batch_stats"], **masks)
    return y, updates["batch_stats"]["var"]


def with_haiku(x, momentum=0.0, **options):
    import haiku as hk

    def layer(x, **call):
        return hk.BatchNorm(True, True, momentum)(x, is_training=True, **call)

    function = hk.transform_with_state(layer)
    params, state = function.init(None, x)
    y, state = function.apply(params, state, None, x, **options)
    return y, state["batch_norm/~/var_ema"]["average"][0]


def with_equinox(x, momentum=0.0, **options):
    import equinox as eqx

    make = eqx.nn.make_with_state(eqx.nn.BatchNorm)
    layer, state = make(x.shape[1], "batch", momentum=momentum, mode="batch", **options)
    y, state = jax.vmap(layer, (0, None), (0, None), axis_name="batch")(x, state)
    return y, state.get(layer.batch_state_index)[1]


def with_keras(x, mask=None, momentum=0.0, **options):
    import keras

    layer = keras.layers.BatchNormalization(momentum=momentum, **options)
    layer.build(x.shape)
    stats = [jnp.asarray(v.value) for v in layer.non_trainable_variables]
    weights = [jnp.asarray(v.value) for v in layer.trainable_variables]
    y, stats = layer.stateless_call(weights, stats, x, training=True, mask=mask)
    return y, stats[1]


def with_torch(x, momentum=1.0, **options):
    import torch

    layer = torch.nn.BatchNorm1d(x.shape[1], momentum=momentum, **options)
    y = layer(torch.from_numpy(np.array(x)))
    return y.detach().numpy(), layer.running_var.numpy()


RUNS = {
    "jaxbn": with_jaxbn,
    "Flax": with_flax,
    "Haiku": with_haiku,
    "Equinox": with_equinox,
    "Keras": with_keras,
    "torch": with_torch,
}
BATCH = (3 + 2 * np.random.default_rng(0).standard_normal((64, 4))).astype(np.float32)
REAL = np.arange(64) < 48


def expected(x):
    mean, var, _ = numpy_reference.channel_moments(x, -1)
    return numpy_reference.normalized(x, mean, var, np.ones(4), np.zeros(4), -1)


def near(actual, wanted, limit=1e-3):  # which no epsilon exceeds
    return np.abs(np.asarray(actual, np.float64) - wanted).max() < limit


def stable(run):
    x = BATCH + np.float32(2e4)
    return near(run(x)[0], expected(x), 1e-5)


def masks(run):
    y, var = run(BATCH, mask=REAL)
    return near(y[REAL], expected(BATCH[REAL])) and near(var, BATCH[REAL].var(0, np.float64))


def masks_nan(run):
    def loss(x):
        return jnp.sum(jnp.where(REAL[:, None], jnp.sin(run(x, mask=REAL)[0]), 0.0))

    return bool(np.isfinite(jax.grad(loss)(np.where(REAL[:, None], BATCH, np.nan))).all())


def merges(run):
    def shard(x, mask):
        return run(x, mask=mask, axis_name="devices")[0]

    x, mask = BATCH.reshape(2, 32, 4), REAL.reshape(2, 32)
    y = jax.vmap(shard, axis_name="devices")(x, mask).reshape(64, 4)
    return near(y[REAL], expected(BATCH[REAL]))


def refuses_one_value(run):
    try:
        run(BATCH[:1])
    except ValueError:
        return True
    return False


def variance(run):
    kept = {"biased": run(BATCH)[1], "unbiased": run(BATCH)[1]}
    with contextlib.suppress(TypeError, ValueError):
        kept["unbiased"] = run(BATCH, unbiased=True)[1]
    right = [k for k, v in kept.items() if near(v, BATCH.var(0, np.float64, ddof=k == "unbiased"))]
    return "either" if len(right) == 2 else right[0]


def averages(run):
    return near(run(BATCH, momentum=None)[1], BATCH.var(0, np.float64), 0.1)


def ghost_batches(run):
    y, _ = run(BATCH, virtual_batch_size=16)
    return near(y[:16], expected(BATCH[:16]))


def renormalizes(run):
    import jaxbn

    run(BATCH, renorm=jaxbn.Renorm() if run is with_jaxbn else True)
    return True


def fuses(run):
    y, _ = run(BATCH, activation="relu", residual=np.ones_like(BATCH))
    return near(y, np.maximum(expected(BATCH) + 1, 0))


def kept(library):
    """Bytes per element between the passes, from the committed measurement."""
    rows, _ = measuring.read_csv(ROOT / "benchmarks/results/memory.csv")
    name = {"Flax": "flax.linen"}.get(library, library.lower())
    wanted = {"case": "BN+ReLU", "dtype": "bfloat16", "library": name}.items()
    (row,) = (row for row in rows if wanted <= row.items())
    return f"{float(row['kept']):g}"


FEATURES = {
    "output right to 10⁻⁵ at a mean of 10⁴ standard deviations, float32": stable,
    "masks": masks,
    "NaN under a mask stays out of gradients": masks_nan,
    "masked shards of unequal size give the result of one device": merges,
    "one value per channel in training is an error": refuses_one_value,
    "running variance": variance,
    "cumulative average of the statistics": averages,
    "ghost batches": ghost_batches,
    "batch renormalization": renormalizes,
    "residual and activation in the layer": fuses,
}
KEPT = "bytes kept per element for BN + ReLU, bfloat16"


def does(feature, library):
    """The cell of a feature: what refuses an option does not have it."""
    try:
        found = FEATURES[feature](RUNS[library])
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        found = False
    return found if isinstance(found, str) else "yes" if found else "–"


def test_the_table_is_whole():
    assert [*table()] == [*FEATURES, KEPT]


@pytest.mark.optimized
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # of the others
@pytest.mark.parametrize("library", RUNS)
def test_features(library, standard_promotion):
    if library not in ("jaxbn", "Flax"):
        pytest.importorskip(library.lower(), reason=f"{library} is not installed")
    rows, run = table(), RUNS[library]
    assert near(run(BATCH)[0], expected(BATCH))
    with jax.numpy_rank_promotion("allow"):
        found = {feature: does(feature, library) for feature in FEATURES} | {KEPT: kept(library)}
    assert found == {feature: rows[feature][library] for feature in found}
