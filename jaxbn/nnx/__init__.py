"""Flax NNX modules: they own the variables and call the functions of `jaxbn`.

`BatchNorm` has the constructor and the conventions of `flax.nnx.BatchNorm`. `BatchNorm1d`,
`BatchNorm2d` and `BatchNorm3d` have those of torch. Other functions work on whole models:
conversion, freezing, recalibration and diagnosis.

Flax comes with `pip install 'jaxbn[flax]'`.
"""

from jaxbn import _extras

_extras.check_installed("flax", "Flax", __name__)

from jaxbn.nnx._convert import convert as convert
from jaxbn.nnx._diagnosis import explain_gap as explain_gap
from jaxbn.nnx._diagnosis import report as report
from jaxbn.nnx._flax import BatchNorm as BatchNorm
from jaxbn.nnx._freeze import freeze as freeze
from jaxbn.nnx._freeze import unfreeze as unfreeze
from jaxbn.nnx._recalibrate import init_batch_moments as init_batch_moments
from jaxbn.nnx._recalibrate import recalibrate as recalibrate
from jaxbn.nnx._recalibrate import update_batch_stats as update_batch_stats
from jaxbn.nnx._torch import BatchNorm1d as BatchNorm1d
from jaxbn.nnx._torch import BatchNorm2d as BatchNorm2d
from jaxbn.nnx._torch import BatchNorm3d as BatchNorm3d
