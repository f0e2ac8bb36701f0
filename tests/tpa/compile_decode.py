"""Compiles decoding kernels for an H100 without a GPU and prints one JSON line a case: what each launch takes of a
processor. Needs a process in which Triton does not interpret.

    python tests/tpa/compile_decode.py CASE[:tokens=64,warps=4,…] ...      (all cases when none is named)

Tiles are those that are chosen, changed as told.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tpa_train.gemma3.attention import Attention
from tpa_train.gemma3.config import SIZES
from tpa_train.gemma3.layers import rotary_table
from tpa_train.tpa.attention import FactorizedAttention
from tpa_train.tpa.decode import CachedTokens, assembler
from tpa_train.tpa.decode.combine import combine
from tpa_train.tpa.decode.launch import Launch, prepare
from tpa_train.tpa.decode.plan import plan_of
from tpa_train.tpa.decode.tuning import default_tiles
from tpa_train.tpa.spec import LayerSpec

TARGET = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.uint8: "*u8", torch.int32: "*i32",
    torch.int16: "*i16",
}  # fmt: skip
CONTEXT = 4096
WAITS = ("griddepcontrol.wait", "grid_dependency_wait")  # in Triton up to 3.6, and in newer ones
S = LayerSpec
# size, layer (5 is global, 0 local), specification, dtype
CASES = {
    "dense-270m": ("270m", 5, None),
    "dense-4b": ("4b", 5, None),
    "dense-4b-ring": ("4b", 0, None),
    "dense-270m-4bit": ("270m", 5, S("dense", 256, "dense", 256, 4)),
    "dense-270m-mixed": ("270m", 5, S("dense", 256, "latent", 256, (3, 4, 4, 6, 3, 4, 4, 6), (3, 4, 4, 4, 3, 3, 3, 2))),
    "latent-270m-128": ("270m", 5, S("latent", 128, "latent", 128)),
    "latent-270m-128-4bit": ("270m", 5, S("latent", 128, "latent", 128, 4)),
    "latent-270m-96-4bit": ("270m", 5, S("latent", 96, "latent", 96, 4)),
    "latent-270m-96-8bit": ("270m", 5, S("latent", 96, "latent", 96, 8)),
    "latent-270m-192-4bit": ("270m", 5, S("latent", 192, "latent", 192, 4)),
    "latent-270m-256": ("270m", 5, S("latent", 256, "latent", 256)),
    "latent-270m-256-8bit": ("270m", 5, S("latent", 256, "latent", 256, 8)),
    "latent-270m-192": ("270m", 5, S("latent", 192, "latent", 192)),
    "joint-270m-256-8bit": ("270m", 5, S("joint", 256, "joint", 256, 8)),
    "joint-270m-128-norms": ("270m", 5, S("joint", 128, "joint", 128, cached_norm=True)),
    "joint-270m-256-8bit-norms": ("270m", 5, S("joint", 256, "joint", 256, 8, cached_norm=True)),
    "joint-4b-512-norms": ("4b", 5, S("joint", 512, "joint", 512, 8, cached_norm=True)),
    "joint-27b-1024-norms": ("27b", 5, S("joint", 1024, "joint", 1024, cached_norm=True)),
    "joint-12b-1024-norms": ("12b", 5, S("joint", 1024, "joint", 1024, cached_norm=True)),
    "joint-12b-1024-8bit-norms": ("12b", 5, S("joint", 1024, "joint", 1024, 8, cached_norm=True)),
    "joint-270m-128-4bit-norms": ("270m", 5, S("joint", 128, "joint", 128, 4, cached_norm=True)),
    "joint-270m-192-4bit-norms": ("270m", 5, S("joint", 192, "joint", 192, 4, cached_norm=True)),
    "joint-270m-mixed-norms": ("270m", 5, S("joint", 160, "joint", 160, (8, 4, 4, 3, 2), cached_norm=True)),
    "joint-270m-352-mixed-norms": (
        "270m", 5, S("joint", 352, "joint", 352, (8, 6, 6, 4, 4, 3, 3, 3, 3, 2, 2), cached_norm=True)
    ),
    "joint-270m-96-mixed-norms": ("270m", 5, S("joint", 96, "joint", 96, (8, 6, 4), cached_norm=True)),
    "latent-270m-64": ("270m", 5, S("latent", 64, "latent", 64)),
    "latent-270m-64-ring": ("270m", 0, S("latent", 64, "latent", 64)),
    "latent-4b-64": ("4b", 5, S("latent", 64, "latent", 64)),
    "latent-4b-200-4bit": ("4b", 5, S("latent", 200, "latent", 200, 4)),
    "latent-27b-32": ("27b", 5, S("latent", 32, "latent", 32)),
    "latent-4b-49": ("4b", 5, S("latent", 49, "latent", 49)),
    "joint-270m-98": ("270m", 5, S("joint", 98, "joint", 98, 8)),
    "joint-270m-mixed": ("270m", 5, S("joint", 160, "joint", 160, (8, 4, 4, 3, 2))),
    "joint-270m-ring": ("270m", 0, S("joint", 160, "joint", 160, (8, 6, 4, 3, 16))),
    "joint-4b-512": ("4b", 5, S("joint", 512, "joint", 512, 8)),
    "contextual-4b-1": ("4b", 5, S("contextual", 1, "contextual", 1)),
    "contextual-27b-1": ("27b", 5, S("contextual", 1, "contextual", 1)),
    "contextual-12b-2": ("12b", 5, S("contextual", 2, "contextual", 2)),
    "contextual-27b-2": ("27b", 5, S("contextual", 2, "contextual", 2)),
    "contextual-27b-14": ("27b", 5, S("contextual", 14, "contextual", 14)),
    "contextual-4b-1-8bit": ("4b", 5, S("contextual", 1, "contextual", 1, 8)),
    "constant_a-latent-4b": ("4b", 5, S("constant_a", 2, "latent", 64)),
    "constant_a-4b": ("4b", 5, S("constant_a", 2, "constant_a", 2)),
    "constant_b-4b": ("4b", 5, S("constant_b", 64, "constant_b", 64)),
    "tucker-4b-mixed": ("4b", 5, S("tucker", 64, "tucker", 64, heads_k=2, heads_v=2)),
    "tucker-4b": ("4b", 5, S("tucker", 128, "tucker", 128)),
    "dense-contextual-4b": ("4b", 5, S("dense", 256, "contextual", 1)),
    "latent-contextual-4b-3bit": ("4b", 5, S("latent", 64, "contextual", 1, 8, 3)),
    "tucker-4b-3bit": ("4b", 5, S("tucker", 64, "tucker", 96, 16, 3, heads_k=2, heads_v=1)),
    "latent-1b-384-mixed": ("1b", 5, S("latent", 384, "latent", 384, 16, 8)),
    "latent-contextual-4b": ("4b", 5, S("latent", 64, "contextual", 1)),
}


def launches_of(
    name: str, changes: Mapping[str, Any] | None = None, dtype: torch.dtype = torch.bfloat16, batch: int = 1
) -> list[Launch]:
    size, index, spec = CASES[name]
    config = SIZES[size]
    attention = Attention(config, index) if spec is None else FactorizedAttention(config, index, spec)
    attention = attention.to(dtype).requires_grad_(False)
    for parameter in attention.parameters():  # an offset of keys among them
        parameter.fill_(1.0)
    slots = config.cached_tokens(index, CONTEXT)
    stored = tuple(torch.zeros(batch, slots, *shape, dtype=own or dtype) for shape, own in attention.storage())
    table = rotary_table(config, attention.kind, torch.arange(CONTEXT))
    cached = CachedTokens(stored, torch.ones(batch, dtype=torch.int32), table)
    queries = torch.zeros(batch, config.num_heads, config.head_dim, dtype=dtype)
    plan = plan_of(attention, dtype, queries.device)
    return prepare(attention, plan, queries, cached, replace(default_tiles(plan, dtype), **(changes or {})))[1]


def compile_launch(launch: Launch) -> dict:
    """Compiles as a launch on the GPU would, pointers aligned to 16 bytes; returns what the program takes."""
    names = launch.kernel.arg_names
    values = dict(zip(names, launch.arguments, strict=False)) | launch.options
    signature, constants, hints = {}, {}, {}
    for i, name in enumerate(names):
        value = values[name]
        if isinstance(value, torch.Tensor):
            signature[name], hints[(i,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
        elif launch.kernel.params[i].is_constexpr:
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, tuple):
            signature[name] = tuple(TYPES[t.dtype] for t in value)
            hints |= {(i, j): [["tt.divisibility", 16]] for j in range(len(value))}
        elif isinstance(value, int):  # no hints: the kernels specialize for none
            signature[name] = "i32"
        else:
            signature[name] = "fp32"
    source = ASTSource(launch.kernel, signature, constants, hints)
    named = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
    options = {name: launch.options[name] for name in named if name in launch.options}
    start = time.perf_counter()
    compiled = triton.compile(source, target=TARGET, options=options)
    ptx, ttgir = compiled.asm["ptx"], compiled.asm["ttgir"]
    found = {"kernel": compiled.metadata.name, "seconds": round(time.perf_counter() - start, 1)}
    return found | {
        "shared_kb": round(compiled.metadata.shared / 1024, 1), **resources(ptx),
        "wgmma": ttgir.count("warp_group_dot "), "mma": ttgir.count("tt.dot "),
        "async": len(re.findall(r"cp\.async\.\w+\.shared", ptx)), "early": read_early(ttgir), "asm": compiled.asm,
        "staged": largest_staged(ttgir), "apart": assembly_apart(ttgir), "repeated": sums_of_copies(ttgir),
    }  # fmt: skip


def largest_staged(ttgir: str) -> int:
    """Returns the numbers of the largest tensor that a tile's loop moves from registers through shared memory."""
    _, _, loop = ttgir.partition("scf.for")
    body, _, _ = loop.partition("scf.yield")
    moved = re.findall(r"(?:ttg\.local_alloc|ttg\.convert_layout) %\S+ : \(?tensor<([\dx]+)x[a-z]", body)
    return max((math.prod(map(int, shape.split("x"))) for shape in moved), default=0)


