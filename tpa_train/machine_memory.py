"""How much memory a machine has left."""

from __future__ import annotations

from pathlib import Path

import torch

UNKNOWN = 2**63 - 1  # bytes, where the system does not say


def host_memory(file: str, field: str) -> int | None:
    """Returns a field of ``/proc/meminfo`` or ``/proc/self/status`` in bytes; None where there is none (not Linux)."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def free_bytes(device: torch.device) -> int:
    """Returns the bytes that this process may still take: on a GPU, with what its allocator holds unused."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    available = host_memory("/proc/meminfo", "MemAvailable") if device.type == "cpu" else None
    return UNKNOWN if available is None else available
