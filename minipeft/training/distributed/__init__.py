"""Several processes: ranks, launchers, FSDP2, DeepSpeed."""
