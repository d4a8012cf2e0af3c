"""Trains a small CNN with batch norm, then classifies in inference mode.

python examples/train_cnn.py                      # handwritten digits, on the device that is there
python examples/train_cnn.py --plot curves.png    # with loss, accuracy and statistics drawn
python examples/train_cnn.py --no-batch-norm      # the contrast
"""

import argparse
import functools
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import data
import figures
import jax
import jax.numpy as jnp
import numpy as np
import optax
from model import CNN
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Variables = Mapping[str, Any]


class Parser(argparse.ArgumentParser):
    """Reports a bad flag in one line."""

    def error(self, message: str) -> NoReturn:
        """Prints the message and exits with status 2."""
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def number(kind: type, low: float, high: float = float("inf"), *, above: bool = False) -> Any:
    """An argparse type: a number from `low` (or above it) to `high`."""

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high or (above and value == low):
            bounds = f"{'above' if above else 'at least'} {low}"
            bounds += f" and at most {high}" if high < float("inf") else ""
            word = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {word} {bounds}; got {text!r}")
        return value

    return convert


def picture_path(text: str) -> pathlib.Path:
    """An argparse type: a .png file in a folder that exists."""
    path = pathlib.Path(text)
    if path.suffix != ".png":
        raise argparse.ArgumentTypeError(f"must end in .png; got {text!r}")
    if not path.parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file in an existing folder; got {text!r}")
    return path


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = Parser(prog="train_cnn.py", description=__doc__.partition("\n")[0])
    add = functools.partial(parser.add_argument, metavar="N")
    add("--epochs", type=number(int, 1), default=30, help="passes over the data (%(default)s)")
    add("--batch-size", type=number(int, 2), default=64, help="images per step (%(default)s)")
    add(
        "--learning-rate",
        type=number(float, 0, 1e3, above=True),
        default=3e-3,
        help="the highest of the schedule (%(default)s)",
    )
    add("--seed", type=number(int, 0, 2**31 - 1), default=0, help="random seed (%(default)s)")
    add(
        "--momentum",
        type=number(float, 0, 1),
        default=0.1,
        help="weight of the new batch in the running statistics, as in torch (%(default)s)",
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--no-batch-norm", action="store_true", help="leave batch norm out")
    parser.add_argument(
        "--data",
        type=pathlib.Path,
        default=data.DIGITS,
        metavar="FILE.npz",
        help=f"images and labels: {', '.join(data.KEYS)} (the digits that come along)",
    )
    parser.add_argument("--plot", type=picture_path, metavar="FILE.png", help="draw the history")
    return parser.parse_args(arguments)


class State(NamedTuple):
    """All that training changes."""

    variables: Variables
    optimizer: optax.OptState


def loss_and_hits(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean cross-entropy, and whether each prediction is right."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), logits.argmax(-1) == labels


def shifted(images: jax.Array, key: jax.Array) -> jax.Array:
    """Each image moved by up to one pixel in either direction, its border repeated."""
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    offsets = jax.random.randint(key, (len(images), 2), 0, 3)

    def crop(image: jax.Array, offset: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), images.shape[1:])

    return jax.vmap(crop)(padded, offsets)


@functools.partial(jax.jit, static_argnames=("model", "tx"), donate_argnames="state")
def train_step(
    state: State,
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
    *,
    model: CNN,
    tx: optax.GradientTransformation,
) -> tuple[State, tuple[jax.Array, jax.Array]]:
    """One step of the optimizer and of the running statistics; loss and accuracy of the batch."""
    params = state.variables["params"]

    def loss_of(params: Variables) -> tuple[jax.Array, Any]:
        variables = {**state.variables, "params": params}
        moved = shifted(images, key)
        logits, updates = model.apply(variables, moved, train=True, mutable=["batch_stats"])
        loss, hits = loss_and_hits(logits, labels)
        return loss, (hits.mean(), updates)

    (loss, (accuracy, updates)), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
    changes, optimizer_state = tx.update(gradients, state.optimizer, params)
    params = optax.apply_updates(params, changes)
    return State({"params": params, **updates}, optimizer_state), (loss, accuracy)


@functools.partial(jax.jit, static_argnames=("model", "by_batch"))
def evaluate(
    variables: Variables, x: jax.Array, y: jax.Array, *, model: CNN, by_batch: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Loss and accuracy in inference mode, or normalized by the statistics of `x` itself."""
    logits, _ = model.apply(variables, x, train=by_batch, mutable=["batch_stats"])
    loss, hits = loss_and_hits(logits, y)
    return loss, hits.mean()


def optimizer(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """AdamW over one cosine cycle with a warm-up; the weight decay spares vectors."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 10, steps)

    def is_kernel(params: Variables) -> Any:
        return jax.tree.map(lambda p: p.ndim > 1, params)

    return optax.adamw(schedule, weight_decay=1e-2, mask=is_kernel)


def train(
    flags: argparse.Namespace, dataset: data.Dataset, console: Console
) -> tuple[CNN, Variables, list[figures.Epoch]]:
    """Trains, printing a line for each epoch: the model, its variables and the history."""
    model = CNN(
        dataset.classes,
        batch_norm=not flags.no_batch_norm,
        momentum=flags.momentum,
        dtype=jnp.dtype(flags.dtype),
    )
    x_train, y_train, x_test, y_test = jax.device_put(tuple(dataset))
    steps = len(x_train) // flags.batch_size  # in whole batches, of another order every epoch
    init_key, shift_key = jax.random.split(jax.random.key(flags.seed))
    variables = model.init(init_key, x_train[:2], train=False)
    tx = optimizer(flags.learning_rate, flags.epochs * steps)
    state = State(variables, tx.init(variables["params"]))
    generator = np.random.default_rng(flags.seed)

    history: list[figures.Epoch] = []
    console.print("epoch  train loss  accuracy  test loss  accuracy  seconds", highlight=False)
    columns = TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=flags.epochs * steps)
        for epoch in range(1, flags.epochs + 1):
            start = time.perf_counter()
            order = generator.permutation(len(x_train))[: steps * flags.batch_size]
            training = []
            for indices in order.reshape(steps, flags.batch_size):
                shift_key, key = jax.random.split(shift_key)
                state, metrics = train_step(
                    state, x_train[indices], y_train[indices], key, model=model, tx=tx
                )
                training.append(metrics)
                progress.advance(task)
            history.append(record(training, state.variables, x_test, y_test, model))
            seconds = time.perf_counter() - start
            console.print(f"{epoch:5d}{history[-1]}{seconds:9.2f}", highlight=False)
    return model, state.variables, history


def record(
    training: list[tuple[jax.Array, jax.Array]],
    variables: Variables,
    x_test: jax.Array,
    y_test: jax.Array,
    model: CNN,
) -> figures.Epoch:
    """The history of one epoch: means over its steps, and the test set in inference mode."""
    testing = evaluate(variables, x_test, y_test, model=model)
    stats = jax.device_get(variables.get("batch_stats", {}))
    train_loss, train_accuracy = np.mean(jax.device_get(training), 0)
    test_loss, test_accuracy = jax.device_get(testing)
    return figures.Epoch(train_loss, train_accuracy, test_loss, test_accuracy, stats)


def summarize(model: CNN, variables: Variables, dataset: data.Dataset, console: Console) -> None:
    """Compares inference mode with batch statistics on the test images."""
    x, y = dataset.x_test, dataset.y_test
    _, inference = evaluate(variables, x, y, model=model)
    console.print(f"test accuracy in inference mode, running statistics: {inference:7.2%}")
    if model.batch_norm:
        _, batch = evaluate(variables, x, y, model=model, by_batch=True)
        console.print(f"test accuracy by the statistics of the test batch:   {batch:7.2%}")
        console.print(f"difference: {abs(inference - batch) * 100:.2f} points over {len(y)} images")
    else:
        console.print("without batch norm both modes are the same")


def fail(reason: object) -> int:
    """Says in one line why there is no result."""
    print(f"train_cnn.py: error: {reason}", file=sys.stderr)
    return 1


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; 0 when it went well."""
    flags = parse(arguments)
    console = Console()
    try:
        dataset = data.load(flags.data)
    except data.DataError as error:
        return fail(error)
    if flags.batch_size > len(dataset.x_train):
        images = len(dataset.x_train)
        return fail(f"--batch-size {flags.batch_size} is more than the {images} training images")
    device = jax.devices()[0]
    console.print(
        f"{len(dataset.x_train)} training and {len(dataset.x_test)} test images of "
        f"{dataset.x_train.shape[1:]}, {flags.dtype}, on {device.platform}: {device.device_kind}"
    )
    model, variables, history = train(flags, dataset, console)
    summarize(model, variables, dataset, console)
    if flags.plot:
        try:
            figures.draw(history, flags.plot)
        except OSError as error:
            return fail(error)
        console.print(f"history drawn in {flags.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
