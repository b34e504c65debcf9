"""Conversations by their form: what each becomes, and what is refused with its reason."""

import json

import datasets
import pytest
from talks import CALL, TALK, TOOLS, load_template
from tokenizer_kinds import make_tokenizer

from doralib.data.columns import check_columns
from doralib.data.conversations import read_conversation
from doralib.data.detect import describe_style, find_style, look_at
from doralib.data.prepare import IGNORED, BadRow
from doralib.data.prompts import render_row
from doralib.data.rows import read_dataset
from doralib.data.tokenize import tokenize_rows
from doralib.errors import UsageError
from doralib.recipe import DataSettings

ASKED, ANSWERED = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def settings(**changes):
    return DataSettings(train="t", **{"style": "chat", **changes})


def read(row, **options):
    return read_conversation(row, "messages", **options)


def said(row):
    return [(message["role"], message["content"]) for message in read(row).messages]


SHAREGPT = [
    {"from": "system", "value": "be kind"},
    {"from": "human", "value": "weather?"},
    {"from": "function_call", "value": '{"name": "get", "arguments": {"city": "Rome"}}'},
    {"from": "observation", "value": "sun"},
    {"from": "gpt", "value": "It shines."},
]
FUNCTION = {"name": "get", "arguments": {"city": "Rome"}}
SAME = [("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [ASKED, ANSWERED]}, SAME),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, SAME),
        ({"conversations": [{"role": "USER", "content": "q"}, {"role": "Assistant", "content": "a"}]}, SAME),
        ({"messages": json.dumps([ASKED, ANSWERED])}, SAME),
        ({"conversations": json.dumps([{"from": "human", "value": "q"}, {"from": "model", "value": "a"}])}, SAME),
        ({"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}}, SAME),
        ({"messages": [{**ASKED, "content": [{"type": "text", "text": "q"}]}, ANSWERED]}, SAME),
        (
            {
                "messages": [
                    {**ASKED, "content": ["q"]},
                    {**ANSWERED, "content": [{"type": "output_text", "text": "a"}]},
                ]
            },
            SAME,
        ),
        ({"messages": [{**ASKED, "content": [{"type": "text", "text": "q", "image": None}]}, ANSWERED]}, SAME),
        ({"prompt": [ASKED], "completion": [ANSWERED]}, SAME),
        ({"prompt": "q", "completion": "a"}, SAME),
        ({"prompt": json.dumps([ASKED]), "completion": json.dumps([ANSWERED])}, SAME),
        ({"instruction": "q", "input": "", "output": "a"}, SAME),
        ({"instruction": "do", "input": "this", "output": "a"}, [("user", "do\nthis"), ("assistant", "a")]),
        (
            {"instruction": "q2", "output": "a2", "history": [["q", "a"]], "system": "be kind"},
            [("system", "be kind"), *SAME, ("user", "q2"), ("assistant", "a2")],
        ),
        ({"messages": [ASKED, ANSWERED], "system": "be kind"}, [("system", "be kind"), *SAME]),
        ({"messages": [ASKED, ANSWERED], "system": None}, SAME),
        ({"messages": [ANSWERED, ASKED]}, [("assistant", "a"), ("user", "q")]),
        ({"messages": [ASKED, ANSWERED, {"role": "tool", "content": {"t": 1}}]}, [*SAME, ("tool", '{"t": 1}')]),
    ],
)
def test_forms_of_a_conversation(row, expected):
    assert said(row) == expected


def test_sharegpt_with_functions_is_what_openai_writes():
    talk = read({"conversations": SHAREGPT, "tools": json.dumps([TOOLS[0]["function"]])})
    openai = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": FUNCTION}]},
        {"role": "tool", "content": "sun"},
        {"role": "assistant", "content": "It shines."},
    ]
    assert talk.messages == openai
    assert talk.tools == TOOLS
    assert talk.learned == [False, False, True, False, True]
    again = read({"messages": openai, "tools": TOOLS})
    assert (again.messages, again.tools, again.learned) == (talk.messages, talk.tools, talk.learned)


@pytest.mark.parametrize(
    "call",
    [
        {"role": "assistant", "content": None, "tool_calls": [{"id": "x", **CALL}]},
        {"role": "assistant", "tool_calls": [{"id": "x", "function": FUNCTION}]},
        {"role": "assistant", "content": None, "tool_calls": json.dumps([{"id": "x", **CALL}])},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "x", "name": "get", "input": {"city": "Rome"}}]},
    ],
)
def test_tool_calls_by_their_form(call):
    (made,) = read({"messages": [ASKED, call]}).messages[1:]
    assert made["tool_calls"] == [{"id": "x", "type": "function", "function": FUNCTION}]
    assert made["content"] is None


