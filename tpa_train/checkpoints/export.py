"""The native inference folder: written whole or not at all, checked against the student that it came from.

    config.json         format version, architecture, one specification a layer, source of the weights
    model.safetensors   every parameter by its state-dict name (the head is tied to the embedding); of a large model
                        several files and an index, so that it is never held twice
    tokenizer.model     SentencePiece model
    chat_template.jinja of a tuned model, where its checkpoint had one
    README.md           model card
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from tpa_train.checkpoints.files import read_json, write_json
from tpa_train.checkpoints.shards import SHARD_BYTES, StoredWeights, nbytes, write_weights
from tpa_train.errors import UserError, nearest
from tpa_train.evaluation.metrics import compare_tokens
from tpa_train.gemma3.config import Gemma3Config
from tpa_train.gemma3.tokenizer import Tokenizer
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA, set_parameter
from tpa_train.tpa.spec import FORMAT_VERSION, TEXT_VERSION, VISION_VERSION, LayerSpec, specs_to_dicts

FORMAT = "tpa_train"
TEMPLATE = "chat_template.jinja"
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
VISION = "vision."  # prefix of the vision side's names
LOGIT_TOLERANCE = 1e-3  # float32 computation of the same numbers
ROUNDING_KL = 1e-2  # nats a token that storing in bfloat16 may cost


def export_model(
    student: Gemma3ForMultimodalLMwithTPA,
    out: str | Path,
    dtype: str = "auto",
    card: str = "",
    source_path: str | None = None,
    check_ids: Tensor | Mapping[str, Tensor] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes the inference folder of ``student`` and proves that it computes what the student computes.

    Args:
        student: the converted model.
        out: folder to make; must not exist or be empty.
        dtype: "auto" stores every weight as it is held, "float32" or "bfloat16" cast; a vision side is never cast.
        card: text of README.md.
        source_path: checkpoint that the model was made from, for ``scripts/evaluate.py``.
        check_ids: token ids int [1, L] for the comparison, or a batch as ``model.begin`` takes it; a fixed
            pseudo-random text when left out.
        shard_bytes: of a file; models that need more are written in several.

    Returns:
        The folder.

    Raises:
        UserError: the folder is in use, a weight is not finite, or the written folder's logits differ from the
            student's (nothing is left behind then).
    """
    out, wanted = Path(out), stored_type(dtype)
    check_free(out)
    parameters = dict(student.named_parameters())
    check_finite(parameters)

    def stored_as(name: str) -> torch.dtype:
        own = parameters[name].dtype
        return own if name.startswith(VISION) else wanted or own

    def read(name: str) -> Tensor:
        return parameters[name].detach().to(device="cpu", dtype=stored_as(name)).contiguous()

    sizes = {name: nbytes(parameter, stored_as(name)) for name, parameter in parameters.items()}
    adapter = getattr(student.source, "adapter", None)
    config = {
        "format": FORMAT,
        "format_version": format_version(student),
        "architecture": student.config.to_dict(),
        "layers": specs_to_dicts(student.specs),
        "source": {
            "path": source_path, "description": getattr(student.source, "description", None),
            "adapter": str(adapter.resolve()) if adapter is not None else None,
        },
    }  # fmt: skip
    with new_folder(out) as partial:
        write_json(partial / "config.json", config)
        write_weights(partial, sizes, read, shard_bytes)
        if student.tokenizer is not None:
            (partial / "tokenizer.model").write_bytes(student.tokenizer.model_proto)
            if template := getattr(student.tokenizer, "chat_template", None):
                (partial / TEMPLATE).write_text(template, encoding="utf-8")
        write_card(partial, card)
        verify_export(student, partial, exact=dtype != "bfloat16", text=check_ids)
    return out


def format_version(student: Gemma3ForMultimodalLMwithTPA) -> int:
    """Returns the lowest version whose readers load an export of ``student``."""
    if any(spec.cached_norm for spec in student.specs):
        return FORMAT_VERSION
    return VISION_VERSION if student.config.vision is not None else TEXT_VERSION


