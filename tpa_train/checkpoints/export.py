"""The native inference folder: written whole or not at all, checked against the student that it came from.

    config.json         format version, architecture, one specification a layer, source of the weights
    model.safetensors   every parameter by its state-dict name (the head is tied to the embedding)
    tokenizer.model     SentencePiece model
    chat_template.jinja of a tuned model, where its checkpoint had one
    README.md           model card
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tpa_train.errors import UserError
from tpa_train.evaluation.metrics import compare_tokens
from tpa_train.gemma3.config import Gemma3Config
from tpa_train.gemma3.tokenizer import Tokenizer
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA, set_parameter
from tpa_train.tpa.spec import FORMAT_VERSION, LayerSpec, specs_to_dicts

FORMAT = "tpa_train"
TEMPLATE = "chat_template.jinja"
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
LOGIT_TOLERANCE = 1e-3  # float32 computation of the same numbers
ROUNDING_KL = 1e-2  # nats a token that storing in bfloat16 may cost


def export_model(
    student: Gemma3ForMultimodalLMwithTPA,
    out: str | Path,
    dtype: str = "auto",
    card: str = "",
    source_path: str | None = None,
    check_ids: Tensor | None = None,
) -> Path:
    """Writes the inference folder of ``student`` and proves that it computes what the student computes.

    Args:
        student: the converted model.
        out: folder to make; must not exist or be empty.
        dtype: "auto" stores every weight as it is held, "float32" or "bfloat16" cast.
        card: text of README.md.
        source_path: checkpoint that the model was made from, for ``scripts/evaluate.py``.
        check_ids: token ids int [1, L] for the comparison; a fixed pseudo-random text when left out.

    Returns:
        The folder.

    Raises:
        UserError: the folder is in use, a weight is not finite, or the written folder's logits differ from the
            student's (nothing is left behind then).
    """
    out = Path(out)
    if dtype not in DTYPES:
        raise UserError(f"export.dtype={dtype} is unknown; valid: {', '.join(DTYPES)}.")
    check_free(out)
    target = DTYPES[dtype]
    tensors = {}
    for name, parameter in student.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise UserError(f"'{name}' holds NaN or infinite values; the training diverged, nothing was exported.")
        tensors[name] = parameter.detach().to(device="cpu", dtype=target or parameter.dtype).contiguous()
    adapter = getattr(student.source, "adapter", None)
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "architecture": student.config.to_dict(),
        "layers": specs_to_dicts(student.specs),
        "source": {
            "path": source_path, "description": getattr(student.source, "description", None),
            "adapter": str(adapter.resolve()) if adapter is not None else None,
        },
    }  # fmt: skip
    with new_folder(out) as partial:
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        if student.tokenizer is not None:
            (partial / "tokenizer.model").write_bytes(student.tokenizer.model_proto)
            if template := getattr(student.tokenizer, "chat_template", None):
                (partial / TEMPLATE).write_text(template, encoding="utf-8")
        if card:
            (partial / "README.md").write_text(card)
        verify_export(student, partial, exact=dtype != "bfloat16", token_ids=check_ids)
    return out


def check_free(out: Path) -> None:
    """Raises UserError unless ``out`` does not exist or is an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out={out} already exists and is not empty; choose another folder.")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yields a temporary folder beside ``out`` that becomes ``out`` if the block succeeds and is removed if not.

    Raises:
        UserError: ``out`` is in use or cannot be written.
    """
    check_free(out)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        if out.exists():  # empty, as was checked
            out.rmdir()
        os.replace(partial, out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@torch.no_grad()
def verify_export(
    student: Gemma3ForMultimodalLMwithTPA, folder: Path, exact: bool, token_ids: Tensor | None = None
) -> None:
    """Loads ``folder`` and compares it with ``student``, both computing in float32.

    Raises:
        UserError: logits differ by more than 1e-3 (``exact``), or the KL exceeds what rounding explains.
    """
    if token_ids is None:
        generator = torch.Generator().manual_seed(0)
        token_ids = torch.randint(0, student.config.vocab_size, (1, 64), generator=generator)
    token_ids = token_ids.cpu()
    ours = _widened(student).hidden_states(token_ids)[0]  # one float32 copy of the model at a time
    exported = load_export(folder, dtype=torch.float32)
    theirs = exported.hidden_states(token_ids)[0]
    our_head, their_head = student.head_weight.cpu(), exported.head_weight
    worst = max(float((ours @ a.float().T - theirs @ b.T).abs().max())
                for a, b in zip(our_head.split(32_768), their_head.split(32_768), strict=True))  # fmt: skip
    if exact and not worst <= LOGIT_TOLERANCE:
        raise UserError(f"the exported logits differ from the student's by {worst:.2g}; nothing was exported.")
    comparisons = compare_tokens(ours, theirs, our_head, their_head, token_ids[0])
    kl = float(torch.cat([c.kl for _, c in comparisons]).mean())
    if not kl <= ROUNDING_KL:
        raise UserError(
            f"the exported model is {kl:.3g} nats a token away from the student; use export.dtype=float32."
        )


def _widened(student: Gemma3ForMultimodalLMwithTPA) -> Gemma3ForMultimodalLMwithTPA:
    """Returns a float32 copy of ``student`` on the CPU."""
    with torch.device("meta"):
        copy = Gemma3ForMultimodalLMwithTPA(student.config, student.specs)
    for name, parameter in student.named_parameters():
        wide = parameter.detach().to(device="cpu", dtype=torch.float32)
        set_parameter(copy, name, nn.Parameter(wide, requires_grad=False))
    return copy.eval()


def is_export(folder: Path) -> bool:
    """Returns whether ``folder`` is one of ours, whole or not, of whatever version."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("format") == FORMAT


