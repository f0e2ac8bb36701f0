"""What ``scripts/pretrain.py`` can be told, and the checks that need neither text nor model."""

from __future__ import annotations

from dataclasses import dataclass, field

from tpa_train.data.settings import DataSettings
from tpa_train.distillation.modules import OptimizerSettings
from tpa_train.errors import UserError
from tpa_train.gemma3.config import Gemma3Config, layer_pattern
from tpa_train.pretraining.tokenizer import check_vocab_size

DEFAULT_VOCABULARY = 8192
PRECISIONS = ("auto", "bf16", "float32")
ACCELERATORS = ("auto", "cpu", "gpu")
DTYPES = ("bfloat16", "float32")
ONLY = ("tokenizer", "data")


@dataclass
class ModelArgs:
    hidden_size: int = field(default=512, metadata={"help": "width D of the residual stream."})
    num_layers: int = field(default=12, metadata={"help": "decoder layers."})
    num_heads: int = field(default=16, metadata={"help": "query heads, a multiple of the key/value heads."})
    num_kv_heads: int = field(default=8, metadata={"help": "key/value heads."})
    head_dim: int = field(default=64, metadata={"help": "size of a head, even."})
    intermediate_size: int = field(default=1280, metadata={"help": "width of the feed-forward."})
    sliding_window: int = field(default=256, metadata={"help": "tokens that a query of a local layer sees."})
    layers_per_global: int = field(default=6, metadata={"help": "every so-many-th layer is global, the rest local."})
    query_pre_attn_scalar: int | None = field(
        default=None, metadata={"help": "attention scores are divided by its square root; null: head_dim."}
    )
    max_context: int = field(default=4096, metadata={"help": "context that the model's config.json names."})


@dataclass
class DataArgs:
    path: list[str] = field(
        default_factory=list,
        metadata={
            "help": "text to train on: .txt, .md, .jsonl or .parquet (also .gz, .xz), a folder or a glob, or a .npz of "
            "only=data; without it the documentation and sources that Python itself carries."
        },
    )
    text_key: str = field(default="text", metadata={"help": "field that holds the text in .jsonl and .parquet."})
    max_tokens: int | None = field(default=None, metadata={"help": "use at most so many tokens; null: all the text."})
    heldout_fraction: float = field(
        default=0.02, metadata={"help": "share of the documents kept for validation, chosen by a hash of their text."}
    )
    join_documents: bool = field(
        default=True,
        metadata={"help": "let attention cross documents inside a row; false trains on a GPU without compilation."},
    )
    cache_dir: str | None = field(default=None, metadata={"help": "where tokenised text is kept."})


@dataclass
class OptimizerArgs:
    lr: float = field(default=2e-3, metadata={"help": "peak learning rate of AdamW."})
    weight_decay: float = field(default=0.1, metadata={"help": "of the matrices; norm weights never decay."})
    beta2: float = field(default=0.95, metadata={"help": "decay rate of AdamW's second moment."})
    warmup: float = field(default=0.03, metadata={"help": "share of the steps with a rising rate."})
    final_lr: float = field(default=0.02, metadata={"help": "share of the peak rate at the last step, by a cosine."})
    clip: float = field(default=1.0, metadata={"help": "largest gradient norm."})

    def schedule(self) -> OptimizerSettings:
        """Returns what ``distillation.modules.schedule`` reads."""
        return OptimizerSettings(warmup=self.warmup, final_lr=self.final_lr, clip=self.clip)


@dataclass
class PretrainArgs:
    out: str = field(metadata={"help": "folder to write, which must not exist or be empty."})
    only: str | None = field(
        default=None,
        metadata={"help": "stop early: tokenizer writes tokenizer.model, data also the tokenised text as train.npz, "
                  "to carry both to the machine that trains.", "choices": ONLY},
    )  # fmt: skip
    tokenizer: str | None = field(
        default=None, metadata={"help": "SentencePiece .model file; null: train one on the text, or read the one that "
                                "lies beside a .npz."},
    )  # fmt: skip
    vocab_size: int | None = field(
        default=None, metadata={"help": f"pieces of the tokenizer that is trained; null: {DEFAULT_VOCABULARY}."}
    )
    tokenizer_characters: int = field(
        default=50_000_000, metadata={"help": "characters that the tokenizer is trained on, out of all the text."}
    )
    model: ModelArgs = field(default_factory=ModelArgs)
    data: DataArgs = field(default_factory=DataArgs)
    optimizer: OptimizerArgs = field(default_factory=OptimizerArgs)
    tokens: int = field(
        default=130_000_000, metadata={"help": "tokens to train on, the text repeated as often as that takes."}
    )
    context: int = field(
        default=2048, metadata={"help": "tokens of a training row; longer texts are extrapolation for the model."}
    )
    batch_size: int = field(default=32, metadata={"help": "rows of an optimizer step."})
    minutes: float = field(
        default=8.0, metadata={"help": "training stops after so long, even if tokens are left; what was learned is "
                               "saved."},
    )  # fmt: skip
    validations: int = field(default=8, metadata={"help": "held-out measurements on the way, besides the last one."})
    validation_tokens: int = field(default=262_144, metadata={"help": "held-out tokens that each of them scores."})
    accelerator: str = field(default="auto", metadata={"help": "what trains.", "choices": ACCELERATORS})
    precision: str = field(
        default="auto",
        metadata={"help": "of the matrix products, weights stay float32; auto takes bf16 where the hardware has it.",
                  "choices": PRECISIONS},
    )  # fmt: skip
    compile: bool = field(default=True, metadata={"help": "compile the layers (on a GPU only)."})
    dtype: str = field(default="bfloat16", metadata={"help": "of the weights that are written.", "choices": DTYPES})
    seed: int = field(default=0, metadata={"help": "decides weights, order of the text, and the tokenizer's sample."})


