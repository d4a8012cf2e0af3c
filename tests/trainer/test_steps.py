"""What the trainer feeds and compiles: batches, steps on any devices, the table of layers."""

import jax
import numpy as np
import optax
import pytest
from augment import augmented
from batches import Batch, Feed, batch_at, even_sizes, plan, training_sizes
from helpers.training import images, spread_over
from layers import inspected
from model import CNN, Norm, ResNet20
from records import mean_drift, var_drift
from steps import Recipe, evaluated, initial_state, optimizer, sums_over, train_steps

pytestmark = [pytest.mark.trained, pytest.mark.usefixtures("standard_promotion")]


DEVICES = sorted({1, 3, jax.device_count()})


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("size", [2, 26, 99, 100])
def test_batches_hold_every_sample_once(devices, stream, size):
    order = np.random.RandomState(0).permutation(100)
    labels = np.arange(100)
    pictures = np.repeat(labels, 12).reshape(100, 2, 3, 2)
    planned = plan(order, training_sizes(100, size), devices)
    assert planned.mask.shape == (-(-100 // size), -(-size // devices) * devices)
    with spread_over(devices) as sharding:
        feed = Feed(pictures, labels, sharding, stream)
        assert (feed.pool is None) == stream
        made = list(feed.ahead(planned.parts(range(len(planned.mask) + 1))))
        made = [batch_at(jax.tree.map(lambda a: a[0], batch), feed.pool) for batch, _ in made]
    assert all(batch.mask.sum() <= size for batch in made)
    seen = np.concatenate([np.asarray(batch.labels)[np.asarray(batch.mask)] for batch in made])
    np.testing.assert_array_equal(seen, order)
    for batch in made:
        assert batch.images.sharding.num_devices == devices
        assert not devices > 1 or not batch.images.sharding.is_fully_replicated
        np.testing.assert_array_equal(batch.images, pictures[np.asarray(batch.labels)])


@pytest.mark.parametrize("images", [2, 512, 513, 1000])
def test_even_sizes(images):
    sizes = even_sizes(images, 512)
    assert sum(sizes) == images
    assert max(sizes) <= 512
    assert max(sizes) - min(sizes) <= 1


def test_images_stream_where_they_do_not_fit(monkeypatch):
    monkeypatch.setattr("batches.ASSUMED", 4 * 4 * 100 * 2 * 3)  # four times these, in bytes
    with spread_over(1) as sharding:
        assert Feed(np.zeros((100, 2, 3, 1), "f"), np.zeros(100), sharding).pool is not None
        assert Feed(np.zeros((104, 2, 3, 1), "f"), np.zeros(104), sharding).pool is None
    with spread_over(2) as sharding:  # two copies in one memory
        assert Feed(np.zeros((100, 2, 3, 1), "f"), np.zeros(100), sharding).pool is None


def test_images_move_and_are_mirrored():
    images = np.random.RandomState(0).normal(size=(400, 5, 6, 2))
    key = jax.random.key(0)
    moved = np.asarray(augmented(images, key, shift=1, flip=True))
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge").astype("f")
    places = [
        (flip, i, j)
        for pixels, image in zip(padded, moved, strict=True)
        for flip, source in enumerate((pixels, pixels[:, ::-1]))
        for i in range(3)
        for j in range(3)
        if (source[i : i + 5, j : j + 6] == image).all()
    ]
    assert len(places) == 400
    counts = np.unique(places, axis=0, return_counts=True)[1]
    assert len(counts) == 18
    assert counts.min() > 5
    np.testing.assert_array_equal(moved[:7], augmented(images[:7], key, shift=1, flip=True))
    np.testing.assert_array_equal(augmented(images, key, shift=0, flip=False), images)


NETWORKS = {
    "cnn": lambda norm: CNN(3, norm, np.dtype("float64"), (8, 16)),
    "resnet20": lambda norm: ResNet20(3, norm, np.dtype("float64"), (4, 8)),
}


@pytest.mark.parametrize(
    ("network", "norm"), [("cnn", "jaxbn"), ("cnn", "flax"), ("cnn", "none"), ("resnet20", "jaxbn")]
)
def test_padding_changes_nothing(network, norm, x64):
    """A step and an evaluation on 5 samples, in a batch of 5 and in one of 16 over devices."""
    dataset = images(5)
    recipe = Recipe(NETWORKS[network](Norm(norm)), optimizer(1e-2, 1))
    results = []
    for devices, rows in ((1, 5), (jax.device_count(), 16)):
        with spread_over(devices) as sharding:
            feed = Feed(dataset.x_train, dataset.y_train, sharding)
            planned = plan(np.arange(5), [5], rows)
            state = initial_state(0, (6, 6, 1), recipe=recipe)
            state, sums = train_steps(state, feed.batches(planned), feed.pool, recipe=recipe)
            tests = [
                evaluated(state.variables, feed, planned, recipe.model, by_batch)
                for by_batch in (False, True)
            ]
        state = state._replace(key=jax.random.key_data(state.key))
        results.append(jax.device_get((state, sums, tests)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), *results)


def test_many_steps_in_one_call_are_the_same_steps(x64):
    dataset = images(50)
    recipe = Recipe(NETWORKS["cnn"](Norm()), optimizer(1e-2, 5), flip=True)
    results = []
    for stream, bounds in ((False, range(6)), (False, [0, 5]), (True, [0, 2, 5])):
        with spread_over(2) as sharding:
            feed = Feed(dataset.x_train, dataset.y_train, sharding, stream)
            state = initial_state(0, (6, 6, 1), recipe=recipe)
            losses = []
            planned = plan(np.arange(50), training_sizes(50, 12), 2)
            for batches, _ in feed.ahead(planned.parts(bounds)):
                state, sums = train_steps(state, batches, feed.pool, recipe=recipe)
                losses.extend(np.asarray(sums.loss))
        results.append(jax.device_get((state.variables, losses)))
    for other in results[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10), results[0], other
        )


def test_the_state_is_donated():
    recipe = Recipe(CNN(3, features=(8, 8)), optimizer(1e-2, 5))
    with spread_over(1) as sharding:
        dataset = images(50)
        feed = Feed(dataset.x_train, dataset.y_train, sharding)
        state = initial_state(0, (6, 6, 1), recipe=recipe)
        batches = feed.batches(plan(np.arange(50), [25, 25], 1))
        train_steps(state, batches, feed.pool, recipe=recipe)
    donated = (state.variables, state.optimizer)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(donated))


