"""Chat templates: parity with transformers on Gemma 3's published template, masks, and text that must stay text."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpa_train.errors import UserError
from tpa_train.gemma3.chat import ChatTemplate
from tpa_train.gemma3.tokenizer import Tokenizer, sentencepiece_model, without_marks

sys.path.append(str(Path(__file__).parents[1] / "checkpoints"))
from small_models import SPECIAL_IDS, vocabulary  # noqa: E402

transformers = pytest.importorskip("transformers")

# As published with google/gemma-3-*-it.
GEMMA3 = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '

' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '

' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '
' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>
' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model
'}}
{%- endif -%}
"""
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% generation %}{{ m['content'] }}"
    "{% endgeneration %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def tokenizer(template=None):
    return Tokenizer.from_model_proto(sentencepiece_model(*vocabulary(), SPECIAL_IDS), template)


BUILTIN, PUBLISHED = ChatTemplate(tokenizer()), ChatTemplate(tokenizer(GEMMA3))


@pytest.fixture(scope="module")
def reference():
    """transformers' apply_chat_template with the published text."""
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import BPE

    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Backend(BPE()), bos_token="<bos>")
    return lambda messages, prompt=False: tokenizer.apply_chat_template(
        messages, chat_template=GEMMA3, tokenize=False, add_generation_prompt=prompt
    )


names = st.sampled_from(
    ["<end_of_turn>", "<start_of_turn>model\n", "<bos>", "<eos>", "<pad>", "<unused7>", "<", ">", "\n", "\n\n", " "]
)
content = st.lists(names | st.text(max_size=5), max_size=5).map("".join)
spoken = content.filter(str.strip)


@st.composite
def conversations(draw):
    messages = [{"role": "system", "content": draw(content)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [{"role": "user", "content": draw(content)}, {"role": "assistant", "content": draw(spoken)}]
    return messages[:-1] if draw(st.booleans()) else messages


@settings(deadline=None)
@given(messages=conversations())
def test_text_equals_transformers_and_both_ways_agree(reference, messages):
    for template in (BUILTIN, PUBLISHED):
        assert template.render(messages).text == reference(messages)
        assert without_marks(template.prompt(messages)) == reference(messages, prompt=True)
    assert "".join(s.text for s in BUILTIN.render(messages)) == "".join(s.text for s in PUBLISHED.render(messages))
    assert BUILTIN.encode([BUILTIN.render(messages)]) == PUBLISHED.encode([PUBLISHED.render(messages)])


@settings(deadline=None)
@given(messages=conversations())
def test_the_mask_is_the_models_turns_token_by_token(messages):
    tokens = BUILTIN.tokenizer
    ids, mask = BUILTIN.encode([BUILTIN.render(messages)])[0]
    start, end = tokens.piece_id("<start_of_turn>"), tokens.end_of_turn_id
    expected, at = [False] * len(ids), 0
    while at < len(ids):
        if ids[at] != start:
            at += 1
            continue
        role = ""
        while not tokens.piece_text(ids[at + 1]).startswith("\n"):
            at += 1
            role += tokens.piece_text(ids[at])
        first, last = at + 2, ids.index(end, at)
        assert role in ("user", "model")
        expected[first : last + 1] = [role == "model"] * (last + 1 - first)
        at = last
    assert mask == expected
    turns = [m["content"] for m in messages if m["role"] != "system"]
    assert (ids.count(tokens.bos_id), ids.count(start), ids.count(end)) == (1, len(turns), len(turns))
    assert ids[0] == tokens.bos_id and tokens.eos_id not in ids and tokens.pad_id not in ids
    # What was masked in is what the assistant said, word for word.
    said = "".join(m["content"].strip() for m in messages if m["role"] == "assistant")
    assert tokens.decode(i for i, counted in zip(ids, mask, strict=True) if counted) == said.replace("▁", " ")


def test_splitting_at_turns_changes_no_token():
    messages = [{"role": "user", "content": "hello  world"}, {"role": "assistant", "content": "the\n\nworld"}]
    rendered = BUILTIN.render(messages)
    assert [s.by_model for s in rendered] == [False, True, False]
    assert rendered[1].text == "the\n\nworld<end_of_turn>" and rendered[2].text == "\n"
    ids, _ = BUILTIN.encode([rendered])[0]
    assert ids == BUILTIN.tokenizer.encode(rendered.text, bos=False)  # nothing to escape: the ordinary ids


def test_names_of_control_pieces_are_spelled_out():
    tokens = tokenizer()
    (ids,) = tokens.encode_rendered([f"<bos>{tokens.literal('a<eos><end_of_turn>')}<end_of_turn>"])
    assert ids.count(1) == 0 and ids[0] == 2 and ids.count(tokens.end_of_turn_id) == 1
    assert tokens.decode(ids) == "a<eos><end_of_turn>"
    assert tokens.decode(tokens.encode_rendered([tokens.literal("\udc00<b\ud800os>")])[0]) == "\ufffd<b\ufffdos>"


def test_a_prompt_is_one_users_turn():
    tokens = BUILTIN.tokenizer
    expected = tokens.encode("<bos><start_of_turn>user\nhello<end_of_turn>\n<start_of_turn>model\n", bos=False)
    assert BUILTIN.encode_prompt(" hello ") == PUBLISHED.encode_prompt(" hello ") == expected


def test_other_templates():
    template = ChatTemplate(tokenizer(CHATML))
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world "}]
    rendered = template.render([*messages, *messages])
    assert [s.text for s in rendered if s.by_model] == ["world <|im_end|>"] * 2
    ids, mask = template.encode([rendered])[0]
    assert ids[0] == 2 and mask[0] is False  # a template without BOS gets one
    backwards = ChatTemplate(tokenizer("{% for m in messages | reverse %}{{ m['content'] }}{% endfor %}"))
    with pytest.raises(UserError, match="does not render one turn after the other.*data.train_on=all"):
        backwards.render(messages)


USER, MODEL = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize("template", [BUILTIN, PUBLISHED])
@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([USER, USER, MODEL], "onversation roles must alternate user/assistant"),
        ([MODEL, USER], "onversation roles must alternate"),
        ([USER, MODEL | {"content": " \n"}], "message 2, a turn of the assistant, is empty"),
        ([USER, MODEL, {"role": "system", "content": "c"}], "message 3 is a system prompt"),
        ([MODEL], "no turn of a user"),
        ([], "no turn of a user"),
    ],
)
def test_bad_conversations_are_refused(template, messages, message):
    with pytest.raises(UserError, match=message):
        template.render(messages)
    with pytest.raises(UserError, match=message):
        template.prompt(messages)


def test_bad_templates_are_refused():
    for source, message in (
        ("{% if %}", "not valid Jinja"),
        ("{{ messages[0].content.nothing() }}", "refuses the conversation"),
        ("{{ 1 / 0 }}", "fails .ZeroDivisionError"),
        ("{{ ''.__class__.__mro__ }}", "refuses the conversation.*unsafe"),
        ("{{ messages.append(1) }}", "refuses the conversation.*unsafe|not safely"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            ChatTemplate(tokenizer(source)).render([USER, MODEL])
        assert "\n" not in str(caught.value)
