"""Batch normalization for JAX: torch's semantics as pure functions over pytrees.

`import jaxbn` needs only JAX and NumPy. Import the layers separately: `jaxbn.linen` and `jaxbn.nnx`
for Flax, `jaxbn.equinox` for Equinox. `jaxbn.torch` converts checkpoints of torch, and
`jaxbn.interop` converts running statistics of Haiku, Equinox and Keras.
"""

from importlib.metadata import version as _version

from jaxbn import interop as interop
from jaxbn import torch as torch
from jaxbn._batch_norm import batch_norm as batch_norm
from jaxbn._batch_norm_mask import batch_norm_mask as batch_norm_mask
from jaxbn._core.derivative import CHECKPOINT_NAMES as CHECKPOINT_NAMES
from jaxbn._diagnosis.gap import Explanation as Explanation
from jaxbn._diagnosis.gap import Finding as Finding
from jaxbn._diagnosis.gap import explain_gap as explain_gap
from jaxbn._diagnosis.layers import Settings as Settings
from jaxbn._diagnosis.report import LayerReport as LayerReport
from jaxbn._diagnosis.report import Report as Report
from jaxbn._diagnosis.report import report as report
from jaxbn._folding.layers import fold_into_conv as fold_into_conv
from jaxbn._folding.layers import fold_into_dense as fold_into_dense
from jaxbn._folding.networks import fold_variables as fold_variables
from jaxbn._moments import Moments as Moments
from jaxbn._moments import batch_moments as batch_moments
from jaxbn._moments import merge_moments as merge_moments
from jaxbn._normalize import batch_normalize as batch_normalize
from jaxbn._normalize import normalize as normalize
from jaxbn._renorm import Renorm as Renorm
from jaxbn._stats import BatchStats as BatchStats
from jaxbn._stats import init_batch_stats as init_batch_stats
from jaxbn._stats import update_batch_stats as update_batch_stats
from jaxbn._weight_decay import weight_decay_mask as weight_decay_mask

__version__ = _version("jaxbn")
