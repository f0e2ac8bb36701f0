"""What the toolkit costs and gains on a machine, as JSON that can be compared: ``scripts/benchmark.py``.

A benchmark is a module and a settings class, named in ``command.BENCHMARKS``:

* the first line of the module's docstring is the benchmark's summary, the rest more help;
* the settings are a dataclass whose fields are the options (``tpa_train.cli``; ``out`` is added to them). A field
  ``device``, if there is one, names the device that the record describes;
* ``run(settings) -> rows`` measures, and returns a list of flat dicts of numbers and short texts;
* ``render(rows) -> str``, if there is one, is what a person reads; without it the rows are printed as a table.

A benchmark that takes long names the fields of a row that tell its cells apart in ``CELL``, and in ``FREE`` the options
that only say which cells are measured. It is then called as ``run(settings, journal)`` (see ``benchmarks.journal``):
rows are on disk as soon as they are measured, and a benchmark that was stopped goes on.

``run`` checks its options before it starts anything long, and raises ``UserError`` for those that cannot work.
"""
