"""Measures what the toolkit costs and gains on this machine; ``--help`` lists the benchmarks and their options."""

from tpa_train.benchmarks.command import main
from tpa_train.cli import run_main

if __name__ == "__main__":
    run_main(main)
