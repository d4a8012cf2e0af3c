"""Random shifts and mirror images, on the device."""

import jax
import jax.numpy as jnp


def augmented(images: jax.Array, key: jax.Array, *, shift: int, flip: bool) -> jax.Array:
    """Shifts each image at random by up to `shift` pixels, and mirrors it at random.

    The border repeats the edge. The result of an image depends on the key and its place in the
    batch, not on the number of images after it.

    Args:
      images: `[N, H, W, C]`.
      key: a random key.
      shift: the largest shift in pixels; 0 shifts nothing.
      flip: whether to mirror half of the images, on average, left to right.
    """
    shift_key, flip_key = jax.random.split(key)
    if flip:
        mirrored = jax.random.bernoulli(flip_key, shape=(len(images), 1, 1, 1))
        images = jnp.where(mirrored, images[:, :, ::-1], images)
    if shift:
        border = (shift, shift)
        padded = jnp.pad(images, ((0, 0), border, border, (0, 0)), mode="edge")
        offsets = jax.random.randint(shift_key, (len(images), 2), 0, 2 * shift + 1)

        def crop(image: jax.Array, offset: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), images.shape[1:])

        images = jax.vmap(crop)(padded, offsets)
    return images
