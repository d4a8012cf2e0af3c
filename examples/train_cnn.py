"""Trains a small CNN with batch norm, then classifies in inference mode.

python examples/train_cnn.py                      # handwritten digits, on all devices there are
python examples/train_cnn.py --plot curves.png    # with loss, accuracy and statistics drawn
python examples/train_cnn.py --no-batch-norm      # the contrast
python examples/train_cnn.py --dataset fashion-mnist --epochs 5

In several processes, on one host or more, the same with an address of process 0 and each one's id:

python examples/train_cnn.py --coordinator localhost:1234 --processes 2 --process-id 0 &
python examples/train_cnn.py --coordinator localhost:1234 --processes 2 --process-id 1
"""

import argparse
import contextlib
import functools
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import data
import figures
import jax
import jax.numpy as jnp
import numpy as np
import optax
import processes
from batches import Batch, batches
from command_line import parse
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from model import CNN
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Variables = Mapping[str, Any]
REPLICATED = PartitionSpec()
PREFIX = "train_cnn.py: error"


class State(NamedTuple):
    """All that training changes."""

    variables: Variables
    optimizer: optax.OptState
    key: jax.Array


def loss_and_hits(logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy and right predictions, each summed over the samples that count."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    hits = logits.argmax(-1) == batch.labels
    return losses.sum(where=batch.mask), hits.sum(where=batch.mask)


def shifted(images: jax.Array, key: jax.Array) -> jax.Array:
    """Each image moved by up to one pixel in either direction, its border repeated.

    How far depends on the key and the place in the batch, not on how many images follow.
    """
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    offsets = jax.random.randint(key, (len(images), 2), 0, 3)

    def crop(image: jax.Array, offset: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), images.shape[1:])

    return jax.vmap(crop)(padded, offsets)


@functools.partial(
    jax.jit, static_argnames=("model", "tx"), donate_argnames="state", out_shardings=REPLICATED
)
def train_step(
    state: State, batch: Batch, *, model: CNN, tx: optax.GradientTransformation
) -> tuple[State, tuple[jax.Array, jax.Array]]:
    """One step of the optimizer and of the running statistics; `loss_and_hits` of the batch."""
    key, shift_key = jax.random.split(state.key)
    params = state.variables["params"]

    def mean_loss(params: Variables) -> tuple[jax.Array, Any]:
        variables = {**state.variables, "params": params}
        moved = batch._replace(images=shifted(batch.images, shift_key))
        logits, updates = forward(variables, moved, model, train=True)
        loss, hits = loss_and_hits(logits, batch)
        return loss / batch.mask.sum(), ((loss, hits), updates)

    gradients, (metrics, updates) = jax.grad(mean_loss, has_aux=True)(params)
    changes, optimizer_state = tx.update(gradients, state.optimizer, params)
    params = optax.apply_updates(params, changes)
    return State({"params": params, **updates}, optimizer_state, key), metrics


@functools.partial(jax.jit, static_argnames=("model", "by_batch"), out_shardings=REPLICATED)
def evaluate(
    variables: Variables, batch: Batch, *, model: CNN, by_batch: bool = False
) -> tuple[jax.Array, jax.Array]:
    """`loss_and_hits` in inference mode, or normalized by the statistics of the batch itself."""
    logits, _ = forward(variables, batch, model, train=by_batch)
    return loss_and_hits(logits, batch)


def forward(variables: Variables, batch: Batch, model: CNN, *, train: bool) -> Any:
    """Logits and new running statistics; rows that do not count have no influence on them."""
    mask = batch.mask[:, None, None, None]
    return model.apply(variables, batch.images, mask=mask, train=train, mutable=["batch_stats"])


