"""What a model's training costs on this machine, beside what the machine can do: ``python -m raytrain.bench``."""
