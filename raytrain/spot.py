"""The spot watcher: ``python -m raytrain.spot`` on a node tells Ray when EC2 is about to take the machine."""

from raytrain.cluster.spot import main
from raytrain.utils.errors import run_command

if __name__ == "__main__":
    run_command(main)