def check(args: PretrainArgs) -> None:
    """Refuses what cannot work, naming the option; reads no file.

    Raises:
        UserError: see the message.
    """
    optimizer, data = args.optimizer, args.data
    positive = {
        "tokenizer_characters": args.tokenizer_characters, "tokens": args.tokens, "batch_size": args.batch_size,
        "validation_tokens": args.validation_tokens,
        **{f"model.{k}": getattr(args.model, k) for k in ("hidden_size", "num_layers", "num_heads", "num_kv_heads",
            "head_dim", "intermediate_size", "sliding_window", "layers_per_global")},
    }  # fmt: skip
    for option, value in positive.items():
        if value < 1:
            raise UserError(f"{option}={value} must be at least 1.")
    for option, value in (("validations", args.validations), ("seed", args.seed)):
        if value < 0:
            raise UserError(f"{option}={value} must not be negative.")
    for option, value in (
        ("minutes", args.minutes), ("optimizer.lr", optimizer.lr), ("optimizer.clip", optimizer.clip)
    ):  # fmt: skip
        if not 0 < value < float("inf"):
            raise UserError(f"{option}={value:g} must be a positive number.")
    for option, value in (("optimizer.warmup", optimizer.warmup), ("optimizer.final_lr", optimizer.final_lr)):
        if not 0 <= value <= 1:
            raise UserError(f"{option}={value:g} is a share: it must be between 0 and 1.")
    if not 0 <= optimizer.beta2 < 1:
        raise UserError(f"optimizer.beta2={optimizer.beta2:g} must be at least 0 and below 1.")
    if not 0 <= optimizer.weight_decay < float("inf"):
        raise UserError(f"optimizer.weight_decay={optimizer.weight_decay:g} must not be negative.")
    if not 2 <= args.context <= args.model.max_context:
        raise UserError(
            f"context={args.context} must be between 2 and model.max_context={args.model.max_context}; change either."
        )
    if args.tokens < args.context * args.batch_size:
        raise UserError(
            f"tokens={args.tokens:,} is less than one step of {args.batch_size} rows of {args.context}; raise it, or "
            f"lower batch_size."
        )
    if not 0 <= data.heldout_fraction < 1:
        raise UserError(f"data.heldout_fraction={data.heldout_fraction:g} must be at least 0 and below 1.")
    if data.max_tokens is not None and data.max_tokens < 1:
        raise UserError(f"data.max_tokens={data.max_tokens} must be at least 1, or null to use everything.")
    if data.heldout_fraction == 0 and args.only is None:
        raise UserError("data.heldout_fraction=0 leaves nothing to validate on; only only=data can do without.")
    if args.vocab_size is not None:
        check_vocab_size(args.vocab_size)
    model_config(args.model, args.vocab_size or DEFAULT_VOCABULARY)


def model_config(model: ModelArgs, vocab_size: int) -> Gemma3Config:
    """Returns the architecture.

    Raises:
        UserError: the sizes contradict each other.
    """
    if model.num_heads % model.num_kv_heads:
        raise UserError(
            f"model.num_heads={model.num_heads} must be a multiple of model.num_kv_heads={model.num_kv_heads}."
        )
    if model.head_dim % 2:
        raise UserError(f"model.head_dim={model.head_dim} must be even: RoPE rotates its two halves.")
    if model.layers_per_global > model.num_layers:
        raise UserError(
            f"model.layers_per_global={model.layers_per_global} leaves no global layer among "
            f"model.num_layers={model.num_layers}; lower it."
        )
    scalar = model.head_dim if model.query_pre_attn_scalar is None else model.query_pre_attn_scalar
    if scalar < 1:
        raise UserError(f"model.query_pre_attn_scalar={scalar} must be at least 1, or null.")
    return Gemma3Config(
        vocab_size=vocab_size,
        hidden_size=model.hidden_size,
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        intermediate_size=model.intermediate_size,
        sliding_window=model.sliding_window,
        query_pre_attn_scalar=float(scalar),
        max_context=model.max_context,
        layer_kinds=layer_pattern(model.num_layers, model.layers_per_global),
    )


def data_settings(args: PretrainArgs) -> DataSettings:
    """Returns the project's own settings of the text."""
    data = args.data
    settings = DataSettings(
        text_key=data.text_key, max_tokens=data.max_tokens, heldout_fraction=data.heldout_fraction,
        cache_dir=data.cache_dir, join_documents=data.join_documents, seed=args.seed,
    )  # fmt: skip
    if data.path:
        settings.kind, settings.path = "text", data.path[0] if len(data.path) == 1 else list(data.path)
    if not data.heldout_fraction:
        settings.heldout_min_tokens = 0
    return settings
