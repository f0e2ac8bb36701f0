"""The native model behind lm-evaluation-harness' interface, so that any of its tasks runs on teacher and student.

https://github.com/EleutherAI/lm-evaluation-harness, ``lm_eval.api.model.LM``; the package is the extra ``eval``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from tpa_train.errors import UserError
from tpa_train.evaluation.multiple_choice import scores_and_greedy
from tpa_train.tpa.generation import engine_for

MAX_TOKENS = 256  # of a generated answer, where a task names no limit


class HarnessMethods:
    """The three requests of ``lm_eval.api.model.LM``, answered by a dense or converted ``model`` with a tokenizer.

    Every text begins with ``<bos>``. Requests have their arguments in ``args``.
    """

    def __init__(self, model: Any, progress: bool = True) -> None:
        super().__init__()
        self.model, self.progress = model, progress

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Returns log p(continuation | context) in nats of each (context, continuation), and if it is greedy."""
        return list(zip(*self._scores([self._pair(*request.args) for request in requests]), strict=True))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Returns log p of each whole (text,); beyond the context, window by window without overlap."""
        windows = [self._windows(self.model.tokenizer.encode(request.args[0])) for request in requests]
        scores = iter(self._scores([window for text in windows for window in text])[0])
        return [sum(next(scores) for _ in text) for text in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns the continuation of each (context, options), cut before the first of ``options["until"]``.

        Options: until, max_gen_toks, do_sample, temperature, top_p, top_k. Prompts lose their first tokens where the
        context is too short.
        """
        return [
            self._continue(*request.args)
            for request in tqdm(requests, desc="generating", disable=not self.progress, leave=False)
        ]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], int]:
        """Returns the tokens of both as one text, and where the continuation's begin."""
        spaces = len(context) - len(context.rstrip())
        if spaces:  # a token of the continuation begins with its space
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        tokenizer = self.model.tokenizer
        # As the harness' own models do: the border is where the context's tokens end.
        tokens = tokenizer.encode(context + continuation)
        return tokens, min(len(tokenizer.encode(context)), len(tokens) - 1)

    def _windows(self, tokens: list[int]) -> list[tuple[list[int], int]]:
        step = self.model.config.max_context - 1
        return [([tokens[0], *tokens[i : i + step]], 1) for i in range(1, len(tokens), step)]

    def _scores(self, encoded: list[tuple[list[int], int]]) -> tuple[list[float], list[bool]]:
        training = self.model.training
        self.model.eval()
        try:
            with tqdm(total=len(encoded), desc="scoring", disable=not self.progress, leave=False) as bar:
                return scores_and_greedy(self.model, encoded, bar=bar)
        finally:
            self.model.train(training)

    def _continue(self, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        limit = int(options.get("max_gen_toks") or MAX_TOKENS)
        sampled = options.get("do_sample", float(options.get("temperature") or 0) > 0)
        tokenizer, room = self.model.tokenizer, self.model.config.max_context - limit
        if room < 2:
            raise UserError(f"max_gen_toks={limit} leaves no room for a prompt in a context of {room + limit} tokens.")
        prompt = tokenizer.encode(context)
        if len(prompt) > room:
            prompt = [prompt[0], *prompt[len(prompt) - room + 1 :]]
        engine = engine_for(self.model, [prompt], limit)
        request = engine.submit(
            prompt, limit, temperature=float(options.get("temperature") or 1.0) if sampled else 0.0,
            top_k=options.get("top_k"), top_p=options.get("top_p"), stop=[stop for stop in until if stop],
        )  # fmt: skip
        engine.run()
        return request.text


def harness_model(model: Any, progress: bool = True) -> Any:
    """Returns ``model`` as an ``lm_eval.api.model.LM``, to give to ``lm_eval.simple_evaluate(model=...)``.

    Raises:
        UserError: lm_eval is not installed, or the model has no tokenizer.
    """
    if model.tokenizer is None:
        raise UserError("this model has no tokenizer; put tokenizer.model beside its weights.")
    return type("NativeModel", (HarnessMethods, load_harness().api.model.LM), {})(model, progress)


def run_tasks(model: Any, tasks: Sequence[str], limit: int | None = None, progress: bool = True) -> dict[str, dict]:
    """Returns the harness' numbers by task and metric.

    Args:
        model: dense or converted.
        tasks: names that lm_eval knows; their data come from where the harness has them.
        limit: use only the first so many documents of each task.
        progress: show progress bars.

    Raises:
        UserError: lm_eval is not installed or knows no such task.
    """
    harness = load_harness()
    try:
        found = harness.simple_evaluate(model=harness_model(model, progress), tasks=list(tasks), limit=limit)
    except (KeyError, ValueError) as error:
        raise UserError(f"suite.tasks={','.join(tasks)}: lm_eval refused ({error}).") from error
    return {
        task: {key: value for key, value in metrics.items() if isinstance(value, float)}
        for task, metrics in found["results"].items()
    }


def load_harness() -> Any:
    """Returns the module ``lm_eval``.

    Raises:
        UserError: it is not installed.
    """
    try:
        import lm_eval
        import lm_eval.api.model
    except ImportError as error:
        raise UserError("this needs lm-evaluation-harness: pip install -e '.[eval]'.") from error
    return lm_eval
