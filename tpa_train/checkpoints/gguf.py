"""GGUF (llama.cpp): Gemma 3 files in any quantization that the ``gguf`` package can dequantize.

Format: github.com/ggml-org/ggml, docs/gguf.md. The metadata walk is our own because the package's reader makes several
array objects for each of the 262 144 vocabulary entries and takes ten seconds over it; this one takes 0.2.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from torch import Tensor

from tpa_train.checkpoints.weights import Checkpoint, Source, Weight, naming, vocabulary_rows
from tpa_train.errors import UserError
from tpa_train.gemma3.config import Gemma3Config
from tpa_train.gemma3.tokenizer import CONTROL, UNKNOWN, USER_DEFINED, Tokenizer, sentencepiece_model
from tpa_train.tpa.spec import LayerSpec, dense_specs

ARCHITECTURE = "gemma3"
_GLOBAL_NAMES = {"token_embd": "embed_tokens", "output_norm": "norm"}
_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
VALUE_BIAS = "v_proj.bias"  # of llama.cpp's Gemma 3, not of Google's: a dense export may have it
_STORED_BIAS = "attn_v.bias"
_FLOAT_TYPES = {GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16}
_CHUNK = 1 << 19  # weights dequantized at a time; measured: smaller is slower, larger only takes memory
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class TensorInfo:
    """One entry of the tensor table."""

    name: str
    shape: tuple[int, ...]  # rows first, as PyTorch has it (the file lists the fastest dimension first)
    kind: GGMLQuantizationType
    offset: int  # from the start of the file
    row_bytes: int  # bytes of one innermost row

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])


class GGUFFile:
    """Metadata and tensor table of a GGUF file.

    Attributes:
        metadata: key to value; arrays of numbers as numpy arrays, arrays of strings as lists.
        tensors: name to ``TensorInfo``.
    """

    def __init__(self, path: Path) -> None:
        """Reads the header.

        Raises:
            UserError: the file is not GGUF, or ends too early (in the header or in the tensor data).
        """
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        size = path.stat().st_size
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise UserError(f"{path} is not a GGUF file: it does not start with 'GGUF'.")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            self._read_header(size)
        except (struct.error, IndexError, UnicodeDecodeError, OverflowError, MemoryError) as error:
            raise UserError(f"{path} is damaged or cut short: its header does not end within the file.") from error
        finally:
            self._map.close()  # tensors are read with ordinary reads; see `read_rows`
            del self._map

    def read_rows(self, info: TensorInfo, start: int, stop: int) -> np.ndarray:
        """Returns the stored bytes of the rows [start, stop), uint8 [stop - start, row_bytes]."""
        # Ordinary reads instead of the memory map: pages that a map has touched count as this process's memory.
        count = (stop - start) * info.row_bytes
        raw = np.fromfile(self.path, np.uint8, count, offset=info.offset + start * info.row_bytes)
        if raw.size != count:
            raise UserError(f"{self.path} is cut short: the data of {info.name} is incomplete.")
        return raw.reshape(stop - start, info.row_bytes)

    def _read_header(self, size: int) -> None:
        version, tensor_count, key_count = struct.unpack_from("<IQQ", self._map, 4)
        if version not in (2, 3):
            raise UserError(f"{self.path} is GGUF version {version} (or big-endian); versions 2 and 3 are supported.")
        at = 24
        for _ in range(key_count):
            key, at = self._string(at)
            (kind,) = struct.unpack_from("<I", self._map, at)
            self.metadata[key], at = self._value(kind, at + 4)
        entries = []
        for _ in range(tensor_count):
            name, at = self._string(at)
            (dims,) = struct.unpack_from("<I", self._map, at)
            shape = struct.unpack_from(f"<{dims}Q", self._map, at + 4)
            kind, offset = struct.unpack_from("<IQ", self._map, at + 4 + 8 * dims)
            at += 16 + 8 * dims
            entries.append((name, shape[::-1], kind, offset))
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise UserError(f"{self.path} is damaged: its alignment is {alignment!r}.")
        data = -(-at // alignment) * alignment
        for name, shape, kind, offset in entries:
            self.tensors[name] = self._tensor(name, shape, kind, data + offset, size)

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int, offset: int, size: int) -> TensorInfo:
        try:
            quantization = GGMLQuantizationType(kind)
        except ValueError as error:
            raise UserError(f"{self.path}: {name} has the unknown tensor type {kind}.") from error
        block, block_bytes = GGML_QUANT_SIZES[quantization]
        if not shape or shape[-1] % block:
            raise UserError(f"{self.path}: {name} has shape {list(shape)}, impossible for {quantization.name}.")
        info = TensorInfo(name, shape, quantization, offset, shape[-1] // block * block_bytes)
        if offset + info.rows * info.row_bytes > size:
            raise UserError(f"{self.path} is cut short: the data of {name} ends beyond the end of the file.")
        return info

    def _string(self, at: int) -> tuple[str, int]:
        (length,) = struct.unpack_from("<Q", self._map, at)
        end = at + 8 + length
        raw = self._map[at + 8 : end]
        if len(raw) != length:
            raise IndexError("string beyond the end of the file")
        return raw.decode("utf-8"), end

    def _value(self, kind: int, at: int) -> tuple[Any, int]:
        if kind == _STRING:
            return self._string(at)
        if kind == _ARRAY:
            item, count = struct.unpack_from("<IQ", self._map, at)
            return self._array(item, count, at + 12)
        if kind not in _SCALARS:
            raise UserError(f"{self.path}: its metadata has the unknown value type {kind}.")
        code = "<" + _SCALARS[kind]
        return struct.unpack_from(code, self._map, at)[0], at + struct.calcsize(code)

    def _array(self, item: int, count: int, at: int) -> tuple[Any, int]:
        if item in _SCALARS:
            dtype = np.dtype("<" + _SCALARS[item])
            end = at + count * dtype.itemsize
            raw = self._map[at:end]
            if len(raw) != end - at:
                raise IndexError("array beyond the end of the file")
            return np.frombuffer(raw, dtype), end
        values = []
        for _ in range(count):
            value, at = self._value(item, at)
            values.append(value)
        return values, at


def open_gguf(path: Path) -> Checkpoint:
    """Opens a GGUF file holding a Gemma 3 text model.

    Raises:
        UserError: the file is damaged, split, of another architecture, or quantized in an unsupported way.
    """
    file = GGUFFile(path)
    architecture = file.metadata.get("general.architecture", "unnamed")
    if architecture != ARCHITECTURE:
        raise UserError(f"{path} holds a '{architecture}' model, not '{ARCHITECTURE}'.")
    if file.metadata.get("split.count", 1) not in (0, 1):
        raise UserError(f"{path} is one part of a split GGUF; join the parts with `llama-gguf-split --merge` first.")

    weights, unknown = {}, []
    for info in file.tensors.values():
        name = weight_name(info.name)
        if name is None:
            unknown.append(info.name)
        else:
            _check_supported(path, info)
            weights[name] = _weight(file, info, is_norm=name.endswith("norm.weight"))
    embedding = weights.get("embed_tokens.weight")
    if embedding is None:
        raise UserError(f"{path}: weight token_embd.weight is missing from the file.")
    vocabulary = vocabulary_rows(embedding.shape[0])
    weights["embed_tokens.weight"] = embedding.rows(vocabulary)
    quantized = any(info.kind not in _FLOAT_TYPES for info in file.tensors.values())
    label = _file_type(file)
    with naming(path):
        config = read_config(file, vocabulary)
        tokenizer = read_tokenizer(file)
    specs = _with_value_biases(weights, config)
    return Checkpoint(
        source=Source(path, "gguf", f"GGUF, {label} (dequantized)" if quantized else f"GGUF, {label}", quantized),
        config=config,
        weights=weights,
        tokenizer=tokenizer,
        unknown=tuple(unknown),
        specs=specs,
    )


def weight_name(stored: str) -> str | None:
    """Returns our name for a GGUF tensor name (blk.3.attn_q.weight), or None if Gemma 3 has no such tensor."""
    if match := re.fullmatch(rf"blk\.(\d+)\.{re.escape(_STORED_BIAS)}", stored):
        return f"layers.{match[1]}.self_attn.{VALUE_BIAS}"
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", stored):
        layer, part = match.groups()
        return f"layers.{layer}.{_LAYER_NAMES[part]}.weight" if part in _LAYER_NAMES else None
    part = stored.removesuffix(".weight")
    return f"{_GLOBAL_NAMES[part]}.weight" if part in _GLOBAL_NAMES and part != stored else None


def stored_name(name: str) -> str:
    """Returns the GGUF name of a dense model's parameter (layers.3.self_attn.q_proj.weight)."""
    if name.endswith(VALUE_BIAS):
        return f"blk.{name.split('.')[1]}.{_STORED_BIAS}"
    parts = {ours: stored for stored, ours in (_GLOBAL_NAMES | _LAYER_NAMES).items()}
    part = name.removesuffix(".weight")
    if part.startswith("layers."):
        _, layer, part = part.split(".", 2)
        return f"blk.{layer}.{parts[part]}.weight"
    return f"{parts[part]}.weight"


