"""Folding of batch norms into linear layers: layer shapes, single layers, whole networks."""
