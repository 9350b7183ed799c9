"""The names of an adapter's files."""

from __future__ import annotations

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
