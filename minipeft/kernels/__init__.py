"""Tensor maths that knows nothing of models, layer types or methods: products, autograd nodes, the chunked loss."""