def assembly_apart(ttgir: str) -> int:
    """Returns how many operations of assembly on two int16 at once find them elsewhere than in a product's right
    operand, where both are of one column: those of ``values`` rely on it."""
    layouts = re.findall(r"elementwise_inline_asm.*packed_element = 2.*-> tensor<\d+x\d+x\w+, (.*?)> loc", ttgir)
    return sum("opIdx = 1" not in layout for layout in layouts)


def sums_of_copies(ttgir: str) -> int:
    """Returns how many reductions have an operand of which threads hold copies that others lie beyond: Triton 3.6 adds
    up neighbours until there are as many as are different, and so the copies."""
    layouts = dict(re.findall(r"^(#linear\d*) = #ttg\.linear<\{register = .*, lane = \[(.*?)\], warp", ttgir, re.M))
    count = 0
    for operand in re.findall(r'^ *%\S+ = "tt\.reduce"(?:.*\n)*?.*?\}\) : \((.*?)\) -> ', ttgir, re.M):
        for name in re.findall(r"#linear\d*", operand):
            kept = [any(map(int, base.split(", "))) for base in re.findall(r"\[([\d, ]+)\]", layouts[name])]
            count += kept != sorted(kept, reverse=True)
    return count


def read_early(ttgir: str) -> list[str] | None:
    """Returns the arguments that a program reads before it awaits the kernel before; None where it does not await it.

    Pointers come of other pointers, which are an operation's first operand.
    """
    lines = ttgir.splitlines()
    waits = [i for i, line in enumerate(lines) if any(name in line for name in WAITS)]
    if not waits:
        return None
    made: dict[str, str] = {}
    found = set()
    for line in lines[: waits[-1]]:  # the others are of programs that have nothing to do
        parsed = re.match(r"\s*(?:%(\w+) = )?(\S+) %(\w+)", line)
        if parsed is None:
            continue
        result, operation, operand = parsed.groups()
        if result is not None:
            made[result] = operand
        if operation in ("tt.load", "ttg.async_copy_global_to_local") or operation.startswith("tt.atomic"):
            while operand in made:
                operand = made[operand]
            found.add(operand)
    return sorted(found)


def resources(ptx: str) -> dict:
    """Returns registers a thread and bytes of spills, as ptxas reports them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [assembler.tool().path, "-v", "--gpu-name=sm_90a", str(path), "-o", str(Path(folder) / "out")]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr or done.stdout)
        report = done.stderr
    registers = re.search(r"Used (\d+) registers", report)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    return {"registers": int(registers[1]), "spilled": int(spills[1])}


def main(names: list[str]) -> None:
    for item in names or CASES:
        name, _, changed = item.partition(":")
        changes = {k: int(v) for k, v in (pair.split("=") for pair in changed.split(",") if pair)}
        for launch in launches_of(name, changes):
            if launch.kernel is combine and not changes.get("dependent"):
                continue
            found = compile_launch(launch)
            found.pop("asm")
            print(json.dumps({"case": item, **found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
