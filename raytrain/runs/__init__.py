"""Records of runs and trials: checkpoints, workspaces, references to models, trained models."""
