"""The options that all methods share, how a value is checked, and how a pattern matches a name."""
