"""Training of one run: the loop and its loss, workers and their groups, and how a run survives their failures."""