def optimizer(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """AdamW over one cosine cycle with a warm-up; the weight decay spares vectors."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 10, steps)

    def is_kernel(params: Variables) -> Any:
        return jax.tree.map(lambda p: p.ndim > 1, params)

    return optax.adamw(schedule, weight_decay=1e-2, mask=is_kernel)


def train(
    model: CNN,
    flags: argparse.Namespace,
    dataset: data.Dataset,
    test: Batch,
    sharding: NamedSharding,
    console: Console,
) -> tuple[Variables, list[figures.Epoch]]:
    """Trains, printing a line for each epoch: the variables of the model and the history."""
    x, y = dataset.x_train, dataset.y_train
    steps = -(-len(x) // flags.batch_size)
    tx = optimizer(flags.learning_rate, flags.epochs * steps)
    state = initial_state(flags.seed, x.shape[1:], model=model, tx=tx)
    generator = np.random.default_rng(flags.seed)

    history: list[figures.Epoch] = []
    console.print("epoch  train loss  accuracy  test loss  accuracy  seconds", highlight=False)
    columns = TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=flags.epochs * steps)
        for epoch in range(1, flags.epochs + 1):
            start = time.perf_counter()
            training = []
            order = generator.permutation(len(x))
            for batch in batches(x, y, order, flags.batch_size, sharding):
                state, metrics = train_step(state, batch, model=model, tx=tx)
                training.append(metrics)
                progress.advance(task)
            testing = evaluate(state.variables, test, model=model)
            history.append(record(training, testing, state.variables, dataset))
            seconds = time.perf_counter() - start
            console.print(f"{epoch:5d}{history[-1]}{seconds:9.2f}", highlight=False)
    return state.variables, history


@functools.partial(jax.jit, static_argnames=("shape", "model", "tx"), out_shardings=REPLICATED)
def initial_state(
    seed: int, shape: tuple[int, ...], *, model: CNN, tx: optax.GradientTransformation
) -> State:
    """The state before the first step, the same on all devices."""
    init_key, key = jax.random.split(jax.random.key(seed))
    variables = model.init(init_key, jnp.zeros((1, *shape)), train=False)
    return State(variables, tx.init(variables["params"]), key)


def record(
    training: Sequence[tuple[jax.Array, jax.Array]],
    testing: tuple[jax.Array, jax.Array],
    variables: Variables,
    dataset: data.Dataset,
) -> figures.Epoch:
    """The history of one epoch: means over the training set and over the test set."""
    stats = jax.device_get(variables.get("batch_stats", {}))
    train_loss, train_accuracy = np.sum(jax.device_get(training), 0) / len(dataset.x_train)
    test_loss, test_accuracy = np.array(jax.device_get(testing)) / len(dataset.x_test)
    return figures.Epoch(train_loss, train_accuracy, test_loss, test_accuracy, stats)


def summarize(model: CNN, variables: Variables, test: Batch, images: int, console: Console) -> None:
    """Compares inference mode with batch statistics on the test images."""
    inference = evaluate(variables, test, model=model)[1] / images
    console.print(f"test accuracy in inference mode, running statistics: {inference:7.2%}")
    if model.batch_norm:
        batch = evaluate(variables, test, model=model, by_batch=True)[1] / images
        console.print(f"test accuracy by the statistics of the test batch:   {batch:7.2%}")
        console.print(f"difference: {abs(inference - batch) * 100:.2f} points over {images} images")
    else:
        console.print("without batch norm both modes are the same")


def statistics(model: CNN, images: jax.Array) -> Any:
    """What training on nothing but these images would make of the running statistics."""
    variables = model.init(jax.random.key(0), images, train=False)
    return model.apply(variables, images, train=True, mutable=["batch_stats"])[1]


def fail(reason: object) -> int:
    """Says in one line why there is no result."""
    print(f"{PREFIX}: {reason}", file=sys.stderr)
    return 1


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; 0 when it went well."""
    flags = parse(__doc__.partition("\n")[0], arguments)
    try:
        if flags.dataset in data.PACKAGES:
            dataset = data.load_idx(flags.dataset, flags.data_dir)
        else:
            dataset = data.load(flags.data or data.DIGITS)
    except data.DataError as error:
        return fail(error)
    images = len(dataset.x_train)
    if flags.batch_size > images:
        return fail(f"--batch-size {flags.batch_size} is more than the {images} training images")
    several = flags.coordinator or flags.cluster
    with processes.joined(flags, PREFIX) if several else contextlib.nullcontext():
        mesh = jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(AxisType.Auto,))
        with jax.set_mesh(mesh):
            return run(flags, dataset, NamedSharding(mesh, PartitionSpec("batch")))


def run(flags: argparse.Namespace, dataset: data.Dataset, sharding: NamedSharding) -> int:
    """Trains on these devices, and reports; the exit status."""
    first = jax.process_index() == 0
    console = Console(quiet=not first)
    if jax.process_count() > 1 and not processes.agree(flags, dataset, sharding):
        return fail("the processes have different flags or data; start them all with the same")
    model = CNN(
        dataset.classes,
        batch_norm=not flags.no_batch_norm,
        momentum=flags.momentum,
        dtype=jnp.dtype(flags.dtype),
    )
    if len(dataset.x_train) % flags.batch_size == 1:
        try:
            jax.eval_shape(lambda image: statistics(model, image), dataset.x_train[:1])
        except ValueError as error:
            return fail(f"--batch-size {flags.batch_size} leaves one image over: {error}")
    device = jax.devices()[0]
    console.print(
        f"{len(dataset.x_train)} training and {len(dataset.x_test)} test images of "
        f"{dataset.x_train.shape[1:]}, {flags.dtype}, on {sharding.num_devices} × "
        f"{device.platform}: {device.device_kind}"
    )
    images = len(dataset.x_test)
    test = next(batches(dataset.x_test, dataset.y_test, np.arange(images), images, sharding))
    variables, history = train(model, flags, dataset, test, sharding, console)
    summarize(model, variables, test, images, console)
    if flags.plot and first:
        try:
            figures.draw(history, flags.plot)
        except OSError as error:
            return fail(error)
        console.print(f"history drawn in {flags.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
