"""What ends an answer, by the templates of today's families, and where generation stops for it."""

import pytest
import torch
from conftest import TEMPLATE, make_llama, make_tokenizer

from doralib.data.turns import TurnEnd, find_end_tokens, find_turn_end, set_end_tokens
from doralib.errors import DoraError
from doralib.evaluation.evaluate import evaluate
from doralib.evaluation.generation import describe_ends, generate, stream
from doralib.evaluation.task_file import load_tasks

# as their makers published them, without what makes no difference to the end of a turn
LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else "
    "message['role'] %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI_3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
QWEN_3 = (
    "{% for message in messages %}{% if message['role'] == 'assistant' and loop.last %}"
    "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' + message['content'] + '<|im_end|>\n' }}{% else %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
HARMONY = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|start|>assistant<|channel|>final"
    "<|message|>' + message['content'] }}{% if loop.last %}{{ '<|return|>' }}{% else %}{{ '<|end|>' }}{% endif %}"
    "{% else %}{{ '<|start|>user<|message|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n' }}"
    "{% else %}{{ 'Assistant: ' + message['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
OPEN = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '<|user|>' + message['content'] }}"
    "{% else %}{{ '<|assistant|>' + message['content'] }}{% if not loop.last %}{{ '<|end|>' }}{% endif %}"
    "{% endif %}{% endfor %}"
)
PARTS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{{ '<end_of_utterance>\n' }}{% endfor %}"
)
MARKED_AS_TEXT = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n</turn>\n' }}{% endfor %}"
)


def with_template(template, special=(), blanks=()):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.add_tokens(list(blanks))
    return tokenizer


@pytest.mark.parametrize(
    ("template", "special", "end"),
    [
        (TEMPLATE, [], "<|im_end|>"),
        (QWEN_3, ["<think>", "</think>"], "<|im_end|>"),
        (LLAMA_3, ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"], "<|eot_id|>"),
        (GEMMA, ["<start_of_turn>", "<end_of_turn>"], "<end_of_turn>"),
        (PHI_3, ["<|end|>", "<|user|>", "<|assistant|>"], "<|end|>"),
        (MISTRAL, ["[INST]", "[/INST]"], "<|im_end|>"),
        (HARMONY, ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"], "<|return|>"),
        (OPEN, ["<|user|>", "<|assistant|>", "<|end|>"], "<|end|>"),
        (PARTS, ["<end_of_utterance>"], "<end_of_utterance>"),
    ],
    ids=["chatml", "qwen3", "llama3", "gemma", "phi3", "mistral", "harmony", "open", "parts"],
)
def test_the_token_after_an_assistants_last_word(template, special, end):
    # blanks are tokens of their own in some vocabularies, and end nothing
    tokenizer = with_template(template, special, blanks=["\n", "\n\n"])
    assert find_turn_end(tokenizer) == TurnEnd((tokenizer.convert_tokens_to_ids(end),))


def test_templates_without_such_a_token_end_by_text():
    assert find_turn_end(with_template(PLAIN)) == TurnEnd(text="\nUser:")
    assert find_turn_end(with_template(MARKED_AS_TEXT)) == TurnEnd(text="\n</turn>")
    assert find_turn_end(with_template(None)) == TurnEnd()
    assert find_turn_end(with_template("{{ raise_exception('never') }}")) == TurnEnd()


def test_the_models_own_ends_stay(tiny_llama):
    model, _ = tiny_llama
    tokenizer = with_template(PHI_3, ["<|end|>"])
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert find_end_tokens(7, tokenizer) == [7, tokenizer.eos_token_id, end]
    assert find_end_tokens([7, end], tokenizer) == [7, end, tokenizer.eos_token_id]
    set_end_tokens(model, tokenizer)
    assert model.generation_config.eos_token_id == [2, end]
    assert describe_ends(model, tokenizer) == "<|im_end|>, <|end|>"


@pytest.fixture(scope="module", params=[("<|end|>", PHI_3), (None, PLAIN)], ids=["token", "text"])
def learned(request):
    """A model that knows one conversation by heart, whose end is no end of text to its settings."""
    end, template = request.param
    tokenizer = with_template(template, [end] if end else [])
    turns = [("user", "question"), ("assistant", "the answer"), ("user", "question"), ("assistant", "the answer")]
    messages = [{"role": role, "content": text} for role, text in turns]
    ids = torch.tensor([tokenizer(tokenizer.apply_chat_template(messages, tokenize=False))["input_ids"]])
    model = make_llama(vocab_size=len(tokenizer), eos_token_id=1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    return model.eval(), tokenizer


@pytest.mark.parametrize("eos", [2.5, "2", [2, None]])
def test_an_end_that_is_no_token_is_refused(tiny_llama, eos):
    _, tokenizer = tiny_llama
    with pytest.raises(DoraError, match="eos_token_id is"):
        find_end_tokens(eos, tokenizer)


def test_generation_stops_at_the_end_of_the_turn(learned, caplog):
    model, tokenizer = learned
    (answer,) = generate(model, tokenizer, ["question"], chat=True, max_new_tokens=40)
    assert answer.strip() == "the answer"
    pieces = []
    text = "<|user|>\nquestion<|end|>\n<|assistant|>\n" if "<|end|>" in tokenizer.get_vocab() else None
    text = text or "User: question\nAssistant:"
    streamed = stream(model, tokenizer, text, pieces.append, chat=True, max_new_tokens=40)
    assert (streamed.text.strip(), streamed.cut) == ("the answer", False)
    with caplog.at_level("INFO", logger="doralib"):
        generate(model, tokenizer, ["question"], chat=True, max_new_tokens=1)
    assert f"an answer ends at {describe_ends(model, tokenizer)}" in caplog.text


def test_a_task_with_chat_stops_there_too(learned, tmp_path):
    model, tokenizer = learned
    (tmp_path / "t.jsonl").write_text('{"q": "question", "a": "the answer"}\n')
    (tmp_path / "t.yaml").write_text(
        "{kind: exact_match, data: t.jsonl, prompt: '{q}', answer: a, chat: true, max_new_tokens: 40}"
    )
    (result,) = evaluate(model, tokenizer, load_tasks([str(tmp_path / "t.yaml")])).values()
    assert result.metrics["accuracy"].value == 1
