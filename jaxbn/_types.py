"""Types of arguments, for type checkers."""

from typing import Any

import jax
import numpy as np

# Known when a function is traced.
Bool = bool | np.bool_
Integer = int | np.integer[Any]
Number = float | np.floating[Any]
# Traced or not.
Flag = Bool | jax.Array
