"""From a configuration to an adapted model (select, plan, build, apply), and what its calls and training loops do there."""