def score_scalar(hidden: int, heads: int, layers: int, head_dim: int) -> float:
    """Returns query_pre_attn_scalar as llama.cpp derives it from the sizes (src/llama-model.cpp, LLM_ARCH_GEMMA3)."""
    return hidden / heads if layers == 62 else float(head_dim)


def _with_value_biases(weights: dict[str, Weight], config: Gemma3Config) -> list[LayerSpec] | None:
    """Names the weights of layers whose values have a bias as those of a latent form, which is what they are then.

    Latents of rank head_dim, cached less a ``center``, which is the bias with its sign turned.

    Returns:
        One specification a layer, or None if no layer has a bias (a layer that lacks its weights is left as it is).
    """
    biased = {int(name.split(".")[1]): name for name in weights if name.endswith(VALUE_BIAS)}
    if not biased:
        return None
    specs, width = dense_specs(config), config.head_dim
    for layer, name in biased.items():
        if layer >= config.num_layers:
            continue
        specs[layer] = LayerSpec("dense", width, "latent", width)
        prefix = f"layers.{layer}.self_attn."
        for stored, ours in (("k_proj.", "keys.proj."), ("k_norm.", "keys.norm."),
                             ("v_proj.", "values.down."), ("o_proj.", "values.out.")):  # fmt: skip
            if (weight := weights.pop(f"{prefix}{stored}weight", None)) is not None:
                weights[f"{prefix}{ours}weight"] = weight
        bias = weights.pop(name)
        shape = (config.num_kv_heads, width)
        weights[prefix + "values.center"] = Weight(shape, partial(_center, bias, shape), bias.stored_as)
        none = (config.hidden_size,)
        weights[prefix + "values.bias"] = Weight(none, partial(_zeros, none), bias.stored_as)
    return specs


