"""``python scripts/benchmark.py NAME [option=value …] [out=FILE.json]``: finds a benchmark, runs it, writes it down."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import logging
import shlex
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from tpa_train.benchmarks.journal import Journal
from tpa_train.benchmarks.record import check_out, make_record, table_of, write_record
from tpa_train.cli import HELP, choose_device, parse
from tpa_train.errors import UserError, nearest

PROGRAM = "python scripts/benchmark.py"
# name -> module and settings class; imported when it is asked for
BENCHMARKS = {
    "multimodal": "tpa_train.benchmarks.multimodal:MultimodalSettings",
    "decode": "tpa_train.benchmarks.decode:DecodeSettings",
    "decode_model": "tpa_train.benchmarks.decode_model:DecodeModelSettings",
    "decode_cpu": "tpa_train.benchmarks.decode_steps:DecodeStepSettings",
    "forms": "tpa_train.benchmarks.forms:FormsSettings",
    "loss": "tpa_train.benchmarks.loss:LossSettings",
    "quality": "tpa_train.benchmarks.quality:QualitySettings",
    "recovery": "tpa_train.benchmarks.recovery:RecoverySettings",
    "scaling": "tpa_train.benchmarks.scaling:ScalingSettings",
    "train": "tpa_train.benchmarks.train:TrainBenchmark",
    "streaming": "tpa_train.benchmarks.streaming:StreamingSettings",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of scripts/benchmark.py.

    Raises:
        UserError: the benchmark's name or an option is at fault.
        SystemExit: with status 0, after printing the help.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0] in HELP:
        print_help()
        raise SystemExit(0)
    module, schema = find(argv[0] if argv else None)
    options = parse(with_out(schema), argv[1:], f"{PROGRAM} {argv[0]}", module.__doc__)
    settings = schema(**{item.name: getattr(options, item.name) for item in dataclasses.fields(schema)})
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    check_out(options.out)
    device = choose_device(getattr(settings, "device", None))

    def record(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return make_record(f"{PROGRAM} {shlex.join(argv)}", settings, rows, device)

    if hasattr(module, "CELL"):
        rows = module.run(settings, Journal(options.out, record, module.CELL, module.FREE))
    else:
        rows = module.run(settings)
    print(getattr(module, "render", table_of)(rows))
    if options.out is not None:
        write_record(options.out, record(rows))
        print(f"\nwritten to {options.out}")


def find(name: str | None) -> tuple[ModuleType, type]:
    """Returns the module and the settings class of benchmark ``name``.

    Raises:
        UserError: there is none of that name.
    """
    if name in BENCHMARKS:
        module, _, schema = BENCHMARKS[name].partition(":")
        return importlib.import_module(module), getattr(importlib.import_module(module), schema)
    if name is None or "=" in name:
        raise UserError(
            f"name a benchmark first, out of: {', '.join(BENCHMARKS)}; '{PROGRAM} --help' lists their options."
        )
    raise UserError(f"there is no benchmark '{name}'{nearest(name, BENCHMARKS)}")


def with_out(schema: type) -> type:
    """Returns ``schema`` with the option that all benchmarks share."""
    out = dataclasses.field(
        default=None, metadata={"help": "JSON file to write besides the table, such as results/name.json."}
    )
    return dataclasses.make_dataclass(schema.__name__, [("out", str | None, out)], bases=(schema,))


def print_help() -> None:
    """Prints every benchmark with its options."""
    print(f"usage: {PROGRAM} NAME [option=value …] [out=FILE.json]\n")
    found = {name: find(name) for name in BENCHMARKS}
    for name, (module, _) in found.items():
        print(f"{name}: {module.__doc__.splitlines()[0]}")
    for name, (module, schema) in found.items():
        print("\n" + "-" * 80)
        with contextlib.suppress(SystemExit):
            parse(with_out(schema), ["--help"], f"{PROGRAM} {name}", module.__doc__.splitlines()[0])
