"""Searches: spaces, samplers and schedulers, the plan, its run by Ray Tune, the winner and the registry of models."""
