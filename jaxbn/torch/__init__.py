"""PyTorch's `state_dict`s as Flax variables, and back; torch itself is never imported."""

from jaxbn.torch._names import match_names as match_names
from jaxbn.torch._state_dict import from_state_dict as from_state_dict
from jaxbn.torch._state_dict import to_state_dict as to_state_dict
