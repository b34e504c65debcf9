"""Templates of today's models: the text is the template's own, and what is learned of it is a golden file."""

import json

import datasets
import pytest
from talks import CALL, TALK, TEMPLATES, TOOLS, load_template
from tokenizer_kinds import CHAT, make_tokenizer

from doralib.data.prepare import IGNORED, BadRow
from doralib.data.prompts import render_row
from doralib.data.rows import RawRows
from doralib.data.tokenize import find_samples, tokenize_rows
from doralib.recipe import DataSettings

EXPECTED = json.loads((TEMPLATES / "expected.json").read_text(encoding="utf-8"))
FAMILIES = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
THOUGHT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>\nfirst\n</think>\n\na"}]
THOUGHT += [{"role": "user", "content": "q2"}, {"role": "assistant", "content": "<think>\nsecond\n</think>\n\na2"}]
REASON = [{"role": "user", "content": "q"}, {"role": "assistant", "reasoning_content": "first", "content": "a"}]
REASON += [{"role": "user", "content": "q2"}, {"role": "assistant", "reasoning_content": "second", "content": "a2"}]
ROWS = {
    "chat": {"messages": TALK},
    "system": {"messages": [{"role": "system", "content": "be kind"}, *TALK]},
    "think": {"messages": THOUGHT},
    "reason": {"messages": REASON},
    "tools": {
        "messages": [
            {"role": "user", "content": "weather?"},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", **CALL}]},
            {"role": "tool", "tool_call_id": "c1", "content": "sun"},
            {"role": "assistant", "content": "It shines."},
        ],
        "tools": TOOLS,
    },
    "begins": {"messages": TALK[1:]},
    "weight": {"messages": [TALK[0], {**TALK[1], "weight": 0}, *TALK[2:]]},
}


def settings(**changes):
    return DataSettings(train="t", **{"style": "chat", **changes})


def learned(row, tokenizer, **changes):
    made = render_row(row, settings(**changes), tokenizer)
    return [made.text[start:end] for start, end in made.learned]


def as_given_to_a_server(row):
    """The messages as servers hand them to a template: arguments are objects, and weights are not there."""
    for message in row["messages"]:
        plain = {key: value for key, value in message.items() if key != "weight"}
        if "tool_calls" in plain:
            function = {**CALL["function"], "arguments": json.loads(CALL["function"]["arguments"])}
            plain["tool_calls"] = [{"id": "c1", "type": "function", "function": function}]
        yield plain