def test_old_functions_and_anthropic_results():
    talk = read(
        {
            "messages": [
                ASKED,
                {
                    "role": "assistant",
                    "content": None,
                    "function_call": {"name": "get", "arguments": '{"city": "Rome"}'},
                },
                {"role": "function", "name": "get", "content": "sun"},
                ANSWERED,
            ],
            "functions": [TOOLS[0]["function"]],
        }
    )
    assert talk.messages[1]["tool_calls"] == [{"type": "function", "function": FUNCTION}]
    assert talk.messages[2] == {"role": "tool", "content": "sun", "name": "get"}
    assert talk.tools == TOOLS
    result = {"type": "tool_result", "tool_use_id": "x", "content": [{"type": "text", "text": "sun"}]}
    talk = read(
        {"messages": [ASKED, {"role": "user", "content": [result, {"type": "text", "text": "and?"}]}, ANSWERED]}
    )
    assert talk.messages[1:3] == [
        {"role": "tool", "content": "sun", "tool_call_id": "x"},
        {"role": "user", "content": "and?"},
    ]


def test_thoughts_in_parts_reach_the_template():
    parts = [{"type": "reasoning", "value": "hm"}, {"type": "text", "value": "a"}]
    row = {"messages": [ASKED, {"role": "assistant", "content": parts}]}
    assert "<think>\nhm\n</think>\n\na<|im_end|>" in render_row(row, settings(), load_template("qwen3")).text


@pytest.mark.parametrize("key", ["weight", "train", "training", "loss"])
@pytest.mark.parametrize("no", [0, 0.0, False])
def test_a_turn_that_is_not_to_be_learned(key, no):
    talk = [*TALK[:1], {**TALK[1], key: no}, TALK[2], {**TALK[3], key: type(no)(1)}]
    rows = datasets.Dataset.from_list([{"messages": talk}])
    for source in ([dict(row) for row in rows], [{"messages": json.dumps(talk)}]):
        assert read(source[0]).learned == [False, False, False, True]
        assert key not in str(read(source[0]).messages)
    made = tokenize_rows(rows, [1], settings(), tokenizer := make_tokenizer("byte level"))
    assert tokenizer.decode([label for label in made.rows[0]["labels"] if label != IGNORED]) == "hi<|im_end|>\n"


