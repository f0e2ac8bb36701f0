"""The harness' three requests by the definition; and its classes, where a stand-in takes lm_eval's place."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from evaluation_models import dense_model, tpa_model

from tpa_train.errors import UserError
from tpa_train.evaluation.harness import HarnessMethods, harness_model, run_tasks
from tpa_train.tpa.generation import generate


def request(*args):
    return types.SimpleNamespace(args=args)


@pytest.fixture(scope="module", params=["dense", "converted"])
def model(request):
    dense = dense_model()
    return dense if request.param == "dense" else tpa_model(dense, bits=4)


def log_probabilities(model, tokens):
    with torch.no_grad():
        log = model(torch.tensor([tokens])).double().log_softmax(-1)[0]
    return log, [log[i - 1, tokens[i]].item() for i in range(1, len(tokens))]


def test_loglikelihood_by_the_definition(model):
    pairs = [("The sky is", " blue"), ("The sky is ", "a deep kind of green"), ("", "Words.")]
    found = HarnessMethods(model, progress=False).loglikelihood([request(*pair) for pair in pairs])
    for (context, continuation), (score, greedy) in zip(pairs, found, strict=True):
        tokens = model.tokenizer.encode(context + continuation)
        log, each = log_probabilities(model, tokens)
        count = len(tokens) - len(model.tokenizer.encode(context.rstrip()))
        assert score == pytest.approx(sum(each[-count:]), abs=1e-3) and greedy is False


def test_the_greedy_continuation_is_known_as_such(model):
    context = "The sky is"
    tokens = model.tokenizer.encode(context)
    best = int(log_probabilities(model, tokens)[0][-1].argmax())
    methods = HarnessMethods(model, progress=False)
    methods._pair = lambda *_: ([*tokens, best], len(tokens))
    assert methods.loglikelihood([request(context, "?")])[0][1] is True


def test_rolling_scores_every_token_once(model):
    text = "These are words. " * 40  # 680 bytes, the context is 512
    (found,) = HarnessMethods(model, progress=False).loglikelihood_rolling([request(text)])
    tokens = model.tokenizer.encode(text)
    first = log_probabilities(model, tokens[:512])[1]
    rest = log_probabilities(model, [tokens[0], *tokens[512:]])[1]
    assert found == pytest.approx(sum(first) + sum(rest), abs=1e-2)


def test_generation_ends_where_it_is_told(model):
    whole = generate(model, "The sky is", max_tokens=30)[0]
    methods = HarnessMethods(model, progress=False)
    assert methods.generate_until([request("The sky is", {"max_gen_toks": 30})]) == [whole]
    stop = whole[4:6]
    cut = methods.generate_until([request("The sky is", {"max_gen_toks": 30, "until": [stop, "never written"]})])[0]
    assert cut == whole[: whole.find(stop)]
    assert len(methods.generate_until([request("x" * 2000, {"max_gen_toks": 3})])) == 1
    with pytest.raises(UserError, match="max_gen_toks=600 leaves no room"):
        methods.generate_until([request("x", {"max_gen_toks": 600})])


def test_the_harness_gets_its_own_class(model, monkeypatch):
    class LM:
        def __init__(self):
            self.made = True

    def simple_evaluate(model, tasks, limit):
        assert isinstance(model, LM) and model.made and limit == 2
        if tasks != ["arc"]:
            raise KeyError(tasks[0])
        score, _ = model.loglikelihood([request("The sky is", " blue")])[0]
        return {"results": {"arc": {"acc,none": score, "alias": "arc"}}}

    lm_eval, api, module = (types.ModuleType(name) for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model"))
    lm_eval.api, api.model, module.LM, lm_eval.simple_evaluate = api, module, LM, simple_evaluate
    for found in (lm_eval, api, module):
        monkeypatch.setitem(sys.modules, found.__name__, found)
    result = run_tasks(model, ["arc"], limit=2, progress=False)
    assert list(result["arc"]) == ["acc,none"] and result["arc"]["acc,none"] < 0
    with pytest.raises(UserError, match="suite.tasks=arcc: lm_eval refused"):
        run_tasks(model, ["arcc"], limit=2, progress=False)


def test_what_is_missing_is_named(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[eval\]'"):
        harness_model(model)
