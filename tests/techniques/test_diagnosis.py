"""Faults are planted in trained networks and found by their names; healthy networks have none."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn.linen import BatchNorm, BatchNorm2d

pytestmark = [pytest.mark.trained, pytest.mark.usefixtures("standard_promotion")]

CLASSES, FEATURES, SIZE = 4, 8, 32


class Network(nn.Module):
    """Three blocks; `stuck` is a mode for all calls."""

    momentum: float = 0.9
    epsilon: float = 1e-5
    dropout: float = 0.0
    dtype: str = "float32"
    group: int | None = None
    residual: bool = False
    stuck: bool | None = None
    update_stats: bool | None = None

    @nn.compact
    def __call__(self, x, train, mask=None):
        inference = not train if self.stuck is None else self.stuck
        for _ in range(3):
            h = nn.Dense(16, dtype=self.dtype)(x)
            norm = BatchNorm(
                momentum=self.momentum,
                epsilon=self.epsilon,
                dtype=self.dtype,
                activation="relu",
                update_stats=self.update_stats,
                virtual_batch_size=None if inference else self.group,
            )
            h = norm(h, inference, mask=mask)
            h = nn.Dropout(self.dropout, deterministic=not train)(h)
            x = x + h if self.residual and x.shape == h.shape else h
        return nn.Dense(CLASSES)(x.astype(jnp.float32))


class Images(nn.Module):
    """Two blocks with torch's layers."""

    momentum: float = 0.1

    @nn.compact
    def __call__(self, x, train, mask=None):
        for width in (8, 12):
            x = nn.Conv(width, (3, 3), use_bias=False)(x)
            x = BatchNorm2d(width, momentum=self.momentum, axis=-1, activation="relu")(x, not train)
        return nn.Dense(CLASSES)(x.mean((1, 2)))


def samples(count, seed=0, image=False):
    """Correlated features of a mean other than 0, and classes that are apart."""
    random, fixed = np.random.RandomState(seed), np.random.RandomState(42)
    y = random.randint(0, CLASSES, count)
    if image:
        x = 2 + random.normal(size=(count, 6, 6, 2)) + fixed.normal(size=(CLASSES, 1, 1, 2))[y]
    else:
        x = 2 + random.normal(size=(count, FEATURES)) @ fixed.normal(size=(FEATURES, FEATURES))
        x += 1.5 * fixed.normal(size=(CLASSES, FEATURES))[y]
    return x.astype(np.float32), y


def trained(model, batches, rate, seed=0, update=True):
    """The variables after a step for each batch of (x, y, mask)."""
    variables = dict(model.init(jax.random.key(seed), batches[0][0], train=False))
    state = variables, optax.sgd(rate, momentum=0.9).init(variables["params"])
    for i in range(len(batches[0])):
        state = step(model, state, batches, i, rate, update)
    return state[0]


@functools.partial(jax.jit, static_argnames=("model", "update"))
def step(model, state, batches, i, rate, update):
    variables, optimizer = state
    x, y, mask = jax.tree.map(lambda v: v[i], batches)

    def loss(params):
        out, new = model.apply(
            {**variables, "params": params},
            x,
            train=True,
            mask=mask,
            rngs={"dropout": jax.random.key(i)},
            mutable=["batch_stats"],
        )
        return optax.softmax_cross_entropy_with_integer_labels(out, y).mean(), new

    grads, new = jax.grad(loss, has_aux=True)(variables["params"])
    changes, optimizer = optax.sgd(rate, momentum=0.9).update(grads, optimizer)
    stats = new["batch_stats"] if update else variables["batch_stats"]
    params = optax.apply_updates(variables["params"], changes)
    return {"params": params, "batch_stats": stats}, optimizer


def drawn(x, y, steps, size=SIZE, mask=None, order=None, seed=0):
    """Batches in a random order, or in the one given, stacked."""
    random = np.random.RandomState(seed)
    rows = np.stack([random.permutation(len(x))[:size] for _ in range(steps)])
    rows = rows if order is None else order
    mask = np.ones(len(x), bool) if mask is None else mask
    shape = (*rows.shape, *[1] * (x.ndim - 1))
    return jnp.asarray(x[rows]), jnp.asarray(y[rows]), jnp.asarray(mask[rows]).reshape(shape)


