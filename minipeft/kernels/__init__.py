"""Tensor maths that knows no model, layer type or method: products, autograd nodes, the chunked loss."""