def test_a_prompt_of_messages_is_not_learned():
    row = {"prompt": [*TALK[:3]], "completion": [TALK[3]]}
    assert read(row).learned == [False, False, False, True]
    assert read(row, learn_all=True).learned == [False, True, False, True]
    tokenizer = make_tokenizer("byte level")
    assert render_row(row, settings(), tokenizer).mark().count("⟦") == 1
    whole = render_row(row, settings(loss_on="all"), tokenizer)
    assert whole.learned == ((0, len(whole.text)),)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"messages": []}, "no messages in 'messages'"),
        ({"messages": None}, "no messages in 'messages'"),
        ({"messages": "hello"}, "messages is not JSON"),
        ({"messages": '{"a": 1}'}, "is not a list of {role, content} or {from, value}"),
        ({"messages": ["q", "a"]}, "is not a list of {role, content} or {from, value}"),
        ({"messages": [{"content": "q"}]}, "lacks the text of its role (`role` or `from`)"),
        ({"messages": [{"role": "user"}]}, "lacks the text of its content (`content` or `value`)"),
        ({"messages": [{"role": "user", "content": 5}]}, "has a int as content, not text"),
        ({"messages": [ASKED]}, "the assistant says nothing"),
        ({"messages": [ASKED, {"role": "assistant", "content": " "}]}, "the assistant says nothing"),
        ({"messages": [ASKED, {**ANSWERED, "weight": 0}]}, "none of the assistant's turns is to be learned"),
        ({"messages": [ASKED, {**ANSWERED, "weight": 0.5}]}, "weight: 0.5; it is learned or not, 1 or 0"),
        ({"messages": [ASKED, {**ANSWERED, "train": "yes"}]}, "train: yes; it is learned or not, 1 or 0"),
        ({"messages": [ASKED, {**ANSWERED, "train": 1, "loss": 0}]}, "say different things"),
        ({"messages": [{**ASKED, "train": True}, ANSWERED]}, "a message of 'user' is to be learned"),
        ({"messages": [ASKED, {**ANSWERED, "train_detail": []}]}, "train_detail marks parts of a message"),
        (
            {"messages": [{**ASKED, "content": [{"type": "image_url", "image_url": {}}]}, ANSWERED]},
            "type 'image_url', and text alone",
        ),
        ({"messages": [{**ASKED, "content": [{"type": "odd"}]}, ANSWERED]}, "type 'odd' that cannot be read"),
        ({"conversations": [{"from": "function_call", "value": "{name"}]}, "a tool call is not JSON"),
        ({"messages": [{**ANSWERED, "tool_calls": [{"arguments": {}}]}]}, "a tool call has no name of a function"),
        ({"messages": [ASKED, ANSWERED], "tools": "[{"}, "tools is not JSON"),
        ({"messages": [ASKED, ANSWERED], "tools": [5]}, "'tools' is not a list of objects"),
        ({"instruction": "q", "output": "a", "history": ["q"]}, "'history' is not a list of [question, answer]"),
        ({"instruction": "q", "output": ""}, "nothing in instruction or output"),
    ],
)
def test_what_is_refused(row, why):
    with pytest.raises(BadRow) as caught:
        read(row)
    assert why in str(caught.value)


def test_weights_of_all_messages_are_read_as_openai_writes_them():
    # some sets give every message a weight, and one of a user's says nothing
    assert read({"messages": [{**ASKED, "weight": 1}, {**ANSWERED, "weight": 1}]}).learned == [False, True]


def found(rows, **changes):
    rows = datasets.Dataset.from_list(rows)
    return find_style(DataSettings(train="t", **changes), rows.column_names, look_at(rows), "t.jsonl")


@pytest.mark.parametrize(
    ("row", "style", "rest"),
    [
        ({"messages": [ASKED, ANSWERED]}, "chat", {}),
        ({"conversations": [{"from": "human", "value": "q"}]}, "chat", {"messages": "conversations"}),
        ({"id": 1, "messages": "[...]", "text": "x", "prompt": "y"}, "chat", {}),
        ({"prompt": [ASKED], "completion": [ANSWERED]}, "chat", {}),
        ({"prompt": "q", "completion": "a"}, "completion", {"prompt": "prompt", "target": "completion"}),
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca", {}),
        ({"text": "x"}, "text", {"target": "text"}),
        ({"text": "x", "url": "y"}, "text", {"target": "text"}),
        ({"body": "x"}, "text", {"target": "body"}),
    ],
)
def test_auto_finds_the_style(row, style, rest):
    made = found([row])
    assert made.style == style
    assert {key: getattr(made, key) for key in rest} == rest
    assert f"(style {style})" in describe_style(made)
    # settings that name columns decide
    assert found([row], target="x").style == "completion"
    assert found([row], style="alpaca") == DataSettings(train="t", style="alpaca")


