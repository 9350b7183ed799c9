"""Less memory: minipeft.lean and what it puts in place, and quantized bases."""
