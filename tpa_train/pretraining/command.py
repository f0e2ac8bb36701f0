"""``python scripts/pretrain.py``: a small Gemma 3 with several key/value heads, trained from random weights.

Three steps, of which the first two need no accelerator: a tokenizer, the text packed with it, and training. Everything
is seeded; on a CPU the same command gives the same weights, bit for bit.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tpa_train.checkpoints.export import check_free, new_folder
from tpa_train.cli import parse
from tpa_train.data.compact import export_compact
from tpa_train.data.datamodule import PackedDataModule
from tpa_train.data.packed import PackedStream, is_packed
from tpa_train.data.packing import pack
from tpa_train.data.sources import make_source
from tpa_train.errors import UserError
from tpa_train.evaluation.report import json_safe, versions
from tpa_train.gemma3.model import Gemma3ForCausalLM
from tpa_train.gemma3.tokenizer import Tokenizer
from tpa_train.interrupts import Interrupted, InterruptHandler
from tpa_train.pretraining.module import PretrainModule, heldout_loss, new_model
from tpa_train.pretraining.progress import Progress
from tpa_train.pretraining.saving import save_pretrained
from tpa_train.pretraining.settings import DEFAULT_VOCABULARY, PretrainArgs, check, data_settings, model_config
from tpa_train.pretraining.tokenizer import train_tokenizer
from tpa_train.settings import TrainerSettings
from tpa_train.trainers import Machine, choose_machine, make_trainer, seeded

TOKENIZER_FILE, DATA_FILE = "tokenizer.model", "train.npz"
PROGRAM = "python scripts/pretrain.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of scripts/pretrain.py; returns the exit status.

    Raises:
        UserError: an argument or the text is at fault, or the training diverged; nothing is written then.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse(
        PretrainArgs,
        argv,
        PROGRAM,
        """
        Trains a small Gemma 3 from random weights and writes it as a Hugging Face folder (config.json,
        model.safetensors, tokenizer.model, pretraining.json). The defaults make a model of 47M parameters with 8
        key/value heads, in about five minutes of one H100.

        The tokenizer and the text can be prepared elsewhere: only=data writes both to out, and data.path=OUT/train.npz
        trains on them. Ctrl-C stops after the current step and saves what was learned; a second one stops at once.
        """,
    )
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    handler = InterruptHandler()
    try:
        pretrain(args, f"{PROGRAM} {shlex.join(argv)}", handler)
    except Interrupted as stop:
        say(f"stopped by {stop}; nothing was written.")
        return stop.status
    return 0 if handler.requested is None else Interrupted(handler.requested).status


def pretrain(args: PretrainArgs, command: str = "", handler: InterruptHandler | None = None) -> Path:
    """Does what the options ask for; returns the folder that was written.

    Args:
        args: the options.
        command: recorded in ``pretraining.json``.
        handler: takes Ctrl-C and SIGTERM while the model trains.

    Raises:
        UserError: as ``main``.
        Interrupted: a second signal came before the first one's step was over.
    """
    # Everything that can be wrong with the options is found before anything long begins.
    out = Path(args.out).expanduser()
    check_free(out)
    check(args)
    if args.only is not None:
        return prepare(args, out)
    machine = choose(args)
    tokenizer = open_tokenizer(args)
    # Its stages are those of a conversion; the one that it serves by default has all rows, as no other claims any.
    data = PackedDataModule(data_settings(args), tokenizer, args.context, args.batch_size)
    data.prepare_data()
    data.setup()
    check_heldout(args, data)
    return train(args, machine, tokenizer, data, out, command, handler or InterruptHandler())


# ------------------------------------------------------------------------------------------------------------ data


def prepare(args: PretrainArgs, out: Path) -> Path:
    """Writes the tokenizer and, with only=data, the packed text to ``out``."""
    if tokenised(args):
        raise UserError(f"only={args.only} reads text, but data.path={args.data.path[0]} is tokenised already.")
    if args.only == "tokenizer" and args.tokenizer is not None:
        raise UserError("only=tokenizer trains a tokenizer, but tokenizer= names one; leave one of them out.")
    tokenizer = open_tokenizer(args)
    with new_folder(out) as partial:
        (partial / TOKENIZER_FILE).write_bytes(tokenizer.model_proto)
        if args.only == "data":
            folder = pack(data_settings(args), tokenizer)
            say(f"text         {count(folder, 'train')} to train on, {count(folder, 'heldout')} held out; compressing")
            export_compact(folder, partial / DATA_FILE)
    for file in sorted(out.iterdir()):
        say(f"wrote        {file} ({file.stat().st_size:,} bytes)")
    return out


def tokenised(args: PretrainArgs) -> bool:
    """Whether ``data.path`` is text that was packed earlier."""
    return len(args.data.path) == 1 and is_packed(Path(args.data.path[0]).expanduser())


def open_tokenizer(args: PretrainArgs) -> Tokenizer:
    """Reads the tokenizer that the options name or the packed text came with, or trains one on the text.

    Raises:
        UserError: it cannot be read or trained, or ``vocab_size`` says something else.
    """
    path = args.tokenizer and Path(args.tokenizer).expanduser()
    if path is None and tokenised(args):
        packed = Path(args.data.path[0]).expanduser()
        path = (packed if packed.is_dir() else packed.parent) / TOKENIZER_FILE
        if not path.is_file():
            raise UserError(f"data.path={packed} is tokenised text without a {TOKENIZER_FILE} beside it; name the one "
                            "that it was made with as tokenizer=.")  # fmt: skip
    if path is not None:
        tokenizer = Tokenizer.from_file(path)
        if args.vocab_size not in (None, tokenizer.vocab_size):
            raise UserError(
                f"vocab_size={args.vocab_size} contradicts {path}, which has {tokenizer.vocab_size} pieces; leave "
                f"vocab_size out."
            )
        return tokenizer
    vocab_size = args.vocab_size or DEFAULT_VOCABULARY
    say(f"tokenizer    {vocab_size:,} pieces, learned from up to {args.tokenizer_characters / 1e6:g}M characters")
    start = time.perf_counter()
    source = make_source(data_settings(args))
    tokenizer = train_tokenizer(source, vocab_size, args.tokenizer_characters, args.seed)
    say(f"             trained in {time.perf_counter() - start:.0f} s")
    return tokenizer


def count(folder: Path, split: str) -> str:
    """Returns how much one split of a packed folder holds, in words."""
    manifest = PackedStream(folder).manifest
    return f"{manifest.tokens[split]:,} tokens in {manifest.documents[split]:,} documents"


def check_heldout(args: PretrainArgs, data: PackedDataModule) -> None:
    """Raises UserError if the held-out text does not fill a row, before a model is made."""
    heldout = PackedStream(data.folder).manifest.tokens["heldout"]
    if heldout < args.context:
        raise UserError(
            f"only {heldout:,} tokens are held out, less than one row of context={args.context}; raise "
            f"data.heldout_fraction, use more text, or lower context."
        )


# -------------------------------------------------------------------------------------------------------- training


def choose(args: PretrainArgs) -> Machine:
    """Returns what trains.

    Raises:
        UserError: a GPU was asked for and there is none.
    """
    if args.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("accelerator=gpu was asked for, but PyTorch sees no CUDA device; use accelerator=cpu.")
    return choose_machine(TrainerSettings(accelerator=args.accelerator, precision=args.precision))


def train(
    args: PretrainArgs,
    machine: Machine,
    tokenizer: Tokenizer,
    data: PackedDataModule,
    out: Path,
    command: str,
    handler: InterruptHandler,
) -> Path:
    """Trains on the packed rows, measures on the held-out ones, and writes the folder ``out``."""
    config = model_config(args.model, tokenizer.vocab_size)
    model = new_model(config, args.seed)
    tokens_per_step = args.context * args.batch_size
    steps = -(-args.tokens // tokens_per_step)
    # Documents' lengths differ from batch to batch, and each would be compiled anew.
    compiled = args.compile and machine.device.type == "cuda" and args.data.join_documents
    say(banner(args, model, machine, data, steps, compiled))
    rows = data.heldout_rows(args.validation_tokens)

    def validate(rows: Any = rows, batch_size: int = args.batch_size) -> float:
        return heldout_loss(model, rows, batch_size, machine.autocast, args.data.join_documents)

    progress = Progress(steps, tokens_per_step, args.minutes, args.validations, validate, handler)
    machine.reset_peak()
    with seeded(args.seed), tempfile.TemporaryDirectory() as scratch:
        module = PretrainModule(model, args.optimizer, steps, args.data.join_documents, compiled)
        trainer = make_trainer(machine, Path(scratch), steps, callbacks=[progress])
        start = time.perf_counter()
        try:
            with handler.installed(), handler.deferred():
                trainer.fit(module, datamodule=data)
        except Interrupted:
            if progress.stopped is None:  # in the middle of a step
                raise
        seconds = time.perf_counter() - start
    done, stream = trainer.global_step, data.train_dataset.stream
    model.to(machine.device).eval()  # Lightning leaves it on the CPU
    losses: dict[str, Any] = {"heldout": validate(), "heldout_tokens": len(rows) * args.context}
    losses["heldout_perplexity"] = math.exp(losses["heldout"])
    if args.context < config.max_context <= stream.manifest.tokens["heldout"]:
        longest = data.heldout_rows(args.validation_tokens, config.max_context)
        losses["heldout_at_max_context"] = validate(longest, max(1, tokens_per_step // config.max_context))
    losses |= {"measured": progress.measured, "training": progress.curve()}
    training = {
        "steps": done, "planned_steps": steps, "tokens": done * tokens_per_step, "stopped": progress.stopped,
        "passes_over_the_text": done * tokens_per_step / len(stream), "seconds": seconds,
        "tokens_per_second": done * tokens_per_step / seconds, "peak_gib": machine.peak_gib(), "compiled": compiled,
    }  # fmt: skip
    say(summary(args, training, losses))
    facts = {
        "command": command,
        "settings": dataclasses.asdict(args),
        "architecture": config.to_dict(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "text": {k: getattr(stream.manifest, k) for k in ("tokens", "documents", "fingerprint", "tokenizer")},
        "training": training,
        "losses": losses,
        "machine": machine.describe(),
        "versions": versions(),
    }
    save_pretrained(model, tokenizer, out, getattr(torch, args.dtype), json_safe(facts))
    say(f"model        {out}")
    return out


def banner(
    args: PretrainArgs, model: Gemma3ForCausalLM, machine: Machine, data: PackedDataModule, steps: int, compiled: bool
) -> str:
    """Returns what will run, on what, and for how many tokens."""
    config, stream = model.config, data.train_dataset.stream
    parameters = sum(p.numel() for p in model.parameters())
    per_step = args.context * args.batch_size
    lines = [
        f"model        {parameters / 1e6:.1f}M parameters: {config.num_layers} layers "
        f"({config.layer_kinds.count('global')} global), D {config.hidden_size}, "
        f"{config.num_heads}/{config.num_kv_heads} heads of {config.head_dim}, vocabulary {config.vocab_size:,}",
        f"text         {count(data.folder, 'train')} to train on, {count(data.folder, 'heldout')} held out",
        f"training     {steps * per_step:,} tokens in {steps:,} steps of {args.batch_size} rows of {args.context}, "
        f"{steps * per_step / len(stream):.1f} passes over the text; at most {args.minutes:g} minutes",
        f"machine      {machine.describe()}{', compiled' if compiled else ''}",
    ]
    return "\n".join(lines)


def summary(args: PretrainArgs, training: dict[str, Any], losses: dict[str, Any]) -> str:
    """Returns how the training went."""
    lines = [
        f"trained      {training['tokens']:,} tokens in {training['seconds']:.0f} s "
        f"({training['tokens_per_second']:,.0f} tokens/s, {training['peak_gib']:.1f} GiB at most)",
        f"held-out     {losses['heldout']:.4f} nats a token, perplexity {losses['heldout_perplexity']:.2f}",
    ]
    if "heldout_at_max_context" in losses:
        lines[-1] += f"; {losses['heldout_at_max_context']:.4f} in rows of model.max_context={args.model.max_context}"
    if training["stopped"]:
        lines.append(
            f"stopped by {training['stopped']} after {training['steps']:,} of {training['planned_steps']:,} steps: "
            f"the learning rate had not come down yet; tokens={training['tokens']} would have reached a lower loss."
        )
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, flush=True)
