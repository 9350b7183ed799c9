"""What is wrong with a set-up for training or using adapters: `diagnose`, and its checks, one file for each group."""
