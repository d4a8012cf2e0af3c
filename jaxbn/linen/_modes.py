"""The mode in which the batch norms of a model are called."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from jaxbn.linen._flax import BatchNorm
from jaxbn.linen._torch import BatchNorm1d, BatchNorm2d, BatchNorm3d

# Flax's own may be converted.
LAYERS = (BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d, nn.BatchNorm)


def is_call(context: nn.module.InterceptorContext) -> bool:
    """Whether an intercepted method is the call of a batch norm."""
    return isinstance(context.module, LAYERS) and context.method_name == "__call__"


def normalizes_by_batch(
    layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> bool | None:
    """Whether a call of a batch norm normalizes by the batch; None if that is traced."""
    if getattr(layer, "frozen", False):
        return False
    chosen = kwargs.get("use_running_average", args[1] if len(args) > 1 else None)
    chosen = layer.use_running_average if chosen is None else chosen
    return not chosen if isinstance(chosen, bool) else None