def last(batches, count=8):
    """The newest batches, as a list."""
    return [jax.tree.map(lambda v, i=i: v[i], batches) for i in range(-count, 0)]


def applying(model, masks=True):
    def apply(variables, batch, train, mutable):
        mask = batch[2] if masks else None
        rngs = {"dropout": jax.random.key(5)}
        return model.apply(variables, batch[0], train=train, mask=mask, rngs=rngs, mutable=mutable)

    return apply


def kinds(model, variables, batches, evaluation=None, masks=True, scores=None):
    """The names of what is found."""
    explanation = jaxbn.linen.explain_gap(
        applying(model, masks), variables, batches, evaluation, scores=scores
    )
    assert all(finding.problem and finding.remedy for finding in explanation)
    assert all(kind in str(explanation) for kind in explanation.kinds)
    return explanation.kinds


@pytest.fixture(scope="module")
def data():
    return samples(512)


@pytest.fixture(scope="module")
def others():
    """Samples of the same kind that no training saw, in batches."""
    x, y = samples(256, seed=9)
    return last(drawn(x, y, 8), 8)


@pytest.fixture(scope="module")
def network(data):
    """A network, its variables, and the batches of its last steps."""
    batches = drawn(*data, 120)
    return Network(), trained(Network(), batches, 0.05), last(batches)


@pytest.fixture(scope="module")
def images():
    """The same with images."""
    batches = drawn(*samples(256, image=True), 60)
    return Images(), trained(Images(), batches, 0.05), last(batches)


# Healthy networks


@pytest.mark.parametrize(
    ("fields", "size", "rate"),
    [
        ({}, 32, 0.05),
        ({}, 8, 0.01),
        ({"dtype": "bfloat16"}, 32, 0.05),
        ({"group": 8}, 32, 0.05),
        ({"residual": True}, 32, 0.05),
        ({"dropout": 0.05}, 32, 0.05),
    ],
)
def test_healthy_networks_are_not_blamed(fields, size, rate, data, others):
    model, batches = Network(**fields), drawn(*data, 120, size)
    variables = trained(model, batches, rate)
    explanation = jaxbn.linen.explain_gap(applying(model), variables, last(batches), others)
    assert explanation == ()
    assert "nothing found" in str(explanation)


def test_a_healthy_network_of_images_and_one_with_masks(images, data):
    model, variables, batches = images
    assert kinds(model, variables, batches, batches) == []
    mask = np.random.RandomState(3).rand(512) < 0.7
    x = np.where(mask[:, None], data[0], 0)
    batches = drawn(x, data[1], 120, mask=mask)
    assert kinds(Network(), trained(Network(), batches, 0.05), last(batches)) == []


# Faults of training


def test_statistics_that_are_not_written_back(data):
    batches = drawn(*data, 40)
    variables = trained(Network(), batches, 0.05, update=False)
    explanation = jaxbn.linen.explain_gap(
        applying(Network()), variables, last(batches), scores=(0.99, 0.31)
    )
    assert explanation.kinds == ["not_written_back"]
    assert explanation[0].layers == ("BatchNorm_0", "BatchNorm_1", "BatchNorm_2")
    assert "mutable=" in str(explanation)
    assert "0.99 in training mode, 0.31 in inference mode" in str(explanation)


def test_momentum_the_wrong_way_round(data, images):
    batches = drawn(*data, 120)
    variables = trained(Network(momentum=0.1), batches, 0.05)
    assert kinds(Network(momentum=0.1), variables, last(batches)) == ["momentum"]
    # Where the momentum is not known, the newest batch tells it.
    assert kinds(Network(), variables, last(batches)) == ["momentum"]
    model = Images(momentum=0.9)
    variables = trained(model, drawn(*samples(256, image=True), 40), 0.05)
    assert kinds(model, variables, images[2]) == ["momentum"]


def test_a_momentum_that_moves_nothing(data):
    model = Network(momentum=1)
    variables = trained(model, drawn(*data, 3), 0.05)
    assert kinds(model, variables, last(drawn(*data, 8))) == ["momentum_of_zero"]


