"""Several processes: what they tell each other, how they are launched, FSDP2, DeepSpeed."""
