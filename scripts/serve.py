"""Serves an exported or original model by OpenAI's API; ``--help`` lists the options."""

from tpa_train.cli import run_main
from tpa_train.serving.command import main

if __name__ == "__main__":
    run_main(main)
