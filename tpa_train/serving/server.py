"""An HTTP server that speaks OpenAI's API: /v1/models, /v1/completions and /v1/chat/completions.

One thread steps the engine; requests reach it through the engine's queue, and what it adds to an answer comes back to
the event loop. A client that goes away cancels its request.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from tpa_train.errors import UserError
from tpa_train.gemma3.chat import ChatTemplate
from tpa_train.serving.engine import Engine
from tpa_train.serving.protocol import Call, RequestError, answer, chunk, read_call, usage, usage_chunk
from tpa_train.serving.requests import Request, Update

log = logging.getLogger(__name__)
BYTES_PER_TOKEN = 64  # of a request's body: more than any token of text has, with what JSON adds


class EngineThread:
    """Steps an engine while it has work."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._wake, self._stopping = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its step; what is still being answered is cancelled."""
        self._stopping = True
        self.wake()
        self._thread.join()
        self.engine.clear()

    def wake(self) -> None:
        """Says that there may be something to do."""
        self._wake.set()

    def _run(self) -> None:
        while not self._stopping:
            self._wake.wait()
            self._wake.clear()
            while not self.engine.idle and not self._stopping:
                try:
                    self.engine.step()
                except Exception:  # the engine has ended its requests; the next ones may fare better
                    log.exception("a step of the engine failed")


class Answers:
    """The answers to one HTTP request: a request to the engine for each prompt. Made and closed in the event loop."""

    def __init__(self, server: Server, call: Call, prompts: list[list[int]]) -> None:
        """Submits the prompts.

        Raises:
            RequestError: a prompt does not fit, or the engine refuses something else.
        """
        self._server, self._open = server, True
        self._updates: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()
        self.requests: list[Request] = []
        loop = asyncio.get_running_loop()

        def receiver(index: int) -> Any:
            def receive(update: Update) -> None:
                with contextlib.suppress(RuntimeError):  # the loop was closed
                    loop.call_soon_threadsafe(self._updates.put_nowait, (index, update))

            return receive

        server.active += len(prompts)
        self._count = len(prompts)
        try:
            for index, ids in enumerate(prompts):
                limit = server.limit(len(ids), call.max_tokens)
                self.requests.append(
                    server.engine.submit(ids, limit, sampling=call.sampling, stop=call.stop, on_update=receiver(index))
                )
        except UserError as error:
            self.close()
            raise RequestError(str(error), "messages" if call.kind == "chat" else "prompt") from error
        except BaseException:
            self.close()
            raise
        server.thread.wake()

    def close(self) -> None:
        """Cancels what is not finished."""
        if self._open:
            self._open = False
            self._server.active -= self._count
            for request in self.requests:
                self._server.engine.cancel(request)
            self._server.thread.wake()

    async def updates(self) -> AsyncIterator[tuple[int, Update]]:
        """Yields each prompt's number with what was added to its answer, until all are finished.

        Raises:
            RequestError: the engine stopped or failed.
        """
        left = len(self.requests)
        while left:
            index, update = await self._updates.get()
            if update.finish_reason == "cancelled":
                raise RequestError("the answer was broken off by the server; try again.", status=503)
            left -= update.finish_reason is not None
            yield index, update

    def usage(self) -> dict[str, int]:
        return usage(sum(len(r.prompt) for r in self.requests), sum(r.steps for r in self.requests))


