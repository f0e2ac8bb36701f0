"""Tiny texts, questions and options on which the quality benchmarks take seconds."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

from tiny_runs import training_options, write_model, write_text_file

TRAIN_STEP = 64 * 2  # tokens


def prepare(folder: Path) -> SimpleNamespace:
    """Writes model, texts and questions; ``shared``: keyword arguments of both benchmarks' settings."""
    model, train = write_model(folder / "model"), write_text_file(folder / "train.txt")
    valid, wikitext2 = (write_text_file(folder / f"{name}.txt", 12_000) for name in ("valid", "wikitext2"))
    questions = folder / "colours.jsonl"
    asked = [{"context": f"{word} is", "choices": ["blue", "the world"], "label": i % 2} for i, word in
             enumerate(("hello", "the sky", "in", "a word", "world", "or"))]  # fmt: skip
    questions.write_text("\n".join(map(json.dumps, asked)))
    own = ("data=", "data.path=", "budget.cache_ratio=", "budget.bits=", "recipe.layerwise.tokens=",
           "recipe.distill.tokens=")  # fmt: skip
    options = [o for o in training_options(train, folder / "cache") if not o.startswith(own)]
    shared = dict(
        train=str(train), valid=str(valid), wikitext2=str(wikitext2), texts=[str(train)], model=str(model),
        options=options, valid_tokens=256, valid_context=128, wikitext2_tokens=128, wikitext2_context=64, copy_count=1,
    )  # fmt: skip
    return SimpleNamespace(shared=shared, questions=str(questions), folder=folder)


def without_times(rows: list[dict]) -> list[dict]:
    """Returns the rows without what differs between two measurements of the same thing."""
    return [
        {key: value for key, value in row.items() if not key.endswith(("seconds", "minutes", "gib", "_per_second"))}
        for row in rows
    ]
