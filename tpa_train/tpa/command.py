"""``python scripts/generate.py``: continues a prompt by an exported model, or by an original one to compare with."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch

from tpa_train.cli import choose_device, parse
from tpa_train.errors import UserError
from tpa_train.gemma3.model import Gemma3ForCausalLM
from tpa_train.gemma3.processing import open_image
from tpa_train.serving.sampling import Sampling, random_seed

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STDIN = "-"

# Options of every command that decodes with one model (arguments of ``dataclasses.field``).
ADAPTER: dict[str, Any] = {
    "default": None, "metadata": {"help": "LoRA adapter to merge into an original checkpoint."},
}  # fmt: skip
DEVICE: dict[str, Any] = {
    "default": None, "metadata": {"help": "cpu, cuda, …; null: an accelerator if there is one."},
}  # fmt: skip
DTYPE: dict[str, Any] = {
    "default": None,
    "metadata": {
        "help": "of the weights and of unquantized cache entries; null: float32 on a CPU, else bfloat16.",
        "choices": tuple(DTYPES),
    },
}


@dataclass
class GenerateArgs:
    model: str = field(
        metadata={"help": "exported folder, a run's folder (its export/ is used), an original checkpoint, or the name "
        "of a packaged one (gemma3_270m)."},
    )  # fmt: skip
    prompt: str = field(metadata={"help": "text to continue; - reads it from standard input."})
    image: list[str] = field(
        default_factory=list,
        metadata={"help": "file of an image, for a multimodal model; repeat it for several. They stand where the "
        "prompt says <start_of_image>, or before it."},
    )  # fmt: skip
    pan_and_scan: bool = field(default=False, metadata={"help": "show long images in crops as well."})
    adapter: str | None = field(**ADAPTER)
    chat: str = field(
        default="false",
        metadata={"help": "put the prompt into the model's chat template and let it answer; auto: if its checkpoint "
                  "came with a template.", "choices": ("false", "true", "auto")},
    )  # fmt: skip
    max_tokens: int = field(default=128, metadata={"help": "write at most so many tokens."})
    temperature: float = field(default=0.0, metadata={"help": "0 takes the likeliest token every time."})
    top_k: int | None = field(default=None, metadata={"help": "sample from the so many likeliest tokens only."})
    top_p: float | None = field(
        default=None, metadata={"help": "sample from the fewest tokens that have so much probability together."}
    )
    min_p: float | None = field(
        default=None, metadata={"help": "sample only tokens at least so likely as this share of the likeliest one."}
    )
    repetition_penalty: float = field(
        default=1.0, metadata={"help": "above 1 makes tokens that were there already less likely."}
    )
    stop: list[str] = field(
        default_factory=list, metadata={"help": "end before this text; repeat it for several of them."}
    )
    seed: int | None = field(default=None, metadata={"help": "makes sampling repeatable."})
    device: str | None = field(**DEVICE)
    dtype: str | None = field(**DTYPE)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of scripts/generate.py: the continuation goes to stdout as it is written, figures to stderr.

    Raises:
        UserError: an argument or the model is at fault.
    """
    args = parse(
        GenerateArgs,
        sys.argv[1:] if argv is None else argv,
        "python scripts/generate.py",
        """
        Continues a prompt and streams the text. Works on exported models, whose cache is factored, and on original
        checkpoints, so that the two can be compared.
        """,
    )
    _check(args)
    prompt = sys.stdin.read().removesuffix("\n") if args.prompt == STDIN else args.prompt
    model = open_model(args.model, args.dtype, args.device, args.adapter)
    figures = stream(model, prompt, args, sys.stdout)
    print(describe(figures), file=sys.stderr)


