"""A few training steps of a pretrained network with a new classifier."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

Variables = Mapping[str, Any]


def fine_tune(
    network: nn.Module,
    variables: Variables,
    images: NDArray[np.float32],
    labels: NDArray[np.int32],
    *,
    steps: int = 3,
    learning_rate: float = 0.01,
) -> tuple[Variables, list[float]]:
    """The variables after training, with running statistics, and the loss before each step."""
    classifier, tx = nn.Dense(int(labels.max()) + 1), optax.sgd(learning_rate)
    features = jax.eval_shape(network.apply, variables, images)
    head = classifier.init(jax.random.key(0), jnp.zeros(features.shape))["params"]
    params = {"network": variables["params"], "head": head}
    stats, state, losses = variables["batch_stats"], tx.init(params), []

    def loss(params: Variables, stats: Any) -> tuple[jax.Array, Any]:
        given = {"params": params["network"], "batch_stats": stats}
        features, updates = network.apply(given, images, train=True, mutable=["batch_stats"])
        logits = classifier.apply({"params": params["head"]}, features)
        values = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return values.mean(), updates["batch_stats"]

    @jax.jit
    def step(params: Any, stats: Any, state: Any) -> Any:
        (value, stats), gradients = jax.value_and_grad(loss, has_aux=True)(params, stats)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), stats, state, value

    for _ in range(steps):
        params, stats, state, value = step(params, stats, state)
        losses.append(float(value))
    return {"params": params["network"], "batch_stats": stats}, losses
