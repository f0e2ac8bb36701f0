"""Continues a prompt by an exported or an original model; ``--help`` lists the options."""

from tpa_train.cli import run_main
from tpa_train.tpa.command import main

if __name__ == "__main__":
    run_main(main)
