"""Measures an exported model beside its teacher; ``--help`` lists the options."""

from tpa_train.cli import run_main
from tpa_train.evaluation.command import main

if __name__ == "__main__":
    run_main(main)
