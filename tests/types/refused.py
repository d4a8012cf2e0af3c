"""Mistakes that type checkers find. Each line has an error, or the ignored one would be unused."""

import jax.numpy as jnp

import jaxbn
from jaxbn import linen, nnx

x = jnp.ones((6, 4))
stats = jaxbn.init_batch_stats(4)


# fmt: off
def mistakes() -> None:
    jaxbn.batch_norm(x, stats)  # type: ignore[call-arg]
    jaxbn.batch_norm(x, stats, train="yes")  # type: ignore[arg-type]
    jaxbn.batch_norm(x, stats, train=True, epsilon="1e-5")  # type: ignore[arg-type]
    jaxbn.batch_norm(x, stats, train=True, epsilon=jnp.array(1e-5))  # type: ignore[arg-type]
    jaxbn.batch_norm(x, stats, train=True, axis=(0, 1))  # type: ignore[arg-type]
    jaxbn.batch_norm(x, stats, train=True, virtual_batch_size=2.5)  # type: ignore[arg-type]
    jaxbn.batch_norm(x, (stats.mean, stats.var), train=True)  # type: ignore[type-var]
    jaxbn.batch_norm(x, stats, True)  # type: ignore[call-arg]
    jaxbn.batch_normalize(x, activation=1)  # type: ignore[arg-type]
    jaxbn.normalize(x)  # type: ignore[call-arg]
    jaxbn.normalize(x, stats)  # type: ignore[call-arg,arg-type]
    jaxbn.BatchStats(stats.mean, stats.var)  # type: ignore[call-arg]
    jaxbn.BatchStats(stats.mean, stats.var, "0")  # type: ignore[arg-type]
    jaxbn.fold_into_dense(x, None, stats.mean, stats.var, before="yes")  # type: ignore[arg-type]
    jaxbn.update_batch_stats(stats, stats)  # type: ignore[arg-type]
    linen.BatchNorm(eps=1e-5)  # type: ignore[call-arg]
    linen.BatchNorm2d(4, momentum="0.1")  # type: ignore[arg-type]
    nnx.BatchNorm(4)  # type: ignore[call-arg]
    nnx.BatchNorm2d(4, activation=1)  # type: ignore[call-arg,arg-type]
