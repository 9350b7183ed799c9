"""What changes Python itself: an object's class, the search for garbage, Ctrl-C. Knows no adapter."""
