"""What a user does first with the installed wheel: `python -I tests/release/smoke.py [flax]`.

Without an argument only JAX and NumPy are there, and the layers say what they need.
"""

import importlib
import importlib.metadata
import importlib.util
import pathlib
import sys

LIBRARIES = {"linen": "flax", "nnx": "flax", "equinox": "equinox"}


def functions() -> None:
    """Forward pass, gradient and compilation, and the same numbers from each."""
    import jax
    import jax.numpy as jnp

    import jaxbn

    installed = pathlib.Path(jaxbn.__file__)
    assert "site-packages" in installed.parts, installed
    assert jaxbn.__version__ == importlib.metadata.version("jaxbn")
    x = jnp.array([[1.0, 5.0], [3.0, 9.0]])
    y, stats = jaxbn.batch_norm(x, jaxbn.init_batch_stats(2), train=True, momentum=0.5)
    assert jnp.allclose(y, jnp.array([[-1.0, -1.0], [1.0, 1.0]]), atol=1e-4)
    assert stats.mean.tolist() == [1.0, 3.5]
    assert stats.count == 1

    def loss(scale: jax.Array) -> jax.Array:
        return (jaxbn.batch_norm(x, stats, scale, train=True)[0] * x).sum()

    gradient = jax.grad(loss)(jnp.ones(2))
    assert jnp.allclose(gradient, jnp.array([2.0, 4.0]), atol=1e-4)
    assert jnp.allclose(jax.jit(jax.grad(loss))(jnp.ones(2)), gradient)


def message(module: str) -> str:
    """The error of an import."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return str(error)
    return "none"


def missing(libraries: set[str]) -> None:
    """Each namespace without its library names the extra; nothing else has brought the library."""
    for namespace, library in LIBRARIES.items():
        if library not in libraries:
            assert importlib.util.find_spec(library) is None, f"{library} was installed"
            error = message(f"jaxbn.{namespace}")
            assert f"pip install 'jaxbn[{library}]'" in error, error


def flax_layers() -> None:
    """One training call of a Linen and of an NNX layer."""
    import jax
    import jax.numpy as jnp
    from flax import nnx as flax_nnx

    from jaxbn import linen, nnx

    x = jnp.array([[1.0, 5.0], [3.0, 9.0]])
    layer = linen.BatchNorm1d(2)
    variables = layer.init(jax.random.key(0), x, use_running_average=False)
    y, updates = layer.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
    assert updates["batch_stats"]["count"] == 1
    assert jnp.array_equal(nnx.BatchNorm1d(2, rngs=flax_nnx.Rngs(0))(x), y)


if __name__ == "__main__":
    functions()
    missing({*sys.argv[1:]})
    if "flax" in sys.argv[1:]:
        flax_layers()
    print("jaxbn", importlib.metadata.version("jaxbn"), "on Python", sys.version.split()[0])
