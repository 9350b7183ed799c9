"""From a configuration to an adapted model (select, plan, build, apply), and all that its adapters do in its calls and in training."""
