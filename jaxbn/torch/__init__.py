"""Converts a `state_dict` of torch to Flax variables, and back. torch is never imported.

`from_state_dict` imports a layer or a model. `match_names` finds the names that it needs for a
model, and `to_state_dict` is the way back.
"""

from jaxbn.torch._names import match_names as match_names
from jaxbn.torch._state_dict import from_state_dict as from_state_dict
from jaxbn.torch._state_dict import to_state_dict as to_state_dict
