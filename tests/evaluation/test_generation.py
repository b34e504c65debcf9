"""Generated text: the same for any batch, repeatable, ended by stop strings; and the chat."""

import json

import pytest
import torch

from doralib.cli.prompt_file import read_prompts, write_answers
from doralib.errors import DoraError, UsageError
from doralib.evaluation.generation import Sampling, generate, stream

PROMPTS = ["the movie", "a dull film, a terrible waste of an evening and", "x", "numbers 0 1 2 3", "Review: answer"]


def test_a_batch_gives_what_each_prompt_gives_alone(tiny):
    alone = [generate(*tiny, [prompt], max_new_tokens=12)[0] for prompt in PROMPTS]
    assert len(set(alone)) == len(PROMPTS)
    for batch_size in (2, 3, 64):
        assert generate(*tiny, PROMPTS, max_new_tokens=12, batch_size=batch_size) == alone


def test_greedy_is_the_most_probable_token_each_time(tiny):
    model, tokenizer = tiny
    ids = tokenizer(PROMPTS[1])["input_ids"]
    with torch.no_grad():
        for _ in range(8):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    expected = tokenizer.decode(ids[-8:], skip_special_tokens=True)
    # settings that came with the model must not turn greedy into something else
    model.generation_config.update(do_sample=True, temperature=0.7, top_p=0.8, top_k=3, max_length=5)
    assert generate(model, tokenizer, [PROMPTS[1]], max_new_tokens=8) == [expected]
    assert model.generation_config.temperature == 0.7


def test_sampling_depends_on_the_seed_alone(tiny):
    hot = Sampling(temperature=1.5, seed=1)
    first = generate(*tiny, PROMPTS, max_new_tokens=12, sampling=hot)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert generate(*tiny, PROMPTS, max_new_tokens=12, sampling=hot) == first
    assert torch.equal(torch.get_rng_state(), before), "the caller's random numbers must go on as they were"
    assert generate(*tiny, PROMPTS, max_new_tokens=12, sampling=Sampling(temperature=1.5, seed=2)) != first
    # of one token there is nothing to draw
    assert generate(*tiny, PROMPTS, max_new_tokens=12, sampling=Sampling(temperature=1.5, top_k=1)) == generate(
        *tiny, PROMPTS, max_new_tokens=12
    )


def test_text_ends_before_a_stop_string_and_no_later_token_is_made(tiny):
    model, tokenizer = tiny
    whole = generate(model, tokenizer, PROMPTS[:1], max_new_tokens=40)[0]
    stop = whole[6:9]
    calls = []
    hook = model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    got = generate(model, tokenizer, PROMPTS[:1], max_new_tokens=40, sampling=Sampling(stop=("never there", stop)))
    hook.remove()
    assert got == [whole[: whole.index(stop)]]
    assert len(calls) < 40


def test_a_stopped_prompt_does_not_stop_its_neighbours(tiny):
    whole = generate(*tiny, PROMPTS, max_new_tokens=16)
    sampling = Sampling(stop=(whole[0][2:5],))
    cut = generate(*tiny, PROMPTS, max_new_tokens=16, sampling=sampling)
    assert cut == [generate(*tiny, [prompt], max_new_tokens=16, sampling=sampling)[0] for prompt in PROMPTS]
    assert cut[0] != whole[0]


def test_modes_come_back(tiny):
    model, tokenizer = tiny
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    generate(model, tokenizer, ["x"], max_new_tokens=2)
    assert [module.training for module in model.modules()] == modes


def test_chat_uses_the_template(tiny):
    written = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert generate(*tiny, ["hello"], chat=True, max_new_tokens=9) == generate(*tiny, [written], max_new_tokens=9)
    assert generate(*tiny, ["hello"], chat=True, max_new_tokens=9) != generate(*tiny, ["hello"], max_new_tokens=9)


def test_empty_prompt_and_missing_tokens(tiny):
    model, tokenizer = tiny
    assert isinstance(generate(model, tokenizer, [""], max_new_tokens=3)[0], str)
    tokenizer.pad_token = None
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=6) == [
        generate(model, tokenizer, [prompt], max_new_tokens=6)[0] for prompt in PROMPTS
    ]
    tokenizer.eos_token = None
    with pytest.raises(UsageError, match="empty prompt"):
        generate(model, tokenizer, [""], max_new_tokens=3)


def test_too_long_a_prompt_is_named(tiny):
    with pytest.raises(UsageError, match=r"1 of 2 prompts, first number 2 with \d+ tokens.*takes 256"):
        generate(*tiny, ["x", "the movie " * 200])


def test_stream_writes_what_generate_returns(tiny):
    pieces = []
    text, cut, empty = stream(*tiny, PROMPTS[1], pieces.append, max_new_tokens=12)
    assert cut
    assert [text] == generate(*tiny, [PROMPTS[1]], max_new_tokens=12)
    assert "".join(pieces).strip() == text.strip()
    assert len(pieces) > 1
    assert not empty


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "one\n\ntwo words\n"),
        ("p.json", '[{"prompt": "one"}, {"prompt": "two words", "id": 3}]'),
        ("p.jsonl", '{"prompt": "one"}\n\n{"prompt": "two words"}\n'),
    ],
)
def test_prompts_are_read(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read_prompts(tmp_path / name) == [{"prompt": "one"}, {"prompt": "two words"}]


@pytest.mark.parametrize(
    ("name", "text", "error", "says"),
    [
        ("p.txt", "\n", UsageError, "holds no prompt"),
        ("p.csv", "one", UsageError, "read from .txt"),
        ("p.json", '{"prompt": "one"}', UsageError, "must hold a list"),
        ("p.json", '[{"prompt": "one"}, {"promt": "two"}]', UsageError, "1 of 2 rows, first row 2"),
        ("p.json", '[{"prompt"', DoraError, "JSON"),
        ("p.jsonl", '{"prompt": "one"}\n{"prompt', DoraError, "line 2"),
    ],
)
def test_bad_prompt_files_are_explained(tmp_path, name, text, error, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(DoraError, match=says) as caught:
        read_prompts(tmp_path / name)
    assert caught.type is error
    with pytest.raises(UsageError, match="did you mean"):
        read_prompts(tmp_path / f"x{name}")


def test_outputs_are_one_object_a_line(tmp_path):
    write_answers(tmp_path / "out.jsonl", [{"prompt": "a"}, {"prompt": "b"}], ["é\n", ""])
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"prompt": "a", "output": "é\n"}, {"prompt": "b", "output": ""}]
