"""The numerics: moments, normalization, the derivative rule, and what devices tell each other."""
