"""Training in less memory: minipeft.lean and what it puts in place."""
