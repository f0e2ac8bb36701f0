"""Writes the inference folder of a finished or interrupted run; ``--help`` lists the options."""

from tpa_train.checkpoints.command import main
from tpa_train.cli import run_main

if __name__ == "__main__":
    run_main(main)
