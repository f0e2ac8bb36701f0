"""Tiny random models and a byte tokenizer for the evaluation tests."""

from __future__ import annotations

import torch

from tpa_train.gemma3.config import Gemma3Config
from tpa_train.gemma3.model import Gemma3ForCausalLM
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA
from tpa_train.tpa.spec import LayerSpec, dense_specs

CONFIG = Gemma3Config(
    vocab_size=300, hidden_size=32, num_layers=6, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=48,
    sliding_window=8, query_pre_attn_scalar=16.0, max_context=512,
)  # fmt: skip


class ByteTokenizer:
    """One id a byte, after four control ids."""

    vocab_size, pad_id, eos_id, bos_id, end_of_turn_id = 300, 0, 1, 2, None
    fingerprint = "cd" * 32

    def encode(self, text: str, bos: bool = True) -> list[int]:
        return [self.bos_id] * bos + [b + 4 for b in text.encode()]

    def encode_batch(self, texts, bos: bool = True, control: bool = True) -> list[list[int]]:
        return [self.encode(t, bos) for t in texts]

    def piece_text(self, index: int) -> str:
        return ""

    def byte_value(self, index: int) -> int | None:
        return index - 4 if 4 <= index < 260 else None


def dense_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> Gemma3ForCausalLM:
    torch.manual_seed(seed)
    model = Gemma3ForCausalLM(CONFIG).to(dtype)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    model.tokenizer = ByteTokenizer()
    return model.eval()


def tpa_model(dense: Gemma3ForCausalLM, bits: int = 16, seed: int = 1) -> Gemma3ForMultimodalLMwithTPA:
    """A student with random latent factors in the global layer (5)."""
    specs = dense_specs(dense.config)
    specs[5] = LayerSpec("latent", 8, "latent", 6, bits)
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in Gemma3ForMultimodalLMwithTPA(dense.config, specs).named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    dtype = dense.embed_tokens.weight.dtype
    factors = {n: torch.randn(s, generator=generator).to(dtype) * 0.2 for n, s in shapes.items()}
    return Gemma3ForMultimodalLMwithTPA.from_dense(dense, specs, factors)


def rows(count: int = 3, length: int = 40, seed: int = 2) -> list[dict[str, torch.Tensor]]:
    """Rows of two documents each; the second begins at a different place in every row."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        document_ids = (torch.arange(length) >= 11 + 3 * index).int()
        made.append({
            "token_ids": torch.randint(4, 260, (length,), generator=generator), "document_ids": document_ids,
        })  # fmt: skip
    return made
