"""``python scripts/serve.py``: an exported model, or an original one, behind OpenAI's API."""

from __future__ import annotations

import ipaddress
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tpa_train.cli import parse
from tpa_train.errors import UserError
from tpa_train.tpa.command import ADAPTER, DEVICE, DTYPE, open_model

GRACE = 20  # seconds that answers have to come to their end when the server is stopped


@dataclass
class ServeArgs:
    model: str = field(
        metadata={"help": "exported folder, a run's folder (its export/ is used), an original checkpoint, or the name "
        "of a packaged one (gemma3_270m)."},
    )  # fmt: skip
    host: str = field(default="127.0.0.1", metadata={"help": "address to listen on; 0.0.0.0 is all of the machine's."})
    port: int = field(default=8000, metadata={"help": "0 takes a free one."})
    name: str | None = field(default=None, metadata={"help": "the model's, for clients; null: its folder's or file's."})
    max_batch: int | None = field(
        default=None, metadata={"help": "sequences that decode at once; null: what memory has room for, at most 64."}
    )
    context: int | None = field(
        default=None, metadata={"help": "tokens of a prompt and its answer together; null: the model's."}
    )
    max_prompt: int | None = field(default=None, metadata={"help": "most tokens of a prompt; null: the context."})
    max_tokens: int | None = field(default=None, metadata={"help": "most tokens of an answer; null: the context."})
    queue: int = field(default=64, metadata={"help": "prompts that may wait for a place; more are refused (429)."})
    adapter: str | None = field(**ADAPTER)
    device: str | None = field(**DEVICE)
    dtype: str | None = field(**DTYPE)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of scripts/serve.py: serves until SIGINT or SIGTERM, then lets answers end and returns.

    Raises:
        UserError: an argument or the model is at fault, or the port is taken.
    """
    args = parse(
        ServeArgs,
        sys.argv[1:] if argv is None else argv,
        "python scripts/serve.py",
        """
        Serves a model by OpenAI's API (/v1/completions, /v1/chat/completions, /v1/models), many requests at once. There
        are no users and no passwords: whoever reaches the port can use the model.
        """,
    )
    _check(args)
    uvicorn = load_uvicorn()
    from tpa_train.serving.engine import Engine
    from tpa_train.serving.server import Server

    with listening(args) as bound:
        model = open_model(args.model, args.dtype, args.device, args.adapter)
        if model.tokenizer is None:
            raise UserError(f"model={args.model} has no tokenizer; put its tokenizer.model beside the weights.")
        engine = Engine(model, args.max_batch, args.context)
        name = args.name or model_name(args.model)
        server = Server(engine, name, args.max_tokens, args.max_prompt, args.queue)
        config = uvicorn.Config(server.app(), timeout_graceful_shutdown=GRACE, log_level="warning")
        print(
            f"serving {name} at http://{_address(args.host)}:{bound.getsockname()[1]}/v1: up to {engine.max_batch} "
            f"sequences of {engine.context:,} tokens at once, cache {engine.cache.nbytes:,} bytes"
            + ("" if _is_local(args.host) else "; no password is asked: whoever reaches this address can use it"),
            flush=True,
        )
        # uvicorn raises the signal that stopped it once more when it is done; by then it has been heeded.
        previous = {s: signal.signal(s, lambda *_: None) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            uvicorn.Server(config).run(sockets=[bound])
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)


def load_uvicorn() -> Any:
    """Returns the module ``uvicorn``.

    Raises:
        UserError: it, or starlette, is not installed.
    """
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise UserError("serving needs starlette and uvicorn: pip install -e '.[serve]'.") from error
    return uvicorn


def model_name(path: str) -> str:
    """Returns what clients call the model at ``path``: the folder's name (the run's, of its export/), or the file's."""
    where = Path(path).expanduser().resolve()
    if where.name == "export" and (where.parent / "run.yaml").is_file():
        where = where.parent
    return where.stem if where.suffix in (".gguf", ".ckpt", ".safetensors") else where.name


def listening(args: ServeArgs) -> socket.socket:
    """Returns a socket that is bound to the address.

    Raises:
        UserError: it is taken, or not one of this machine's.
    """
    try:
        family, *_, address = socket.getaddrinfo(args.host, args.port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise UserError(f"cannot listen on host={args.host} port={args.port}: {error.strerror or error}.") from error


def _address(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check(args: ServeArgs) -> None:
    if not 0 <= args.port < 1 << 16:
        raise UserError(f"port={args.port} must lie between 0 and 65535.")
    for name, least in (("queue", 0), ("max_prompt", 1), ("max_tokens", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"{name}={value} must be at least {least}.")
