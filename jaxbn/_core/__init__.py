"""The numerics: moments, normalization, the derivative rule, and communication between devices."""