def _zeros(shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def _center(bias: Weight, shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
    return -bias.read(dtype).view(shape)


def read_config(file: GGUFFile, vocabulary: int) -> Gemma3Config:
    """Builds the configuration from the ``gemma3.*`` metadata.

    What llama.cpp keeps in code instead of in the file is repeated here: the local RoPE base, and ``score_scalar``.
    """

    def get(key: str, default: Any = None) -> Any:
        value = file.metadata.get(f"gemma3.{key}", default)
        if value is None:
            raise UserError(f"{file.path}: its metadata lacks gemma3.{key}.")
        return value

    hidden, heads, layers = (int(get(k)) for k in ("embedding_length", "attention.head_count", "block_count"))
    head_dim = int(get("attention.key_length", 256))
    if int(get("attention.value_length", head_dim)) != head_dim:
        raise UserError(f"{file.path}: keys and values of different sizes are not a Gemma 3 model.")
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if float(get(key, 0.0)):
            raise UserError(f"{file.path}: gemma3.{key} is set, which no Gemma 3 model uses.")
    scaling = str(get("rope.scaling.type", "none"))
    if scaling not in ("none", "linear"):
        raise UserError(f"{file.path}: RoPE scaling '{scaling}' is not supported, only 'linear'.")
    factor = float(get("rope.scaling.factor", 1.0)) if scaling == "linear" else 1.0
    score_scale = float(get("attention.scale", 0.0))
    if score_scale:
        query_scalar = score_scale**-2
    else:
        query_scalar = score_scalar(hidden, heads, layers, head_dim)
    return Gemma3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=int(get("attention.head_count_kv", heads)),
        head_dim=head_dim,
        intermediate_size=int(get("feed_forward_length")),
        sliding_window=int(get("attention.sliding_window")),
        query_pre_attn_scalar=query_scalar,
        rope_theta=float(get("rope.freq_base", 1e6)),
        rope_local_theta=float(get("rope.freq_base_swa", 1e4)),
        rope_scaling_factor=factor,
        # Stored in float32, where 1e-6 is not exact; rounding gives back the number that was meant.
        rms_norm_eps=float(f"{float(get('attention.layer_norm_rms_epsilon', 1e-6)):.6g}"),
        max_context=int(get("context_length")),
        layer_kinds=_layer_kinds(get("attention.sliding_window_pattern", 6), layers),
    )


def read_tokenizer(file: GGUFFile) -> Tokenizer | None:
    """Rebuilds the SentencePiece model from the vocabulary arrays, or returns None if the file has none.

    The conversion to GGUF loses two things, put back here: user-defined pieces were stored with spaces for '▁', and
    every piece that looks special was typed as control, though the original has only <pad>, <eos> and <bos> as
    control and all others (turns, unused) as user-defined, which is what makes them parse from text.
    """
    meta = file.metadata
    pieces = meta.get("tokenizer.ggml.tokens")
    if pieces is None:
        return None
    kind = meta.get("tokenizer.ggml.model")
    if kind != "llama":
        raise UserError(f"{file.path}: its tokenizer is a '{kind}' one, not SentencePiece ('llama').")
    scores, kinds = meta.get("tokenizer.ggml.scores"), meta.get("tokenizer.ggml.token_type")
    if scores is None or kinds is None or not len(pieces) == len(scores) == len(kinds):
        raise UserError(f"{file.path}: its vocabulary, scores and token types differ in length.")
    names = {"unk_id": ("unknown", 3), "bos_id": ("bos", 2), "eos_id": ("eos", 1), "pad_id": ("padding", 0)}
    ids = {key: int(meta.get(f"tokenizer.ggml.{name}_token_id", usual)) for key, (name, usual) in names.items()}
    # An instruction-tuned file names <end_of_turn> as its end; the vocabulary has the model's own <eos> all the same.
    for key, piece in (("unk_id", "<unk>"), ("bos_id", "<bos>"), ("eos_id", "<eos>"), ("pad_id", "<pad>")):
        if not (0 <= ids[key] < len(pieces) and pieces[ids[key]] == piece):
            if piece not in pieces:
                raise UserError(f"{file.path}: its vocabulary has no {piece}, so it is not Gemma's.")
            ids[key] = pieces.index(piece)
    count = vocabulary_rows(len(pieces))
    pieces, scores, kinds = pieces[:count], scores[:count].tolist(), kinds[:count].tolist()
    control = {ids["bos_id"], ids["eos_id"], ids["pad_id"]}
    for index, kind in enumerate(kinds):
        if kind == CONTROL and index not in control:
            kinds[index] = kind = USER_DEFINED
        if kind == USER_DEFINED:
            pieces[index] = pieces[index].replace(" ", "▁")
    kinds[ids["unk_id"]] = UNKNOWN
    return Tokenizer(
        sentencepiece_model(pieces, scores, kinds, ids), meta.get("tokenizer.chat_template"), f"{file.path}'s tokenizer"
    )


def _layer_kinds(pattern: Any, layers: int) -> tuple:
    if np.ndim(pattern) == 0:
        return tuple("global" if (i + 1) % int(pattern) == 0 else "local" for i in range(layers))
    return tuple("local" if local else "global" for local in pattern)


def _weight(file: GGUFFile, info: TensorInfo, is_norm: bool) -> Weight:
    def read(dtype: torch.dtype) -> Tensor:
        out = torch.empty(info.rows, info.shape[-1], dtype=dtype)
        for start, stop in _row_chunks(info):
            # Blocks do not care about rows, and one long row saves the package's loop over groups of 16 rows.
            values = quants.dequantize(file.read_rows(info, start, stop).reshape(1, -1), info.kind)
            if is_norm:
                values = values - np.float32(1.0)  # GGUF stores 1 + w
            out[start:stop] = torch.from_numpy(values.reshape(stop - start, -1))
        return out.view(info.shape)

    return Weight(info.shape, read, info.name)


def _row_chunks(info: TensorInfo) -> Iterator[tuple[int, int]]:
    step = max(1, _CHUNK // info.shape[-1])
    for start in range(0, info.rows, step):
        yield start, min(start + step, info.rows)


def _check_supported(path: Path, info: TensorInfo) -> None:
    if info.kind in _FLOAT_TYPES:
        return
    try:
        quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[info.kind][1]), np.uint8), info.kind)
    except NotImplementedError as error:
        raise UserError(f"{path}: {info.name} is stored as {info.kind.name}, which cannot be dequantized.") from error


def _file_type(file: GGUFFile) -> str:
    """Returns the usual name of the file's quantization (Q4_K_M), or of its largest tensor's if it names none."""
    try:
        return LlamaFileType(int(file.metadata["general.file_type"])).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except (KeyError, TypeError, ValueError):
        return max(file.tensors.values(), key=lambda info: info.rows * info.row_bytes).kind.name
