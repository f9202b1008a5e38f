"""The training loop without Ray: ``torchrun --nproc-per-node 2 -m raytrain.loop CONFIG --corpus DIR --storage DIR``."""

from raytrain.training.torchrun import main
from raytrain.utils.errors import run_command

if __name__ == "__main__":
    run_command(main)