@pytest.mark.parametrize(("momentum", "steps"), [(0.99, 30), (0.999, 100), (0.9, 3)])
def test_too_few_steps_for_the_momentum(momentum, steps, data):
    batches = drawn(*data, steps)
    model = Network(momentum=momentum)
    variables = trained(model, batches, 0.05)
    found = jaxbn.linen.explain_gap(applying(model), variables, last(batches, min(steps, 8)))
    assert found.kinds == ["too_few_steps"]
    part = 1 - momentum**steps
    assert found[0].numbers["part"] == pytest.approx(part, abs=0.1)


def test_weights_that_change_faster_than_the_statistics_follow(data):
    """Told where the scores of both modes differ, and nothing else explains it."""
    model, batches = Network(), drawn(*data, 60)
    variables = trained(model, batches, 0.1)
    several = last(batches)
    assert kinds(model, variables, several) == []
    assert kinds(model, variables, several, scores=(0.9, 0.9)) == []
    found = jaxbn.linen.explain_gap(applying(model), variables, several, scores=(0.9, 0.85))
    assert found.kinds == ["behind"]
    assert found[0].numbers["apart"] > found[0].numbers["chance"]


def test_sorted_data(data):
    x, y = data
    order = np.argsort(y, kind="stable")
    rows = np.stack([np.roll(order, -SIZE * i)[:SIZE] for i in range(64)])
    batches = drawn(x, y, 64, order=rows)
    variables = trained(Network(), batches, 0.05)
    assert kinds(Network(), variables, last(batches, 16)) == ["unlike_batches"]


def test_statistics_of_other_weights(data, network):
    model, variables, batches = network
    early = trained(model, drawn(*data, 20), 0.2)
    late = trained(model, drawn(*data, 120), 0.2)
    averaged = jax.tree.map(lambda a, b: (a + b) / 2, early["params"], late["params"])
    assert kinds(model, {**late, "params": averaged}, batches) == ["other_model"]
    other = trained(model, drawn(*data, 120), 0.05, seed=3)
    mixed = {**variables, "batch_stats": other["batch_stats"]}
    assert kinds(model, mixed, batches) == ["other_model"]


def test_small_differences_are_told_where_the_scores_differ(data):
    model, batches = Network(), drawn(*data, 60)
    variables = trained(model, batches, 0.2)
    first = model.init(jax.random.key(0), batches[0][0], train=False)
    mixed = jax.tree.map(lambda a, b: 0.8 * a + 0.2 * b, variables["params"], first["params"])
    variables = {**variables, "params": mixed}
    assert kinds(model, variables, last(batches), scores=(0.9, 0.6)) == ["other_model"]


def test_batches_of_one_sample():
    x, y = samples(128, image=True)
    batches = drawn(x, y, 60, 1)
    variables = trained(Images(), batches, 0.01)
    found = jaxbn.linen.explain_gap(applying(Images()), variables, last(batches))
    assert found.kinds == ["batch_of_one"]
    batches = drawn(*samples(512), 60, 2)
    assert kinds(Network(), trained(Network(), batches, 0.01), last(batches)) == ["small_batches"]


def test_another_epsilon_than_in_training(data):
    x, y = data
    batches = drawn(3e-3 * x, y, 120)
    variables = trained(Network(epsilon=1e-3), batches, 0.05)
    found = jaxbn.linen.explain_gap(applying(Network(epsilon=1e-5)), variables, last(batches))
    assert found.kinds == ["epsilon"]
    assert found[0].layers == ("BatchNorm_0",)


def test_a_mask_that_is_left_out(data, others):
    mask = np.random.RandomState(3).rand(512) < 0.6
    batches = drawn(np.where(mask[:, None], data[0], 0), data[1], 100, mask=mask)
    x, y, masks = batches
    without = trained(Network(), (x, y, jnp.ones_like(masks)), 0.05)
    found = jaxbn.linen.explain_gap(applying(Network()), without, last(batches))
    assert found.kinds == ["mask"]
    assert found[0].numbers["part"] == pytest.approx(0.4, abs=0.12)
    # Without masks anywhere, evaluation data without padding tell it.
    assert kinds(Network(), without, last(batches), others, masks=False) == ["mask"]
    variables = trained(Network(), batches, 0.05)
    assert kinds(Network(), variables, last(batches), masks=False) == ["mask_of_batches"]