def read_config(folder: Path) -> tuple[Gemma3Config, list[LayerSpec]]:
    """Returns the architecture and layer specifications of an exported folder.

    Raises:
        UserError: no such folder, not an export, or of a newer format.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} is not an exported model: there is no config.json in it.")
    try:
        config = json.loads(path.read_text())
        if not isinstance(config, dict) or config.get("format") != FORMAT:
            raise UserError(f"{path} does not describe an exported TPA model; use load_pretrained for an original one.")
        version = config.get("format_version")
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise UserError(
                f"{folder} has format version {version}, this version reads up to {FORMAT_VERSION}; update tpa-train."
            )
        specs = [LayerSpec(**layer) for layer in config["layers"]]
        return Gemma3Config.from_dict(config["architecture"]), specs
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); export again.") from error


def load_export(
    path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> Gemma3ForMultimodalLMwithTPA:
    """Loads an exported folder, tensor by tensor; see ``Gemma3ForMultimodalLMwithTPA.from_pretrained``.

    Raises:
        UserError: the folder is incomplete, damaged, or its tensors do not fit its config.
    """
    folder, device = Path(path), torch.device(device)
    config, specs = read_config(folder)
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    with torch.device("meta"):
        model = Gemma3ForMultimodalLMwithTPA(config, specs)
    expected = dict(model.named_parameters())
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise UserError(f"{folder} is incomplete: there is no model.safetensors in it.")
    try:
        with safe_open(weights, framework="pt", device="cpu") as file:
            stored = set(file.keys())
            if stored != set(expected):
                first = sorted(stored ^ set(expected))[0]
                raise UserError(f"{weights} does not fit config.json: '{first}' is missing or unknown.")
            for name, parameter in expected.items():
                tensor = file.get_tensor(name)
                if tensor.shape != parameter.shape:
                    raise UserError(
                        f"{weights}: '{name}' has shape {tuple(tensor.shape)}, not {tuple(parameter.shape)}."
                    )
                if not bool(torch.isfinite(tensor).all()):
                    raise UserError(f"{weights}: '{name}' holds NaN or infinite values.")
                set_parameter(model, name, nn.Parameter(tensor.to(device, dtype), requires_grad=False))
    except SafetensorError as error:
        raise UserError(f"{weights} is damaged or truncated ({error}).") from error
    if (folder / "tokenizer.model").is_file():
        template = folder / TEMPLATE
        model.tokenizer = Tokenizer.from_file(
            folder / "tokenizer.model", template.read_text(encoding="utf-8") if template.is_file() else None
        )
    return model.to(device).eval()
