"""Which class adapts which layer, and what a class must have to be registered."""
