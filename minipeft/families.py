"""Default target modules by transformers ``model_type``."""
from minipeft.registry import register_targets
register_targets("gpt2", ["c_attn"])
