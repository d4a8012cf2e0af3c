"""Flax Linen modules: they own the variables and call the functions of `jaxbn`.

`BatchNorm` has the constructor and the conventions of `flax.linen.BatchNorm`; `BatchNorm1d`,
`BatchNorm2d` and `BatchNorm3d` have those of torch.
"""

from jaxbn.linen._convert import convert as convert
from jaxbn.linen._convert import converted as converted
from jaxbn.linen._flax import BatchNorm as BatchNorm
from jaxbn.linen._torch import BatchNorm1d as BatchNorm1d
from jaxbn.linen._torch import BatchNorm2d as BatchNorm2d
from jaxbn.linen._torch import BatchNorm3d as BatchNorm3d
