"""Several processes, one accelerator each, that do one run together.

    processes.py   who a process is, and what processes tell each other
    launching.py   starting them, or finding that torchrun or SLURM did; ending them together
    sharding.py    FSDP2: student and teacher in shards
    progress.py    a training checkpoint made with another number of processes

Every process runs the same program. The first one (rank 0) owns the run folder and speaks; what one of them decides
from a measurement or a file is sent to all (``processes.from_first``), so that none goes a way of its own and waits in
a collective that the others never enter.
"""