def test_dropout_before_batch_norm(data):
    model, batches = Network(dropout=0.5), drawn(*data, 120)
    variables = trained(model, batches, 0.05)
    assert kinds(model, variables, last(batches)) == ["dropout"]


def test_an_extreme_batch(network, images):
    for model, variables, batches in (network, images):
        x, _, mask = batches[0]
        _, new = model.apply(variables, 30 * x, train=True, mask=mask, mutable=["batch_stats"])
        assert kinds(model, {**variables, **new}, batches) == ["extreme_batch"]


def test_modes_that_the_layers_do_not_follow(network):
    model, variables, batches = network
    stuck = model.clone(stuck=True)
    assert kinds(stuck, variables, batches) == ["inference_in_training"]
    assert kinds(model.clone(stuck=False), variables, batches) == ["batch_in_inference"]


def test_statistics_that_training_leaves(data, network):
    """Weights go on from a trained network, and statistics stay."""
    model = Network(update_stats=False)
    state = network[1], optax.sgd(0.2, momentum=0.9).init(network[1]["params"])
    batches = drawn(3 - data[0], data[1], 60)
    for i in range(60):
        state = step(model, state, batches, i, 0.2, True)
    assert kinds(model, state[0], last(batches)) == ["not_updated"]
    fresh = trained(model, batches, 0.05)
    assert kinds(model, fresh, last(batches)) == ["frozen"]


# Faults of statistics that were read, converted or changed, in a network and one of images


def moments_of(model, variables, batches):
    """The moments of each batch in training mode, through the layers."""
    zeros = jax.tree.map(jnp.zeros_like, variables["batch_stats"])
    for path in zeros:
        zeros[path]["count"] = jnp.zeros_like(zeros[path]["mean"])

    @jax.jit
    def collected(variables, batch):
        variables = {**variables, "batch_moments": zeros}
        return applying(model)(variables, batch, True, ["batch_moments"])[1]["batch_moments"]

    return [collected(variables, batch) for batch in batches]


@pytest.fixture(scope="module")
def known(network, images):
    """For each network its statistics as NumPy arrays, and the moments of batches."""
    return [
        (jax.tree.map(np.asarray, variables["batch_stats"]), moments_of(model, variables, batches))
        for model, variables, batches in (network, images)
    ]


CONVERTED = {
    "std": lambda mean, var: (mean, np.sqrt(var)),
    "1/std": lambda mean, var: (mean, 1 / np.sqrt(var)),
    "1/var": lambda mean, var: (mean, 1 / var),
    "second moment": lambda mean, var: (mean, var + mean**2),
    "square": lambda mean, var: (mean, var**2),
    "logarithm": lambda mean, var: (mean, np.log(var)),
    "sum of squares": lambda mean, var: (mean, 32 * var),
    "divided twice": lambda mean, var: (mean, var / 32),
    "sign": lambda mean, var: (-mean, var),
    "interchanged": lambda mean, var: (var, np.abs(mean)),
    "no mean": lambda mean, var: (0 * mean, var),
    "no variance": lambda mean, var: (mean, 1 + 0 * var),
}


@pytest.mark.parametrize("conversion", CONVERTED)
def test_another_quantity_in_the_place_of_mean_or_variance(conversion, known):
    for stats, moments in known:
        wrong = {}
        for path, layer in stats.items():
            mean, var = CONVERTED[conversion](layer["mean"], layer["var"])
            wrong[path] = {**layer, "mean": mean, "var": var}
        found = {*jaxbn.explain_gap(wrong, moments).kinds}
        negative = {"negative_variance"} if conversion == "logarithm" else set()
        assert (
            found == {"other_quantity"}
            or found == negative
            or found == {"other_quantity", *negative}
        )


def changed(stats, place, **functions):
    """The statistics with those of one layer changed."""
    path = sorted(stats)[place]
    new = {name: function(stats[path][name].copy()) for name, function in functions.items()}
    return {**stats, path: {**stats[path], **new}}


def put(index, value):
    def function(array):
        array[index] = value
        return array

    return function


