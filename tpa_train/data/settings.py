"""What the user can say about training text. Every field's comment becomes its help line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

KINDS = ("python_docs", "text", "hub", "chat", "image_text")
TRAIN_ON = ("completions", "all")


@dataclass
class DataSettings:
    """Where documents come from, how many tokens of them to pack, and which are held out.

    A plain dataclass that `OmegaConf.structured` accepts.
    """

    # python_docs: manuals, docstrings and sources of the running Python (no download); text: local files;
    # hub: Hugging Face; chat: conversations, from files or the hub, in the checkpoint's chat template; image_text:
    # images with text, for multimodal models
    kind: str = "python_docs"
    # text: a file, folder, glob or a list of them (.txt .md .jsonl .parquet, the first three also .gz or .xz),
    # or data packed earlier: its folder, or the single .npz file of a compact export; chat: the same with .jsonl, .json
    # or .parquet files; image_text: a .jsonl file whose lines name an image's file (or a list of them), from the
    # .jsonl's folder, and its text
    path: Any = None
    # jsonl, parquet and hub: the field that holds a document's text
    text_key: str = "text"
    # text: plain .txt and .md files are cut into documents of about this many characters, at paragraph ends
    split_chars: int = 100_000
    # text and hub: true: names of control pieces in a document (<eos>, <unk>, …) become these pieces, as with
    # transformers' tokenizers; false: they are text, as to SentencePiece
    control_names: bool = False
    # image_text: the field that holds the image or images; they stand where the text says <start_of_image>, or else
    # before it
    image_key: str = "image"
    # image_text: show images that are much longer than high (or the other way round) in crops as well
    pan_and_scan: bool = False
    # hub and chat, and image_text without a path: data set name, such as HuggingFaceFW/fineweb-edu
    name: str | None = None
    # hub: configuration (subset) of the data set, where it has several
    subset: str | None = None
    # hub: split to stream
    split: str = "train"
    # chat: what the loss counts, completions (the model's turns, their ends included) or all (every token)
    train_on: str = "completions"
    # stop tokenising after this many tokens, held-out ones included; null packs everything
    max_tokens: int | None = 8_000_000
    # share of the documents kept from training, chosen by a hash of their text: the same ones in every run
    heldout_fraction: float = 0.02
    # small data: hold out at least this many tokens (but never more than a quarter of them)
    heldout_min_tokens: int = 65_536
    # packed data is kept here; null: $TPA_TRAIN_CACHE, else ~/.cache/tpa_train/packed
    cache_dir: str | None = None
    # true: attention crosses document boundaries inside a row, as if the data were one long text
    join_documents: bool = False
    # share of the training rows in which a part of the text comes again, further back than a sliding window sees
    copy_share: float = 0.0
    # orders the Python documents, deals rows to the stages and shuffles them
    seed: int = 0
    # loader processes; 0 reads in the training process (rows are memory-mapped: workers seldom pay)
    num_workers: int = 0
