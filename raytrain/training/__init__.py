"""Training of one run: the loop and its loss, workers and their groups, and what goes on when they fail."""
