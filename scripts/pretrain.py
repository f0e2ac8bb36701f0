"""Trains a small Gemma 3 with several key/value heads from random weights; ``--help`` lists the options."""

from tpa_train.cli import run_main
from tpa_train.pretraining.command import main

if __name__ == "__main__":
    run_main(main)
