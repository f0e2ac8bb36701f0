"""Small random weights and a small Gemma-like vocabulary for the checkpoint tests."""

from __future__ import annotations

import string

import torch

from tpa_train.gemma3.config import Gemma3Config
from tpa_train.gemma3.model import Gemma3ForCausalLM
from tpa_train.gemma3.tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED

TINY = Gemma3Config(
    vocab_size=400, hidden_size=64, num_layers=7, num_heads=4, num_kv_heads=2, head_dim=32, intermediate_size=96,
    sliding_window=8, query_pre_attn_scalar=32.0, max_context=512,
)  # fmt: skip


def random_state(config: Gemma3Config, seed: int = 0) -> dict[str, torch.Tensor]:
    """Returns random float32 weights; norm weights too, since zeros would hide a forgotten 1 + w."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Gemma3ForCausalLM(config).state_dict().items()}
    return {
        name: torch.randn(shape, generator=generator) * (0.3 if name.endswith("norm.weight") else shape[-1] ** -0.5)
        for name, shape in shapes.items()
    }


def vocabulary() -> tuple[list[str], list[float], list[int]]:
    """Returns pieces, scores and types laid out as Gemma's: control, user-defined, bytes, merges, characters."""
    special = [("<pad>", CONTROL), ("<eos>", CONTROL), ("<bos>", CONTROL), ("<unk>", UNKNOWN), ("<mask>", USER_DEFINED)]
    special += [(p, USER_DEFINED) for p in ("<start_of_turn>", "<end_of_turn>", "\n", "\n\n", "▁▁", "▁▁▁", "\t")]
    entries = [(piece, -1000.0, kind) for piece, kind in special]
    entries += [(f"<0x{i:02X}>", 0.0, BYTE) for i in range(256)]
    merges = ["he", "th", "the", "▁the", "in", "ll", "hell", "hello", "▁w", "or", "ld", "orld", "▁world"]
    entries += [(piece, -float(rank), NORMAL) for rank, piece in enumerate(merges)]
    characters = "▁" + string.ascii_letters + string.digits + ".,"
    entries += [(piece, -1000.0 - rank, NORMAL) for rank, piece in enumerate(characters)]
    return [e[0] for e in entries], [e[1] for e in entries], [e[2] for e in entries]


SPECIAL_IDS = {"unk_id": 3, "bos_id": 2, "eos_id": 1, "pad_id": 0}
