"""The chat: what is said, what is remembered, its commands, and a real terminal."""

import json
import os
import sys

import pytest

import doralib
from doralib import DoraConfig
from doralib.cli.chat import Chat
from doralib.errors import UsageError
from doralib.evaluation.generation import generate


class Terminal:
    """Lines that a user types, an exception for a key, and everything shown."""

    def __init__(self, *lines):
        self.lines, self.shown = list(lines), ""

    def read(self, prompt):
        if not self.lines:
            raise EOFError
        if isinstance(self.lines[0], BaseException):
            raise self.lines.pop(0)
        return self.lines.pop(0)

    def write(self, text):
        self.shown += text


def test_chat_remembers_until_reset(tiny):
    terminal = Terminal("hello", "", "again")
    messages = Chat(*tiny, terminal.read, terminal.write, max_new_tokens=6).run()
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    first = messages[1]["content"]
    assert [first] == generate(*tiny, ["hello"], chat=True, max_new_tokens=6)
    assert first.strip() in terminal.shown
    # the second answer was given in view of the first turn
    assert [messages[3]["content"]] != generate(*tiny, ["again"], chat=True, max_new_tokens=6)

    fresh = Chat(
        *tiny, Terminal("hello", "/reset", "again", "/quit", "no").read, terminal.write, max_new_tokens=6
    ).run()
    assert [message["content"] for message in fresh] == [
        "again",
        *generate(*tiny, ["again"], chat=True, max_new_tokens=6),
    ]


def test_chat_says_which_commands_there_are(tiny):
    terminal = Terminal("/rest", KeyboardInterrupt())
    assert Chat(*tiny, terminal.read, terminal.write).run() == []
    assert "no command /rest" in terminal.shown


def test_ctrl_c_ends_the_answer_and_not_the_chat(tiny):
    model, tokenizer = tiny
    terminal = Terminal("hello", "again")

    def interrupt(*_):
        hook.remove()
        raise KeyboardInterrupt

    hook = model.lm_head.register_forward_hook(interrupt)
    messages = Chat(model, tokenizer, terminal.read, terminal.write, max_new_tokens=4).run()
    assert "(stopped)" in terminal.shown
    assert messages[0]["content"] == "again"
    assert len(messages) == 2


def test_chat_forgets_the_oldest_turn_when_it_is_too_long(tiny):
    terminal = Terminal("the movie " * 60, "the actors " * 60, "a film " * 300)
    messages = Chat(*tiny, terminal.read, terminal.write, max_new_tokens=4).run()
    assert terminal.shown.count("oldest turns are forgotten") == 1
    assert terminal.shown.count("that is too long") == 1
    # the question that was too long cost nothing of what was said before
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert messages[0]["content"].startswith("the actors")


def test_chat_needs_a_template(tiny):
    model, tokenizer = tiny
    tokenizer.chat_template = None
    with pytest.raises(UsageError, match="no chat template"):
        Chat(model, tokenizer, Terminal("hello").read, print)


def test_a_text_of_several_lines_is_one_message(tiny):
    terminal = Terminal('"""the movie', "", 'a film"""', '"""one line"""')
    messages = Chat(*tiny, terminal.read, terminal.write, max_new_tokens=2).run()
    assert [each["content"] for each in messages[::2]] == ["the movie\n\na film", "one line"]


def test_help_names_every_command(tiny):
    terminal = Terminal("/help")
    Chat(*tiny, terminal.read, terminal.write).run()
    assert all(name in terminal.shown for name in ("/reset", "/system", "/set", "/save", "/quit", '"""'))
    assert "/adapter" not in terminal.shown