class EventStream(StreamingResponse):
    """Server-sent events that close their answers however they end, if they begin at all."""

    def __init__(self, answers: Answers, call: Call) -> None:
        super().__init__(_events(answers, call), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.close()


async def _events(answers: Answers, call: Call) -> AsyncIterator[str]:
    def event(content: dict[str, Any]) -> str:
        return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"

    try:
        if call.kind == "chat":
            for index in range(len(answers.requests)):
                yield event(chunk(call, index, "", first=True))
        async for index, update in answers.updates():
            if update.text or update.finish_reason is not None:
                yield event(chunk(call, index, update.text, update.finish_reason))
        if call.include_usage:
            yield event(usage_chunk(call, answers.usage()))
        yield "data: [DONE]\n\n"
    except RequestError as error:
        yield event(error.body())


class Server:
    """The application around one engine.

    Args:
        engine: of a model with a tokenizer.
        name: of the model, as clients ask for it.
        max_tokens: most tokens of an answer; the engine's context when left out.
        max_prompt: most tokens of a prompt; all of the context but one when left out.
        max_waiting: requests that may wait for a place in the batch before others are refused (429).
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        max_tokens: int | None = None,
        max_prompt: int | None = None,
        max_waiting: int = 64,
    ) -> None:
        self.engine, self.name, self.max_waiting = engine, name, max_waiting
        self.max_tokens = engine.context if max_tokens is None else max_tokens
        self.max_prompt = engine.context - 1 if max_prompt is None else max_prompt
        self.template = ChatTemplate(engine.model.tokenizer)
        self.thread = EngineThread(engine)
        self.active = 0  # prompts that are being answered; of the event loop alone
        self.created = int(time.time())

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/health", self._health),
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._model),
                Route("/v1/completions", self._completions, methods=["POST"]),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
            ],
            exception_handlers={
                RequestError: _refusal,
                HTTPException: _http_error,
                ClientDisconnect: _nobody,
                Exception: _failure,
            },
            lifespan=self._lifespan,
        )

    def limit(self, prompt: int, asked: int | None) -> int:
        """Returns the most tokens that the answer to a prompt of so many tokens may have.

        Raises:
            RequestError: the prompt or what is asked for is too long.
        """
        if prompt > self.max_prompt:
            raise RequestError(
                f"the prompt has {prompt} tokens, more than the {self.max_prompt} that are allowed here.",
                code="context_length_exceeded",
            )
        if asked is not None and asked > self.max_tokens:
            raise RequestError(f"max_tokens={asked} is more than the {self.max_tokens} allowed here.", "max_tokens")
        room = self.engine.context - prompt
        if asked is not None and asked > room:
            raise RequestError(
                f"the prompt ({prompt} tokens) and max_tokens ({asked}) exceed the context of {self.engine.context} "
                "tokens; shorten one of them.", "max_tokens", code="context_length_exceeded",
            )  # fmt: skip
        return min(room, self.max_tokens) if asked is None else asked

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.thread.start()
        try:
            yield
        finally:
            await run_in_threadpool(self.thread.stop)

    # -------------------------------------------------------------------------------------------------- the routes

    async def _health(self, request: HTTPRequest) -> Response:
        running, waiting = self.engine.load
        return JSONResponse({"status": "ok", "running": running, "waiting": waiting})

    async def _models(self, request: HTTPRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _model(self, request: HTTPRequest) -> Response:
        if request.path_params["name"] != self.name:
            raise RequestError(f"there is no such model here, only '{self.name}'.", status=404, code="model_not_found")
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "tpa-train",
                "max_model_len": self.engine.context}  # fmt: skip

    async def _completions(self, request: HTTPRequest) -> Response:
        return await self._answer(request, "completion")

    async def _chat(self, request: HTTPRequest) -> Response:
        return await self._answer(request, "chat")

    async def _answer(self, request: HTTPRequest, kind: str) -> Response:
        call = read_call(await self._body(request), kind, self.name)
        self._check_load(max(1, len(call.prompts)))
        prompts = await run_in_threadpool(self._encode, call)  # long texts take a while
        self._check_load(len(prompts))
        answers = Answers(self, call, prompts)
        if call.stream:
            return EventStream(answers, call)
        try:
            return await self._whole(request, answers, call)
        finally:
            answers.close()

    async def _whole(self, request: HTTPRequest, answers: Answers, call: Call) -> Response:
        """Waits for the answers, or for the client to go away."""

        async def collect() -> None:
            async for _ in answers.updates():
                pass

        async def leave() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        finished, left = asyncio.ensure_future(collect()), asyncio.ensure_future(leave())
        try:
            await asyncio.wait({finished, left}, return_when=asyncio.FIRST_COMPLETED)
            if not finished.done():
                return Response(status_code=499)  # to nobody
            finished.result()
        finally:
            finished.cancel()
            left.cancel()
        done = answers.requests
        return JSONResponse(answer(call, [r.text for r in done], [r.finish_reason for r in done], answers.usage()))

    def _encode(self, call: Call) -> list[list[int]]:
        tokenizer = self.engine.model.tokenizer
        if call.kind == "completion":
            return [tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in call.prompts]
        try:
            text = self.template.prompt(call.messages)
        except UserError as error:
            raise RequestError(str(error), "messages") from error
        return [self.template.with_bos(tokenizer.encode_rendered([text])[0])]

    def _check_load(self, count: int) -> None:
        """Raises RequestError where ``count`` more prompts are too many."""
        allowed = self.engine.max_batch + self.max_waiting
        if count > allowed:
            raise RequestError(f"{count} prompts are more than this server takes at once ({allowed}).", "prompt")
        if self.active + count > allowed:
            raise RequestError("the server is busy; try again later.", status=429, code="rate_limit_exceeded")

    async def _body(self, request: HTTPRequest) -> Any:
        most, content = BYTES_PER_TOKEN * self.engine.context + (1 << 16), bytearray()
        async for part in request.stream():
            content += part
            if len(content) > most:
                raise RequestError(f"the request has more than {most:,} bytes, too many for the context.", status=413)
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the body is not valid JSON ({error}).") from error


async def _refusal(request: HTTPRequest, error: Exception) -> Response:
    headers = {"Retry-After": "1"} if error.status == 429 else None
    return JSONResponse(error.body(), error.status, headers)


async def _http_error(request: HTTPRequest, error: Exception) -> Response:
    detail = f"{request.method} {request.url.path}: {str(error.detail).lower()}."
    return JSONResponse(RequestError(detail, status=error.status_code).body(), error.status_code)


async def _nobody(request: HTTPRequest, error: Exception) -> Response:
    return Response(status_code=499)


async def _failure(request: HTTPRequest, error: Exception) -> Response:
    return JSONResponse(RequestError("the server failed; its log says more.", status=500).body(), 500)