@pytest.mark.parametrize(
    ("kind", "functions"),
    [
        ("non_finite", {"mean": put(3, np.nan)}),
        ("non_finite", {"var": put(0, np.inf)}),
        ("negative_variance", {"var": put(2, -1e-4)}),
        ("damaged_channels", {"mean": put(1, 40.0)}),
        ("damaged_channels", {"var": put(1, 1e6)}),
        ("channel_order", {"mean": lambda v: v[::-1], "var": lambda v: v[::-1]}),
        ("not_written_back", {"mean": np.zeros_like, "var": np.ones_like}),
        ("small_variance", {"var": lambda v: 1e-3 * np.random.RandomState(0).rand(*v.shape) * v}),
        ("half_precision", {"mean": lambda v: v.astype(jnp.bfloat16)}),
    ],
)
def test_one_layer_is_wrong(kind, functions, known):
    for stats, moments in known:
        found = jaxbn.explain_gap(changed(stats, 1, **functions), moments)
        assert found.kinds == [kind]
        assert found[0].layers == (sorted(stats)[1],)


def test_the_statistics_of_two_layers_are_interchanged(known):
    stats, moments = known[0]
    paths = "BatchNorm_1", "BatchNorm_2"
    swapped = {**stats, paths[0]: stats[paths[1]], paths[1]: stats[paths[0]]}
    found = jaxbn.explain_gap(swapped, moments)
    assert {*found.kinds} == {"other_layer"}
    assert [finding.numbers["layer"] for finding in found] == [*paths[::-1]]


# Faults of the evaluation data


@pytest.mark.parametrize(
    ("kind", "function"),
    [
        ("input_scale", lambda x: 255 * x),
        ("input_scale", lambda x: x / 255),
        ("input_shift", lambda x: x + 3),
        ("other_data", lambda x: x.at[:, :4].multiply(3)),
        ("non_finite_batches", lambda x: x.at[0, 1].set(jnp.nan)),
    ],
)
def test_evaluation_data_of_another_kind(kind, function, network, others):
    model, variables, batches = network
    wrong = [(function(x), *rest) for x, *rest in others]
    found = jaxbn.linen.explain_gap(applying(model), variables, batches, wrong)
    assert found.kinds == [kind]
    assert found[0].layers == ("BatchNorm_0",)
    if kind == "input_scale":
        scale = float(function(1.0))
        assert found[0].numbers["scale"] == pytest.approx(scale, rel=0.2)


def test_statistics_that_evaluation_updated(network, others):
    model, variables, batches = network
    wrong = [(1.5 * x + 1, *rest) for x, *rest in others]
    for x, _, mask in 5 * wrong:
        _, new = model.apply(variables, x, train=True, mask=mask, mutable=["batch_stats"])
        variables = {**variables, **new}
    assert "evaluation_statistics" in kinds(model, variables, batches, wrong)


# The report


def test_a_report_has_the_numbers_of_each_layer(network, known):
    model, variables, batches = network
    report = jaxbn.linen.report(applying(model), variables, batches)
    stats, moments = known[0]
    assert [*report] == ["BatchNorm_0", "BatchNorm_1", "BatchNorm_2"]
    x = np.concatenate([batch[0] for batch in batches]).astype(float)
    dense = variables["params"]["Dense_0"]
    h = x @ np.asarray(dense["kernel"], float) + np.asarray(dense["bias"], float)
    running = stats["BatchNorm_0"]
    layer = report["BatchNorm_0"]
    drift = (running["mean"] - h.mean(0)) / h.std(0)
    assert layer.mean_drift == pytest.approx(np.sqrt(np.mean(drift**2)), rel=1e-3)
    assert layer.worst == pytest.approx(np.abs(drift).max(), rel=1e-3)
    ratio = np.log(running["var"] / h.var(0))
    assert layer.var_drift == pytest.approx(np.exp(np.sqrt(np.mean(ratio**2))), rel=1e-3)
    assert layer.offset == pytest.approx(np.max(np.abs(h.mean(0)) / h.std(0)), rel=1e-3)
    assert (layer.channels, layer.dead, layer.non_finite, layer.below_epsilon) == (16, 0, 0, 0)
    assert not layer.never_updated
    assert report == jaxbn.report(stats, moments)
    lines = str(report).splitlines()
    assert len({len(line) for line in lines[1:]}) == 1
    assert f"{layer.mean_drift:.3g} std" in lines[1]