@pytest.mark.parametrize(
    ("row", "remedy"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "data.prompt: '{prompt}' and data.target: '{chosen}'"),
        ({"chosen": [ASKED, ANSWERED], "rejected": [ASKED, ANSWERED]}, "set data.messages: chosen"),
        (
            {"conversations": [], "chosen": {"from": "gpt"}, "rejected": {"from": "gpt"}},
            "write each as the last message",
        ),
        ({"prompt": "q", "completion": "a", "label": True}, "for training on preferences"),
        ({"question": "q", "answer": "a"}, "data.prompt: '{question}\\n' and data.target: '{answer}'"),
        ({"a": "q", "b": "a"}, "data.prompt: '{a}\\n' and data.target: '{b}'"),
        ({"messages": [ASKED], "images": ["x.png"]}, "set data.style: chat"),
    ],
)
def test_auto_refuses_with_a_remedy(row, remedy):
    with pytest.raises(UsageError) as caught:
        found([row])
    assert "data.style: " in str(caught.value)
    assert remedy in str(caught.value)
    assert f"columns of t.jsonl: {', '.join(row)}" in str(caught.value)


def test_the_remedies_work():
    tokenizer = make_tokenizer("byte level")
    for row, changes in (
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "{prompt}", "target": "{chosen}"}),
        ({"chosen": [ASKED, ANSWERED], "rejected": [ASKED]}, {"messages": "chosen"}),
        ({"question": "q", "answer": "a"}, {"prompt": "{question}\n", "target": "{answer}"}),
        ({"messages": [ASKED, ANSWERED], "images": ["x.png"]}, {"style": "chat"}),
    ):
        rows = datasets.Dataset.from_list([row])
        chosen = DataSettings(train="t", **changes)
        check_columns(chosen, rows.column_names, "t")
        assert tokenize_rows(rows, [1], chosen, tokenizer).report.kept == 1


def test_chat_reads_other_columns_only_where_none_is_named():
    for columns in (["conversations"], ["prompt", "completion"], ["instruction", "output"], ["messages"]):
        check_columns(settings(), columns, "t")
    with pytest.raises(UsageError, match=r"data.messages: t has no column 'talk'"):
        check_columns(settings(messages="talk"), ["messages"], "t")
    with pytest.raises(UsageError, match=r"data.messages: t has no column 'messages'"):
        check_columns(settings(), ["turns"], "t")


def test_keys_that_arrow_adds_are_not_there(tmp_path):
    calls = [{**CALL, "function": {"name": "get", "arguments": one}} for one in ({"city": "Rome"}, {"zip": 5})]
    talks = [
        [ASKED, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "x"}, ANSWERED]
        for call in calls
    ]
    rows = [{"messages": talk, "tools": TOOLS} for talk in talks]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = []
    for name in ("a.parquet", "a.jsonl"):
        made = tokenize_rows(
            read_dataset(str(tmp_path / name), "data.train"),
            [1, 2],
            settings(max_length=2000),
            tokenizer := load_template("qwen3"),
        )
        texts.append([tokenizer.decode(row["input_ids"]) for row in made.rows])
    assert texts[0] == texts[1]
    assert '"arguments": {"city": "Rome"}}' in texts[0][0]
    assert '"arguments": {"zip": 5}}' in texts[0][1]
    # what JSON says is null is null
    nothing = {"role": "assistant", "tool_calls": [{"function": {"name": "get", "arguments": {"city": None}}}]}
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": [ASKED, nothing, ANSWERED]}))
    (row,) = read_dataset(str(tmp_path / "b.jsonl"), "data.train")
    assert '"arguments": {"city": null}}' in render_row(row, settings(), load_template("qwen3")).text


def test_rows_of_alpaca_with_history_in_their_own_style():
    row = {"instruction": "and?", "input": "", "output": "a2", "history": [["q", "a"]], "system": "Be kind."}
    made = render_row(row, DataSettings(train="t", style="alpaca"), make_tokenizer("byte level"))
    assert made.mark() == (
        "Be kind.\n\n### Instruction:\nq\n\n### Response:\n⟦a</s>⟧\n\n### Instruction:\nand?\n\n### Response:\n⟦a2⟧"
    )