@pytest.mark.parametrize("case", ROWS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_learned(family, case):
    tokenizer, row, expected = load_template(family), ROWS[case], EXPECTED[family][case]
    if "refused" in expected:
        with pytest.raises(BadRow) as caught:
            render_row(row, settings(), tokenizer)
        assert str(caught.value) == expected["refused"]
        return
    made = render_row(row, settings(), tokenizer)
    messages = list(as_given_to_a_server(row))
    whole = tokenizer.apply_chat_template(messages, tools=row.get("tools"), tokenize=False)
    assert made.text == whole
    assert [made.text[start:end] for start, end in made.learned] == expected["learned"]
    assert list(made.notes) == expected.get("notes", [])
    # the answer begins where the prompt in use ends, if the whole text begins with that prompt
    start = made.learned[-1][0]
    prompt = tokenizer.apply_chat_template(
        messages[:-1], tools=row.get("tools"), tokenize=False, add_generation_prompt=True
    )
    if made.text.startswith(prompt):
        assert made.text[:start] == prompt


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_and_labels_of_every_template(family):
    tokenizer = load_template(family)
    rows = datasets.Dataset.from_list([ROWS[case] for case in ("chat", "system", "think")])
    made = tokenize_rows(rows, range(1, 4), settings(), tokenizer)
    for row, case in zip(made.rows, ("chat", "system", "think"), strict=True):
        text = tokenizer.apply_chat_template(ROWS[case]["messages"], tokenize=False)
        assert row["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert row["input_ids"] == tokenizer.apply_chat_template(ROWS[case]["messages"], return_dict=False)
        words = tokenizer.decode([label for label in row["labels"] if label != IGNORED])
        assert words == "".join(EXPECTED[family][case]["learned"])


def test_every_family_has_its_golden_answers():
    assert set(EXPECTED) == set(FAMILIES)
    assert all(set(EXPECTED[family]) == set(ROWS) for family in FAMILIES)


def test_all_but_a_silent_turn_is_learned():
    tokenizer = load_template("smollm2")
    made = render_row(ROWS["weight"], settings(loss_on="all"), tokenizer)
    assert [made.text[start:end] for start, end in made.learned] == [
        made.text[: made.text.index("hello<|im_end|>")],
        made.text[made.text.index("<|im_start|>user\nhello") :],
    ]
    whole = render_row(ROWS["chat"], settings(loss_on="all"), tokenizer)
    assert whole.learned == ((0, len(whole.text)),)


MARKED = (
    "{% if m.role == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}"
)
MARKING = CHAT.replace("{{ m['content'] }}<|im_end|>", MARKED)


def test_a_template_that_marks_its_answers_is_followed():
    tokenizer = make_tokenizer("byte level", MARKING)
    assert learned(ROWS["chat"], tokenizer) == ["hello<|im_end|>", "hi<|im_end|>"]
    assert learned(ROWS["weight"], tokenizer) == ["hi<|im_end|>"]
    # what transformers itself makes of the marks
    coded = tokenizer.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    made = tokenize_rows(datasets.Dataset.from_list([ROWS["chat"]]), [1], settings(), tokenizer)
    assert [label != IGNORED for label in made.rows[0]["labels"]] == [bool(one) for one in coded["assistant_masks"]]


def test_what_the_generation_prompt_has_written_is_not_learned():
    # the prompt in use opens the thoughts, and the text closes them at once
    source = CHAT.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    closed = "{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m['content'] }}"
    source = source.replace("{{ m['content'] }}", closed)
    assert learned(ROWS["chat"], make_tokenizer("byte level", source, extra=["<think>", "</think>"])) == [
        "</think>hello<|im_end|>\n",
        "</think>hi<|im_end|>\n",
    ]


def test_a_template_without_an_end_inside_learns_the_words():
    # the end stands behind the last turn only, and differs from what begins the next in its second character
    source = (
        "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}{% else %}<|said|>{{ m.content }}"
        "{% if loop.last %}<|im_end|>{% endif %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|said|>{% endif %}"
    )
    assert learned(ROWS["chat"], make_tokenizer("byte level", source)) == ["hello", "hi<|im_end|>"]
    assert learned(ROWS["chat"], make_tokenizer("byte level", source, extra=["<|said|>"])) == ["hello", "hi<|im_end|>"]


def test_arguments_take_the_form_that_the_template_can_print():
    row = ROWS["tools"]
    head = "{% for m in messages %}{{ m.role }}:{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    head += "{{ c.function.name }}("
    tail = "){% endfor %};{% endfor %}"
    as_text, as_object = (
        make_tokenizer("byte level", head + one + tail)
        for one in ("{{ c.function.arguments }}", "{{ c.function.arguments['city'] }}")
    )
    assert 'assistant:get({"city": "Rome"});' in render_row(row, settings(), as_text).text
    assert "assistant:get(Rome);" in render_row(row, settings(), as_object).text
    joined = make_tokenizer("byte level", head + "{{ 'json ' + c.function.arguments }}" + tail)
    assert 'get(json {"city": "Rome"});' in render_row(row, settings(), joined).text


def test_a_template_that_takes_parts_only():
    source = CHAT.replace("{{ m['content'] }}", "{% for p in m['content'] %}{{ p.text }}{% endfor %}")
    made = render_row(ROWS["chat"], settings(), make_tokenizer("byte level", source))
    assert made.text == render_row(ROWS["chat"], settings(), make_tokenizer("byte level")).text
    assert [made.text[start:end] for start, end in made.learned] == ["hello<|im_end|>\n", "hi<|im_end|>\n"]


def test_what_a_template_leaves_out_is_counted():
    source = "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }} {% endif %}{% endfor %}"
    tokenizer = make_tokenizer("byte level", source)
    rows = datasets.Dataset.from_list([{**ROWS["system"], "tools": json.dumps(TOOLS)}, {**ROWS["chat"], "tools": ""}])
    made = tokenize_rows(rows, [1, 2], settings(), tokenizer)
    told = "\n".join(made.report.lines())
    assert "of 2 rows: 1 with tools that the chat template has no place for" in told
    assert "1 with messages that the chat template leaves out or rewrites" in told
    assert made.report.kept == 2


def test_samples_end_where_the_answer_begins():
    tokenizer = load_template("qwen3")
    (sample,) = find_samples(RawRows(datasets.Dataset.from_list([ROWS["think"]]), None, (1,)), settings(), tokenizer, 5)
    assert sample.prompt.endswith("<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n")
    assert sample.expected == "<think>\nsecond\n</think>\n\na2<|im_end|>\n"


def test_an_answer_that_looks_like_the_template():
    talk = [
        {"role": "user", "content": "write <|im_start|>assistant\nhello<|im_end|>"},
        {"role": "assistant", "content": "<|im_start|>assistant\nhello"},
        {"role": "user", "content": "<think>hello</think>"},
        {"role": "assistant", "content": "hello"},
    ]
    for family in ("qwen3", "smollm2"):
        first, last = learned({"messages": talk}, load_template(family))
        assert first == "<|im_start|>assistant\nhello<|im_end|>\n"
        assert last.endswith("hello<|im_end|>\n")
