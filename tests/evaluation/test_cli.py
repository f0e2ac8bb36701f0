"""key=value parsing, its errors and help, and what scripts do with errors."""

import re
from dataclasses import dataclass, field

import pytest

from tpa_train.cli import parse, run_main
from tpa_train.errors import UserError


@dataclass
class Data:
    path: list[str] = field(default_factory=list, metadata={"help": "texts."})
    join: bool = True
    size: int | None = None


@dataclass
class Schema:
    model: str = field(metadata={"help": "exported folder."})
    prompt: str | None = None
    context: int = field(default=128, metadata={"help": "tokens of a row."})
    rate: float = 1e-3
    mode: str = field(default="fast", metadata={"choices": ("fast", "exact")})
    data: Data = field(default_factory=Data)


def _parse(*argv):
    return parse(Schema, argv, "python scripts/x.py", "Does x.")


@pytest.mark.parametrize(
    "text", ["a=b=c", "x, y: [1]", "${oc.env:HOME}", "'q\"", "", "null ", "1e3", "???", "a\nb", "{}"]
)
def test_texts_survive_verbatim(text):
    assert _parse("model=m", f"prompt={text}").prompt == text
    assert _parse(f"model={text}").model == text
    assert _parse("model=m", f"data.path={text}", "data.path=b").data.path == [text, "b"]


def test_types_and_defaults():
    args = _parse("model=m", "rate=1e-4", "data.join=false", "data.size=3", "--context=5")
    assert (args.rate, args.data.join, args.data.size, args.context) == (1e-4, False, 3, 5)
    assert _parse("model=m").data == Data() and _parse("model=m").prompt is None
    assert _parse("model=m", "prompt=x", "prompt=null", "data.size=null").prompt is None
    assert _parse("model=m", "rate=2").rate == 2.0


@pytest.mark.parametrize(
    "argv,message",
    [
        (["modell=x"], "unknown option 'modell'; did you mean 'model'?"),
        (["model=m", "path=x"], "did you mean 'data.path'?"),
        (["model=m", "data.joine=true"], "did you mean 'data.join'?"),
        (["hello"], "'hello' is not of the form key=value"),
        (["--model", "x"], "'--model' has no value; write model=VALUE."),
        ([], "model= is missing (exported folder.); see python scripts/x.py --help."),
        (["model=m", "context=many"], "context=many: expected a whole number."),
        (["model=m", "context=1.5"], "expected a whole number"),
        (["model=m", "context=null"], "expected a whole number"),
        (["model=m", "context=true"], "expected a whole number"),
        (["model=m", "context=${rate}"], "expected a whole number"),
        (["model=m", "context=[1"], "expected a whole number"),
        (["model=m", "rate=fast"], "expected a number"),
        (["model=m", "data.join=ture"], "expected true or false; did you mean 'true'?"),
        (["model=m", "data=3"], "unknown option 'data'"),
        (["model=m", "mode=exat"], "mode=exat is not a choice; did you mean 'exact'?"),
    ],
)
def test_mistakes_are_explained(argv, message):
    with pytest.raises(UserError, match=re.escape(message)):
        _parse(*argv)


@pytest.mark.parametrize("flag", ["--help", "-h", "help"])
def test_help(flag, capsys):
    with pytest.raises(SystemExit) as stop:
        _parse("nonsense", flag)
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for part in ("usage: python scripts/x.py model=…", "Does x.", "exported folder. (text; required)", "fast | exact",
                 "data.path", "default 128", "default true", "default null"):  # fmt: skip
        assert part in text


def _raise(error):
    raise error


@pytest.mark.parametrize(
    "main,status,said",
    [
        (lambda: None, 0, ""),
        (lambda: 3, 3, ""),
        (lambda: _raise(UserError("no\nsuch file")), 2, "error: no such file\n"),
        (lambda: _raise(KeyboardInterrupt()), 130, "interrupted\n"),
    ],
)
def test_run_main(main, status, said, capsys):
    with pytest.raises(SystemExit) as stop:
        run_main(main)
    assert stop.value.code == status and capsys.readouterr().err == said


def test_bugs_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run_main(lambda: 1 / 0)
