"""Convert, recover and export a Gemma 3: ``python scripts/train.py recipe=distill`` (``--help`` lists everything)."""

from tpa_train.cli import run_main
from tpa_train.launch import main

if __name__ == "__main__":
    run_main(main)
