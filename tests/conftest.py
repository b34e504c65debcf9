"""What tests share: a tiny real model with a real tokenizer, and settings that make runs repeatable."""

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("COLUMNS", "160")

import pytest
import torch
from torchvision_beside_cpu import declare_operators

declare_operators()

TEXT = [
    "the movie was wonderful and the actors were brilliant",
    "a dull film, a terrible waste of an evening",
    "Review: positive negative Sentiment: question answer true false",
    "numbers 0 1 2 3 4 5 6 7 8 9 and letters a b c d e f g h i j k l m n o p q r s t u v w x y z",
]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pytest_addoption(parser):
    parser.addoption("--no-skips", action="store_true", help="a test that would be skipped fails")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item):
    return _failed_where_skipped((yield), item.config)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report(collector):
    """The same for a whole file, which `importorskip` at its head leaves out."""
    return _failed_where_skipped((yield), collector.config)


def _failed_where_skipped(report, config):
    if config.getoption("no_skips") and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome, (*_, reason) = "failed", report.longrepr
        report.longrepr = f"--no-skips: {reason}"
    return report


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _without_estimates(request, monkeypatch):
    """A run's memory is estimated by four traced steps: a third of a second, in each of hundreds of tiny runs."""
    job = sys.modules.get("doralib.training.job")
    if job is not None and not request.node.get_closest_marker("estimates"):
        monkeypatch.setattr(job, "estimate_memory", lambda _: None)


def make_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<|pad|>", eos_token="<|im_end|>", chat_template=TEMPLATE
    )


def make_llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": 400,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 2,
    }
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()


@pytest.fixture
def tiny_llama():
    """A LLaMA of two layers with random weights, untied, float32; and a byte-level BPE tokenizer of 400 tokens."""
    return make_llama(), make_tokenizer()


@pytest.fixture
def tiny(tiny_llama):
    """The same with weights large enough that the next token depends on the text."""
    model, tokenizer = tiny_llama
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(12)
    return model, tokenizer


@pytest.fixture(scope="session")
def tiny_llama_folder(tmp_path_factory):
    """`tiny_llama`, saved; not to be written to."""
    folder = tmp_path_factory.mktemp("tiny_llama") / "model"
    make_llama().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def even_llama_folder(tmp_path_factory):
    """The same with sizes that bitsandbytes' blocks of 64 divide: elsewhere its CPU kernels take wrong scales."""
    folder = tmp_path_factory.mktemp("even_llama") / "model"
    make_llama(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """Run `doralib ARGUMENTS`; its exit status and what it printed."""
    from doralib.cli import main as cli

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["doralib", *map(str, arguments)])
        try:
            cli.main()
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return status, out, err

    return call
