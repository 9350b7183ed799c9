"""What a long training run needs beside the adapter: data in a known order, checkpoints that survive, LoRA+."""
