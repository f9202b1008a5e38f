"""Searches: spaces, samplers and schedulers, the plan, running it with Ray Tune, the winner and the model registry."""
