"""One adapter made of several: what is combined, how, and what that costs."""
