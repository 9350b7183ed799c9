"""From files and data sets to the batches of an update."""
