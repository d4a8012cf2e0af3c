"""The compiled programs: training steps, many in one call, and evaluation."""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from augment import augmented
from batches import Batch, Feed, Indices, Plan, Pool, batch_at
from jax.sharding import PartitionSpec
from model import Layers
from numpy.typing import NDArray

Variables = Mapping[str, Any]
REPLICATED = PartitionSpec()


class State(NamedTuple):
    """Everything that training changes."""

    variables: Variables
    optimizer: optax.OptState
    key: jax.Array


class Recipe(NamedTuple):
    """What training keeps fixed; each recipe is compiled once."""

    model: Layers
    tx: optax.GradientTransformation
    shift: int = 1
    flip: bool = False


class Sums(NamedTuple):
    """Cross-entropy, right predictions and number of samples, without padding."""

    loss: Any
    hits: Any
    samples: Any


@functools.cache  # equal recipes must be the same object to be compiled once
def optimizer(learning_rate: float, *ends: int) -> optax.GradientTransformation:
    """AdamW over cosine cycles, each with a warm-up. Vectors get no weight decay.

    `ends` has the last step of each cycle, so a further cycle changes no step before it.
    """
    lengths = [end - start for start, end in itertools.pairwise((0, *ends))]
    cycles = [
        optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 10, steps)
        for steps in lengths
    ]
    schedule = optax.join_schedules(cycles, ends[:-1])

    def is_kernel(params: Variables) -> Any:
        return jax.tree.map(lambda p: p.ndim > 1, params)

    return optax.adamw(schedule, weight_decay=1e-2, mask=is_kernel)


@functools.partial(jax.jit, static_argnames=("shape", "recipe"), out_shardings=REPLICATED)
def initial_state(seed: int, shape: tuple[int, ...], *, recipe: Recipe) -> State:
    """The state before the first step, the same on all devices."""
    init_key, key = jax.random.split(jax.random.key(seed))
    variables = recipe.model.init(init_key, jnp.zeros((1, *shape)), train=False)
    kept = {name: tree for name, tree in variables.items() if name in ("params", "batch_stats")}
    return State(kept, recipe.tx.init(kept["params"]), key)


def forward(variables: Variables, batch: Batch, model: Layers, *, train: bool) -> Any:
    """Logits and new running statistics, which padding does not affect."""
    mask = batch.mask[:, None, None, None]
    return model.apply(variables, batch.images, mask=mask, train=train, mutable=["batch_stats"])


def sums_over(logits: jax.Array, batch: Batch) -> Sums:
    """Sums of cross-entropy and right predictions, without padding."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    hits = logits.argmax(-1) == batch.labels
    return Sums(losses.sum(where=batch.mask), hits.sum(where=batch.mask), batch.mask.sum())


def train_step(state: State, batch: Batch, recipe: Recipe) -> tuple[State, Sums]:
    """Updates parameters and running statistics by one batch; also returns its sums."""
    key, image_key = jax.random.split(state.key)
    params = state.variables["params"]
    images = augmented(batch.images, image_key, shift=recipe.shift, flip=recipe.flip)
    batch = batch._replace(images=images)

    def mean_loss(params: Variables) -> tuple[jax.Array, Any]:
        variables = {**state.variables, "params": params}
        logits, updates = forward(variables, batch, recipe.model, train=True)
        sums = sums_over(logits, batch)
        return sums.loss / sums.samples, (sums, updates)

    gradients, (sums, updates) = jax.grad(mean_loss, has_aux=True)(params)
    changes, optimizer_state = recipe.tx.update(gradients, state.optimizer, params)
    params = optax.apply_updates(params, changes)
    return State({"params": params, **updates}, optimizer_state, key), sums


def scanned(
    step: Callable[[Any, Batch], Any], carry: Any, batches: Batch | Indices, pool: Pool | None
) -> Any:
    """`jax.lax.scan` over stacked batches, without a loop if there is only one.

    XLA:CPU computes the backward pass of convolutions ten times slower in a loop.
    """

    def body(carry: Any, batch: Any) -> Any:
        return step(carry, batch_at(batch, pool))

    if len(batches.mask) > 1:
        return jax.lax.scan(body, carry, batches)
    carry, results = body(carry, jax.tree.map(lambda leaf: leaf[0], batches))
    return carry, jax.tree.map(lambda leaf: leaf[None], results)


@functools.partial(
    jax.jit, static_argnames="recipe", donate_argnames="state", out_shardings=REPLICATED
)
def train_steps(
    state: State, batches: Batch | Indices, pool: Pool | None, *, recipe: Recipe
) -> tuple[State, Sums]:
    """One step per stacked batch; also returns the sums of each."""
    return scanned(functools.partial(train_step, recipe=recipe), state, batches, pool)  # type: ignore[no-any-return]


class Results(NamedTuple):
    """Cross-entropy, predicted class and its probability, per sample."""

    loss: Any
    predicted: Any
    confidence: Any


@functools.partial(jax.jit, static_argnames=("model", "by_batch"), out_shardings=REPLICATED)
def evaluate(
    variables: Variables,
    batches: Batch | Indices,
    pool: Pool | None,
    *,
    model: Layers,
    by_batch: bool = False,
) -> Results:
    """The results in inference mode, or normalized by the statistics of each batch."""

    def step(_: None, batch: Batch) -> tuple[None, Results]:
        logits, _updates = forward(variables, batch, model, train=by_batch)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        confidence = jax.nn.softmax(logits).max(-1)
        return None, Results(losses, logits.argmax(-1), confidence)

    results: Results = scanned(step, None, batches, pool)[1]
    return results


def evaluated(
    variables: Variables, feed: Feed, plan: Plan, model: Layers, by_batch: bool = False
) -> Results:
    """The results of all samples of a plan, in the order of the data set."""
    plans = [plan] if feed.pool is not None else plan.parts(range(len(plan.mask) + 1))
    outputs = [
        evaluate(variables, batch, feed.pool, model=model, by_batch=by_batch)
        for batch, _ in feed.ahead(plans)
    ]

    def in_order(*parts: jax.Array) -> NDArray[np.generic]:
        values = np.concatenate(jax.device_get(parts))[plan.mask]
        return values[np.argsort(plan.indices[plan.mask])]

    return Results(*map(in_order, *outputs))
