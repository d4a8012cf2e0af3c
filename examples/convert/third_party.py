"""Converts models of other packages, trains them, and compares them with the originals.

    pip install jax-resnet jaxkit optax
    python examples/convert/third_party.py

`jax-resnet` has torchvision's ResNets in Linen, and `jaxkit` has fully connected blocks in NNX.
Both use Flax's batch norm. Their source stays as it is: `jaxbn.linen.convert` and
`jaxbn.nnx.convert` take one line each. The example skips a package that is not installed.

Both models of a pair start from the same variables and see the same batches, in float32. The table
shows relative differences in the 2-norm over all leaves. They are rounding errors, which grow from
step to step.
"""

import copy
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jaxbn.linen
import jaxbn.nnx

STEPS = 5


class Trained(NamedTuple):
    """The result of training a model; each field is a pytree."""

    losses: list[jax.Array]
    gradients: Any  # of the first step
    statistics: Any  # after the last step


def batches(*shape: int) -> list[tuple[jax.Array, jax.Array]]:
    """Inputs of this shape with a mean far from zero, and their labels."""
    keys = jax.random.split(jax.random.key(0), STEPS)
    labels = jnp.arange(shape[0]) % 3
    offsets = labels.reshape(-1, *[1] * (len(shape) - 1))
    return [(3 + offsets + jax.random.normal(key, shape), labels) for key in keys]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean cross-entropy of a batch."""
    losses: jax.Array = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean()


def resnet() -> tuple[Trained, Trained]:
    """A narrow ResNet-18 of jax-resnet, original and converted."""
    from jax_resnet import ResNet18

    model = ResNet18(n_classes=3, hidden_sizes=(8, 16, 16, 32))
    converted = jaxbn.linen.convert(model)
    data = batches(8, 64, 64, 3)
    variables = model.init(jax.random.key(1), data[0][0])
    return train_linen(model, variables, data), train_linen(converted, variables, data)


def train_linen(model: Any, variables: Any, data: list[Any]) -> Trained:
    """Trains a Linen model whose batch norms are in training mode if `batch_stats` is mutable."""
    optimizer = optax.sgd(0.05)

    @jax.jit
    def step(params: Any, stats: Any, state: Any, x: jax.Array, labels: jax.Array) -> Any:
        def loss(params: Any) -> Any:
            variables = {"params": params, "batch_stats": stats}
            logits, updates = model.apply(variables, x, mutable=["batch_stats"])
            return cross_entropy(logits, labels), updates["batch_stats"]

        (value, stats), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        changes, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, changes), stats, state, value, gradients

    params, stats = variables["params"], variables["batch_stats"]
    state, losses, all_gradients = optimizer.init(params), [], []
    for x, labels in data:
        params, stats, state, value, gradients = step(params, stats, state, x, labels)
        losses.append(value)
        all_gradients.append(gradients)
    return Trained(losses, all_gradients[0], stats)


def fully_connected() -> tuple[Trained, Trained]:
    """A block of jaxkit, original and converted."""
    from jaxkit import FullyConnected

    model = FullyConnected([16, 32, 32, 32, 3], dropout=None, rngs=nnx.Rngs(1))
    converted = jaxbn.nnx.convert(copy.deepcopy(model))
    data = batches(32, 16)
    return train_nnx(model, data), train_nnx(converted, data)


def train_nnx(model: nnx.Module, data: list[Any]) -> Trained:
    """Trains an NNX model, which holds its variables."""

    @nnx.jit
    def step(model: Any, optimizer: Any, x: jax.Array, labels: jax.Array) -> Any:
        value, gradients = nnx.value_and_grad(lambda model: cross_entropy(model(x), labels))(model)
        optimizer.update(model, gradients)
        return value, gradients

    optimizer = nnx.Optimizer(model, optax.sgd(0.05), wrt=nnx.Param)
    losses, gradients = zip(*(step(model, optimizer, *batch) for batch in data), strict=True)
    return Trained(list(losses), gradients[0], nnx.state(model, nnx.BatchStat))


def difference(actual: Any, expected: Any) -> float:
    """The relative difference of two trees in the 2-norm."""
    apart = jax.tree.map(jnp.subtract, actual, expected)
    return float(optax.tree.norm(apart) / optax.tree.norm(expected))


PAIRS: dict[str, Callable[[], tuple[Trained, Trained]]] = {
    "jax_resnet": resnet,
    "jaxkit": fully_connected,
}


def main() -> None:
    """Compares the models of the installed packages."""
    print(f"{'':12}" + "".join(f"{name:>12}" for name in Trained._fields))
    for package, run in PAIRS.items():
        if importlib.util.find_spec(package) is None:
            print(f"{package:12} is not installed: pip install {package.replace('_', '-')}")
            continue
        theirs, ours = run()
        apart = [difference(*pair) for pair in zip(ours, theirs, strict=True)]
        print(f"{package:12}" + "".join(f"{value:12.1e}" for value in apart))


if __name__ == "__main__":
    main()
