"""What each exercise must keep: one file of laws for each of them, loaded when it is checked."""
