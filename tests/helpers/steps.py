"""A compiled training step, which tests that use equal shapes share."""

import functools

import jax

import jaxbn


@functools.partial(jax.jit, static_argnames=("axis", "epsilon", "activation"))
def train_step(
    x, scale, bias, dy, mask=None, residual=None, axis=-1, epsilon=1e-5, activation=None
):
    """Output, moments, and the gradients of `x`, `scale`, `bias` and `residual`."""

    def function(x, scale, bias, residual):
        options = {"mask": mask, "residual": residual, "activation": activation}
        return jaxbn.batch_normalize(x, scale, bias, axis=axis, epsilon=epsilon, **options)

    y, pullback, moments = jax.vjp(function, x, scale, bias, residual, has_aux=True)
    return y, moments, *pullback(dy)