def test_sums_are_those_of_the_samples_that_count():
    logits = np.array([[2.0, 0.0], [0.0, 1.0], [0.0, 9.0]])  # the last is right, and padding
    batch = Batch(None, np.array([0, 0, 1]), np.array([True, True, False]))
    sums = sums_over(logits, batch)
    assert sums.loss == pytest.approx(np.log1p(np.exp(-2)) + np.log1p(np.exp(1)))
    assert (sums.hits, sums.samples) == (1, 2)


def test_results_are_in_the_order_of_the_samples():
    dataset = images(9)
    model = CNN(3, features=(8, 8))
    with spread_over(1) as sharding:
        variables = initial_state(0, (6, 6, 1), recipe=Recipe(model, optimizer(1e-2, 1))).variables
        for stream in (False, True):
            feed = Feed(dataset.x_train, dataset.y_train, sharding, stream)
            order = np.random.RandomState(1).permutation(9)
            results = evaluated(variables, feed, plan(order, [4, 5], 1), model)
            logits = model.apply(variables, dataset.x_train, train=False)
            np.testing.assert_array_equal(results.predicted, logits.argmax(-1))
            probabilities = jax.nn.softmax(logits)
            np.testing.assert_allclose(results.confidence, probabilities.max(-1), rtol=1e-5)
            loss = -np.log(probabilities[np.arange(9), dataset.y_train])
            np.testing.assert_allclose(results.loss, loss, rtol=1e-4)


def test_drift_is_measured_in_units_of_the_layer():
    old = {"mean": np.array([0.0, 1.0]), "var": np.array([4.0, 1.0])}
    new = {"mean": np.array([2.0, 1.0]), "var": np.array([4.0, 2.0])}
    assert mean_drift(old, new) == pytest.approx(np.sqrt(0.5))
    assert var_drift(old, new) == pytest.approx(np.sqrt(0.5))
    assert mean_drift(old, old) == var_drift(old, old) == 0


def test_the_table_of_layers(monkeypatch):
    """A channel whose bias is far below zero is dead; one with a far mean says so."""
    dataset = images(60)
    model = CNN(3, features=(8, 16))
    with spread_over(2) as sharding:
        feed = Feed(dataset.x_train, dataset.y_train, sharding)
        variables = initial_state(0, (6, 6, 1), recipe=Recipe(model, optimizer(1e-2, 1))).variables
        bias = variables["params"]["Block_0"]["BatchNorm2d_0"]["bias"].at[3].set(-100)
        variables["params"]["Block_0"]["BatchNorm2d_0"]["bias"] = bias
        first, second = inspected(model, variables, feed, 2)
    kernel = variables["params"]["Block_0"]["Conv_0"]["kernel"]
    convolved = jax.lax.conv_general_dilated(
        dataset.x_train, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    mean, var = np.mean(convolved, (0, 1, 2)), np.var(convolved, (0, 1, 2), ddof=1)
    assert (first.name, first.channels, first.dead) == ("Block_0/BatchNorm2d_0", 8, 1)
    assert (second.name, second.channels, second.dead) == ("Block_1/BatchNorm2d_0", 16, 0)
    assert first.mean_drift == pytest.approx(np.sqrt(np.mean(mean**2 / var)), rel=1e-4)
    assert first.var_drift == pytest.approx(np.sqrt(np.mean((var - 1) ** 2)), rel=1e-4)
    assert first.offset == pytest.approx(np.max(np.abs(mean) / np.sqrt(var)), rel=1e-4)


def test_another_cycle_leaves_the_steps_before():
    one, two = (optimizer(0.1, *ends) for ends in ((20,), (20, 50)))
    params = {"kernel": np.ones((2, 2), np.float32)}
    kernels = []
    for tx in (one, two):
        state, history = tx.init(params), [params]
        for _ in range(50):
            changes, state = tx.update(params, state, history[-1])
            history.append(optax.apply_updates(history[-1], changes))
        kernels.append(np.array([step["kernel"] for step in history]))
    np.testing.assert_array_equal(kernels[1][:21], kernels[0][:21])
    np.testing.assert_array_equal(kernels[0][21:], kernels[0][20:-1])  # nothing is learned any more
    rates = np.abs(np.diff(kernels[1][:, 0, 0]))
    assert rates[20] == 0
    assert rates[23] == pytest.approx(rates[2], rel=0.5)
    assert rates[-1] < 0.01 * rates[23]
