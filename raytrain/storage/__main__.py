"""``python -m raytrain.storage check URI``: try everything that is asked of a storage and print what to set."""

from raytrain.storage.check import main
from raytrain.utils.errors import run_command

if __name__ == "__main__":
    run_command(main)
