"""Files whose tensors go by other names than the model's: the keys translated, and the configuration with them."""
