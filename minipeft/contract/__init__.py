"""The contract between methods and layers: a case to try, and one function for each promise; see `minipeft.testing`."""
