"""The names of an adapter's files, and of other tools' weights."""

from __future__ import annotations

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
OF_OTHER_TOOLS = MLX_FILE, DIFFUSERS_FILE = "adapters.safetensors", "pytorch_lora_weights.safetensors"
