"""Flax Linen modules: they own the variables and call the functions of `jaxbn`.

`BatchNorm` has the constructor and the conventions of `flax.linen.BatchNorm`. `BatchNorm1d`,
`BatchNorm2d` and `BatchNorm3d` have those of torch. Other functions work on whole models:
conversion, recalibration and diagnosis.

Flax comes with `pip install 'jaxbn[flax]'`.
"""

from jaxbn import _extras

_extras.check_installed("flax", "Flax", __name__)

from jaxbn.linen._convert import convert as convert
from jaxbn.linen._convert import converted as converted
from jaxbn.linen._diagnosis import explain_gap as explain_gap
from jaxbn.linen._diagnosis import report as report
from jaxbn.linen._flax import BatchNorm as BatchNorm
from jaxbn.linen._recalibrate import init_batch_moments as init_batch_moments
from jaxbn.linen._recalibrate import recalibrate as recalibrate
from jaxbn.linen._recalibrate import update_batch_stats as update_batch_stats
from jaxbn.linen._torch import BatchNorm1d as BatchNorm1d
from jaxbn.linen._torch import BatchNorm2d as BatchNorm2d
from jaxbn.linen._torch import BatchNorm3d as BatchNorm3d
