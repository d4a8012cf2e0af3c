"""Batch norm folded into linear layers: their shapes, one layer, whole networks."""
