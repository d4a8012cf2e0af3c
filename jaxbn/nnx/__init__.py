"""Flax NNX modules: they own the variables and call the functions of `jaxbn`.

`BatchNorm` has the constructor and the conventions of `flax.nnx.BatchNorm`; `BatchNorm1d`,
`BatchNorm2d` and `BatchNorm3d` have those of torch.
"""

from jaxbn.nnx._convert import convert as convert
from jaxbn.nnx._flax import BatchNorm as BatchNorm
from jaxbn.nnx._freeze import freeze as freeze
from jaxbn.nnx._freeze import unfreeze as unfreeze
from jaxbn.nnx._torch import BatchNorm1d as BatchNorm1d
from jaxbn.nnx._torch import BatchNorm2d as BatchNorm2d
from jaxbn.nnx._torch import BatchNorm3d as BatchNorm3d