def open_model(
    path: str | Path, dtype: str | None = None, device: str | None = None, adapter: str | None = None
) -> Gemma3ForCausalLM:
    """Loads an exported folder, the export of a run folder, an original checkpoint, or a packaged model by name.

    ``adapter`` is merged into an original checkpoint.

    Raises:
        UserError: nothing of the kind is at ``path``, it is damaged, or the device cannot be used.
    """
    from tpa_train.checkpoints import load_pretrained
    from tpa_train.checkpoints.export import is_export, load_export
    from tpa_train.checkpoints.locate import find_default, is_packaged

    where = choose_device(device)
    weights = DTYPES[dtype or ("float32" if where.type == "cpu" else "bfloat16")]
    folder = Path(path).expanduser()
    if (folder / "run.yaml").is_file():
        if not (folder / "export").is_dir():
            raise UserError(
                f"model={path}: this run has no export yet; go on with it (resume=true) or use scripts/export.py."
            )
        folder = folder / "export"
    if is_export(folder):
        if adapter is not None:
            raise UserError(f"adapter={adapter}: {folder} is an export; adapters are merged into originals only.")
        return load_export(folder, dtype=weights, device=where)
    original = find_default(str(path)) if is_packaged(str(path)) and not folder.exists() else folder
    return load_pretrained(original, weights, adapter).to(where).eval()


def stream(model: Gemma3ForCausalLM, prompt: str, args: GenerateArgs, out: TextIO) -> dict[str, Any]:
    """Writes the continuation of ``prompt`` to ``out``, token by token.

    Returns:
        prompt_tokens, tokens, first_token_seconds (loading excluded), seconds (after the first token), cache_bytes
        (as allocated for prompt and max_tokens) and dense_cache_bytes (of the original at the same length and dtype).

    Raises:
        UserError: the model has no tokenizer, or the text does not fit its context.
    """
    from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA
    from tpa_train.tpa.generation import encode_prompts, engine_for

    if model.tokenizer is None:
        raise UserError(f"model={args.model} has no tokenizer; put its tokenizer.model beside the weights.")
    chat = args.chat == "true" or args.chat == "auto" and model.tokenizer.chat_template is not None
    start, times = time.perf_counter(), []
    encoded, images = encode_prompts(model, prompt, chat, args.image, args.pan_and_scan)
    engine = engine_for(model, encoded, args.max_tokens)
    request = engine.submit(encoded[0], args.max_tokens, sampling=sampling_of(args), stop=args.stop, images=images[0])
    for update in engine.stream(request):
        times.append(time.perf_counter())
        out.write(update.text)
        out.flush()
    out.write("\n")
    out.flush()
    prompt_tokens = len(request.prompt)
    with torch.device("meta"):
        dense = Gemma3ForMultimodalLMwithTPA(model.config)
    capacity, dtype = prompt_tokens + args.max_tokens, model.head_weight.dtype
    caches = [m.allocate_cache(1, capacity, dtype=dtype, device="meta").nbytes for m in (model, dense)]
    return {
        "prompt_tokens": prompt_tokens, "tokens": len(times), "first_token_seconds": times[0] - start,
        "seconds": times[-1] - times[0], "capacity": capacity, "cache_bytes": caches[0], "dense_cache_bytes": caches[1],
    }  # fmt: skip


def describe(figures: dict[str, Any]) -> str:
    """Returns ``stream``'s figures in one line."""
    decoded, seconds = figures["tokens"] - 1, figures["seconds"]
    speed = f"{decoded / seconds:.1f} tokens/s" if decoded and seconds else "too few tokens to time"
    return (
        f"[{figures['prompt_tokens']} prompt tokens, first token after {figures['first_token_seconds']:.2f} s, "
        f"{figures['tokens']} written at {speed}; cache for {figures['capacity']:,} tokens {figures['cache_bytes']:,} "
        f"bytes (the original's: {figures['dense_cache_bytes']:,})]"
    )


def _check(args: GenerateArgs) -> None:
    for image in args.image:
        open_image(image, decode=False)
    if args.max_tokens < 1:
        raise UserError(f"max_tokens={args.max_tokens} must be at least 1.")
    if not all(args.stop):
        raise UserError("stop= is empty; name the text to end before, or leave it out.")
    sampling_of(args)


def sampling_of(args: GenerateArgs) -> Sampling:
    """Returns how tokens are chosen.

    Raises:
        UserError: an option is out of range.
    """
    seed = random_seed() if args.seed is None else args.seed
    return Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty, seed)