def test_a_report_finds_dead_and_damaged_channels(known):
    stats, moments = known[0]
    path = "BatchNorm_1"
    wrong = {**stats[path], "mean": put(0, np.nan)(stats[path]["mean"].copy())}
    bias = np.zeros(16)
    bias[[2, 5]] = -9
    params = {path: {"scale": np.ones(16), "bias": bias}}
    batches = [
        {**m, path: {**m[path], "var": m[path]["var"].at[1].set(0), "mean": m[path]["mean"] + 1}}
        for m in moments
    ]
    batches = [{**m, path: {**m[path], "mean": m[path]["mean"].at[1].set(2)}} for m in batches]
    variables = {"params": params, "batch_stats": {**stats, path: wrong}}
    layer = jaxbn.report(variables, batches)[path]
    assert (layer.dead, layer.non_finite, layer.below_epsilon) == (3, 1, 1 / 16)
    initial = jaxbn.init_batch_stats(4)
    moments = jaxbn.Moments(jnp.ones(4), jnp.ones(4), jnp.float32(8))
    assert jaxbn.report(initial, moments)[""].never_updated
    assert "never updated" in str(jaxbn.report(initial, moments))


@pytest.mark.parametrize(
    ("stats", "moments", "words"),
    [
        ({}, {}, "must hold mean and var"),
        ("norm", "other", "must be those of the layers"),
        ("norm", "uncounted", "must have a count"),
        ("replicated", "norm", "take one"),
    ],
)
def test_what_a_report_refuses(stats, moments, words):
    pair = {"mean": jnp.zeros(3), "var": jnp.ones(3)}
    trees = {
        "norm": {"norm": {**pair, "count": jnp.float32(4)}},
        "other": {"other": {**pair, "count": jnp.float32(4)}},
        "uncounted": {"norm": pair},
        "replicated": {"norm": jax.tree.map(lambda v: jnp.stack([v, v]), pair)},
    }
    with pytest.raises(ValueError, match=words):
        jaxbn.report(*(trees.get(v, v) if isinstance(v, str) else v for v in (stats, moments)))


def test_what_a_model_must_return(network):
    model, variables, batches = network

    def forgets(variables, batch, train, mutable):
        return applying(model)(variables, batch, train, mutable)[0], {}

    with pytest.raises(ValueError, match="mutable=mutable"):
        jaxbn.linen.report(forgets, variables, batches)
    with pytest.raises(ValueError, match="at least one batch"):
        jaxbn.linen.report(applying(model), variables, [])
    with pytest.raises(ValueError, match="must have a batch norm"):
        jaxbn.nnx.report(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), jnp.ones((4, 2)))


# NNX


class Model(nnx.Module):
    def __init__(self, rngs, momentum=0.9, dropout=0.0):
        self.dense = nnx.List([nnx.Linear(*pair, rngs=rngs) for pair in ((FEATURES, 16), (16, 16))])
        self.norms = nnx.List(
            [jaxbn.nnx.BatchNorm(16, momentum=momentum, rngs=rngs) for _ in range(2)]
        )
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.head = nnx.Linear(16, CLASSES, rngs=rngs)

    def __call__(self, x, mask=None):
        for dense, norm in zip(self.dense, self.norms, strict=True):
            x = self.dropout(nnx.relu(norm(dense(x), mask=mask)))
        return self.head(x)


def called(model, batch):
    return model(batch[0], mask=batch[2])


def trained_model(batches, **fields):
    model = Model(nnx.Rngs(0), **fields)
    model.train()
    optimizer = nnx.Optimizer(model, optax.sgd(0.05, momentum=0.9), wrt=nnx.Param)

    for i in range(len(batches[0])):
        model_step(model, optimizer, batches, i)
    return model


@nnx.jit
def model_step(model, optimizer, batches, i):
    batch = jax.tree.map(lambda v: v[i], batches)

    def loss(model):
        out = called(model, batch)
        return optax.softmax_cross_entropy_with_integer_labels(out, batch[1]).mean()

    optimizer.update(model, nnx.grad(loss)(model))