def test_the_system_text_comes_first_and_survives_a_reset(tiny):
    terminal = Terminal("/system the actors", "/reset", "hello")
    chat = Chat(*tiny, terminal.read, terminal.write, max_new_tokens=6)
    answer = chat.run()[-1]["content"]
    told = [{"role": "system", "content": "the actors"}, {"role": "user", "content": "hello"}]
    text = tiny[1].apply_chat_template(told, tokenize=False, add_generation_prompt=True)
    from doralib.evaluation.generation import stream

    assert stream(*tiny, text, lambda _: None, chat=True, max_new_tokens=6).text == answer


def test_settings_change_between_answers(tiny):
    terminal = Terminal("/set max_new_tokens 3", "/set temperature=0.5", "/set top_p 0.9", "/set", "hello")
    chat = Chat(*tiny, terminal.read, terminal.write)
    chat.run()
    assert (chat.max_new_tokens, chat.sampling.temperature, chat.sampling.top_p) == (3, 0.5, 0.9)
    assert "temperature 0.5\n" in terminal.shown
    assert "(cut after 3 tokens" in terminal.shown


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/set temperatur 1", "did you mean 'temperature'"),
        ("/set temperature warm", "should be a number"),
        ("/set temperature inf", "finite"),
        ("/set max_new_tokens 0", "from 1 on"),
        ("/save", "nothing to save"),
        ("/save x.jsonl", "nothing to save"),
        ("/sav", "did you mean '/save'"),
    ],
)
def test_a_mistake_is_told_and_the_chat_goes_on(tiny, line, told):
    terminal = Terminal(line, "hello")
    messages = Chat(*tiny, terminal.read, terminal.write, max_new_tokens=2).run()
    assert told in terminal.shown
    assert len(messages) == 2


def test_a_saved_conversation_is_a_row_to_train_on(tiny, tmp_path):
    path = tmp_path / "talks.jsonl"
    path.write_text('{"messages": []}')
    terminal = Terminal("/system be brief", "hello", f"/save {path}", "again", f"/save {path}", "/save talk.txt")
    messages = Chat(*tiny, terminal.read, terminal.write, max_new_tokens=2).run()
    rows = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    system = {"role": "system", "content": "be brief"}
    assert rows == [[], [system, *messages[:2]], [system, *messages]]
    assert "line of a .jsonl file" in terminal.shown


def test_the_adapter_is_switched(tiny):
    model, tokenizer = tiny
    doralib.adapt(model, DoraConfig(r=2, target_modules=("q_proj", "down_proj")), "maths")
    from adapted import move

    move(model, 0.5)
    terminal = Terminal(
        "hello", "/reset", "/adapter base", "hello", "/reset", "/adapter maths", "hello", "/adapter mats"
    )
    said = []
    Chat(model, tokenizer, terminal.read, said.append, max_new_tokens=6, adapters={"maths": tokenizer}).run()
    shown = "".join(said)
    with doralib.disabled(model):
        base = generate(model, tokenizer, ["hello"], chat=True, max_new_tokens=6)[0]
    tuned = generate(model, tokenizer, ["hello"], chat=True, max_new_tokens=6)[0]
    assert base != tuned
    assert shown.index(tuned.strip()) < shown.index("answers are of base now") < shown.index(base.strip())
    assert "there is no adapter 'mats'; did you mean 'maths'" in shown


@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="a pseudo-terminal of POSIX")
def test_at_a_real_terminal_arrows_bring_back_what_was_said(tiny, tmp_path):
    import pexpect

    model, tokenizer = tiny
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    command = ["-m", "doralib", "generate", str(tmp_path), "--max-new-tokens", "2"]
    plain = {**os.environ, "PROMPT_TOOLKIT_NO_CPR": "1"}
    child = pexpect.spawn(sys.executable, command, timeout=240, encoding="utf-8", dimensions=(40, 120), env=plain)
    child.expect("/quit ends the chat")
    child.expect(">")
    child.sendline("hello movie")
    child.expect("cut after 2 tokens")
    child.send("\x1b[A")
    child.expect("hello movie")
    child.sendline("")
    child.expect("cut after 2 tokens")
    child.sendline("/quit")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