def stored_type(dtype: str) -> torch.dtype | None:
    """Returns what the option ``dtype`` stores weights in; None for "auto".

    Raises:
        UserError: it is none of ``DTYPES``.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype} is unknown{nearest(dtype, DTYPES)}")
    return DTYPES[dtype]


def write_card(folder: Path, card: str) -> None:
    """Writes the model card, if there is one."""
    if card:
        (folder / "README.md").write_text(card, encoding="utf-8")


def check_finite(parameters: Mapping[str, Tensor]) -> None:
    """Raises UserError if a parameter is not finite."""
    for name, parameter in parameters.items():
        if not bool(torch.isfinite(parameter).all()):
            raise UserError(f"'{name}' holds NaN or infinite values; the training diverged, nothing was exported.")


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
    student: Gemma3ForMultimodalLMwithTPA,
    folder: Path,
    exact: bool,
    text: Tensor | Mapping[str, Tensor] | None = None,
) -> None:
    """Compares what ``folder`` holds with ``student``, both computing in float32, one layer in memory at a time.

    Raises:
        UserError: logits differ by more than 1e-3 (``exact``), the KL exceeds what rounding explains, or the vision
            side is not the student's to the bit.
    """
    batch = check_batch(student, text)
    stored, parameters = StoredWeights.of(folder), dict(student.named_parameters())
    for name in parameters:
        if name.startswith(VISION) and not torch.equal(parameters[name].cpu(), stored.read(name)):
            raise UserError(f"the exported '{name}' is not the original's; nothing was exported.")
    config, specs = read_config(folder)
    compare_logits(student, config, specs, stored.read, batch, exact)


def check_batch(
    student: Gemma3ForMultimodalLMwithTPA, text: Tensor | Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """Returns ``text`` as a batch on the CPU; a fixed pseudo-random one where there is none."""
    if text is None:
        generator = torch.Generator().manual_seed(0)
        text = torch.randint(0, student.config.vocab_size, (1, 64), generator=generator)
    batch = {"token_ids": text} if isinstance(text, Tensor) else text
    return {name: tensor.cpu() for name, tensor in batch.items()}


@torch.no_grad()
def compare_logits(
    student: Gemma3ForMultimodalLMwithTPA,
    config: Gemma3Config,
    specs: list[LayerSpec],
    read: Callable[[str], Tensor],
    batch: Mapping[str, Tensor],
    exact: bool,
    own_specs: list[LayerSpec] | None = None,
) -> None:
    """Compares ``student`` with the model of ``config`` and ``specs`` whose parameters ``read`` gives by name.

    ``own_specs``: the student's with other cache widths, where what was written rounds less.

    Raises:
        UserError: see ``verify_export``.
    """
    parameters = dict(student.named_parameters())
    ours = _final_hidden(student.config, own_specs or student.specs, batch, lambda name: parameters[name].detach())
    theirs = _final_hidden(config, specs, batch, read)
    our_head, their_head = student.head_weight.cpu(), read("embed_tokens.weight")
    worst = max(float((ours @ a.float().T - theirs @ b.float().T).abs().max())
                for a, b in zip(our_head.split(32_768), their_head.split(32_768), strict=True))  # fmt: skip
    if exact and not worst <= LOGIT_TOLERANCE:
        raise UserError(f"the exported logits differ from the student's by {worst:.2g}; nothing was exported.")
    comparisons = compare_tokens(ours, theirs, our_head, their_head, batch["token_ids"][0])
    kl = float(torch.cat([c.kl for _, c in comparisons]).mean())
    if not kl <= ROUNDING_KL:
        raise UserError(
            f"the exported model is {kl:.3g} nats a token away from the student; use dtype=float32 (in a training "
            "run export.dtype=float32)."
        )


def _final_hidden(
    config: Gemma3Config, specs: list[LayerSpec], batch: Mapping[str, Tensor], read: Callable[[str], Tensor]
) -> Tensor:
    """Returns the final hidden states [L, D] of the batch's first row, in float32 on the CPU.

    ``read`` gives a parameter by name; each is asked for when its layer's turn comes, and dropped after it.
    """
    with torch.device("meta"):
        model = Gemma3ForMultimodalLMwithTPA(config, specs).eval()

    def fill(prefix: str) -> nn.Module:
        module = model.get_submodule(prefix)
        for name in dict(module.named_parameters()):
            tensor = read(f"{prefix}.{name}").to("cpu")
            tensor = tensor if prefix == "vision" else tensor.float()
            set_parameter(module, name, nn.Parameter(tensor, requires_grad=False))
        return module

    fill("embed_tokens")
    if model.vision is not None and "images" in batch:
        fill("vision")
    x, context = model.begin(batch)
    model.embed_tokens, model.vision = nn.Identity(), None
    for index in range(config.num_layers):
        x = fill(f"layers.{index}")(x, context)
        model.layers[index] = nn.Identity()
    return fill("norm")(x)[0]


def is_export(folder: Path) -> bool:
    """Returns whether ``folder`` is one of ours, whole or not, of whatever version."""
    try:
        return read_json(folder / "config.json").get("format") == FORMAT
    except UserError:
        return False


def read_config(folder: Path) -> tuple[Gemma3Config, list[LayerSpec]]:
    """Returns the architecture and layer specifications of an exported folder.

    Raises:
        UserError: no such folder, not an export, or of a newer format.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} is not an exported model: there is no config.json in it.")
    try:
        config = read_json(path)
    except UserError as error:
        raise UserError(f"{path} is damaged ({error}); export again.") from error
    try:
        if config.get("format") != FORMAT:
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
    expected, weights = dict(model.named_parameters()), StoredWeights.of(folder)
    if weights.files.keys() != expected.keys():
        first = sorted(weights.files.keys() ^ expected.keys())[0]
        raise UserError(f"{folder}'s weights do not fit config.json: '{first}' is missing or unknown.")
    for name, parameter in expected.items():
        tensor, where = weights.read(name), weights.files[name]
        if tensor.shape != parameter.shape:
            raise UserError(f"{where}: '{name}' has shape {tuple(tensor.shape)}, not {tuple(parameter.shape)}.")
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{where}: '{name}' holds NaN or infinite values.")
        own = tensor.dtype if name.startswith(VISION) else dtype
        set_parameter(model, name, nn.Parameter(tensor.to(device, own), requires_grad=False))
    if (folder / "tokenizer.model").is_file():
        template = folder / TEMPLATE
        model.tokenizer = Tokenizer.from_file(
            folder / "tokenizer.model", template.read_text(encoding="utf-8") if template.is_file() else None
        )
    return model.to(device).eval()