@pytest.mark.parametrize(
    ("kind", "fields", "steps"),
    [
        (None, {}, 100),
        ("momentum", {"momentum": 0.1}, 100),
        ("too_few_steps", {"momentum": 0.99}, 30),
        ("dropout", {"dropout": 0.6}, 100),
    ],
)
def test_nnx_models(kind, fields, steps, data, others):
    batches = drawn(*data, steps)
    model = trained_model(batches, **fields)
    before = jax.tree.map(np.asarray, nnx.state(model, nnx.BatchStat))
    found = jaxbn.nnx.explain_gap(model, last(batches), others, call=called)
    assert found.kinds == ([kind] if kind else [])
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model, nnx.BatchStat))
    assert all(norm.moments is None for norm in model.norms)


# Faults that look like others


def of_batches(*shape, seed=0, scale=1.0):
    return [
        jaxbn.batch_moments(batch)
        for batch in samples_of(np.random.RandomState(seed), shape, scale)
    ]


def samples_of(random, shape, scale):
    mean = random.standard_normal(shape[-1])
    return (mean + scale * random.standard_normal(shape)).astype(np.float32)


def test_small_variances_are_not_taken_for_logarithms():
    moments = of_batches(8, 256, 16, scale=np.random.RandomState(2).uniform(0.45, 0.9, 16))
    whole = jaxbn.merge_moments(*moments)
    factors = np.random.RandomState(1).uniform(3, 12, 16).astype(np.float32)
    found = jaxbn.explain_gap({"mean": whole.mean, "var": whole.var * factors}, moments)
    assert "other_quantity" not in found.kinds
    assert found.kinds


@pytest.mark.parametrize("channels", [1, 2, 4, 16])
def test_few_channels_blame_no_momentum(channels):
    for seed in range(20):
        moments = of_batches(8, 256, channels, seed=seed)
        whole = jaxbn.merge_moments(*moments)
        assert jaxbn.explain_gap({"mean": whole.mean, "var": whole.var}, moments).kinds == []


def test_the_fault_that_explains_best_is_named(network):
    model, variables, batches = network
    stats = dict(variables["batch_stats"])
    same = [k for k in stats if stats[k]["mean"].shape == stats["BatchNorm_0"]["mean"].shape][:2]
    stats[same[0]], stats[same[1]] = stats[same[1]], stats[same[0]]
    assert kinds(model, {**variables, "batch_stats": stats}, batches) == 2 * ["other_layer"]


class OfFlax(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(8)(x))
        return nn.Dense(1)(x)


def test_layers_of_flax_are_refused_and_converted_ones_are_asked():
    model, batches = OfFlax(), list(samples_of(np.random.RandomState(0), (8, 64, 4), 2.0))
    variables = model.init(jax.random.key(0), batches[0], False)
    for i in range(64):
        _, updates = model.apply(variables, batches[i % 8], True, mutable=["batch_stats"])
        variables = {**variables, **updates}

    def of(model, mode=None):
        def apply(variables, batch, train, mutable):
            return model.apply(variables, batch, train if mode is None else mode, mutable=mutable)

        return apply

    with pytest.raises(ValueError, match="and get values; got others or none"):
        jaxbn.linen.explain_gap(of(model), variables, batches)
    converted = jaxbn.linen.convert(model)
    assert jaxbn.linen.explain_gap(of(converted), variables, batches).kinds == []
    found = jaxbn.linen.explain_gap(of(converted, True), variables, batches)
    assert found.kinds == ["batch_in_inference"]


def test_nnx_layers_that_choose_their_mode_themselves():
    class Stubborn(nnx.Module):
        def __init__(self):
            self.norm = jaxbn.nnx.BatchNorm(4, momentum=0.9, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.norm(x, use_running_average=False)

    model, batches = Stubborn(), list(samples_of(np.random.RandomState(0), (8, 64, 4), 2.0))
    for i in range(64):
        model(batches[i % 8])
    assert jaxbn.nnx.explain_gap(model, batches).kinds == ["batch_in_inference"]
