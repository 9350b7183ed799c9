"""From a configuration to an adapted model: select, plan, build, apply."""
