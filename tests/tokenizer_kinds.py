"""Tokenizers of the kinds that models bring, trained on a few sentences."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_python import PreTrainedTokenizer

TEXTS = [
    "a good film, a bad film: positive negative",
    "Review: a good film\nSentiment: positive",
    "user assistant system good bad and what of it?",
    "Below is an instruction that describes a task. Write a response.\n\n### Instruction:\n\n### Response:\n",
] * 4
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
KINDS = (
    "byte level",
    "byte level, trimmed",
    "metaspace always",
    "metaspace first",
    "metaspace never",
    "prepended by a normalizer",
    "unigram",
    "wordpiece",
    "like Llama 3",
    "without offsets",
)


def make_tokenizer(kind, template=CHAT, extra=()):
    """A tokenizer of a kind, with a chat template; `extra` are special tokens too."""
    if kind == "without offsets":
        made = Syllables(eos_token="</s>", bos_token="<s>", unk_token="<unk>", extra_special_tokens=SPECIAL[3:])
        made.add_special_tokens({"additional_special_tokens": [*SPECIAL[3:], *extra]})
    else:
        core = _CORES[kind.split()[0]](kind, [*SPECIAL, *extra])
        made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", bos_token="<s>", unk_token="<unk>")
        if kind == "wordpiece":
            made.eos_token = made.bos_token = None
    made.chat_template = template
    return made


def _byte_level(kind, special):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(TEXTS, _bpe(special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if "trimmed" in kind:
        core.post_processor = processors.ByteLevel(trim_offsets=True)
    return core


def _metaspace(kind, special):
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    # as Llama 2's file says it: the whole text is one word
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind.split()[1], split=False)
    core.decoder = decoders.Metaspace(prepend_scheme=kind.split()[1])
    return _with_bytes(core, special)


def _prepended(kind, special):
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Metaspace()
    return _with_bytes(core, special)


def _with_bytes(core, special):
    core.train_from_iterator(TEXTS, _bpe([*special, *(f"<0x{i:02X}>" for i in range(256))]))
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return core


def _unigram(kind, special):
    core = Tokenizer(models.Unigram())
    core.normalizer = normalizers.NFKC()
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    core.train_from_iterator(
        TEXTS, trainers.UnigramTrainer(vocab_size=150, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    # T5 puts its end behind every text
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return core


def _wordpiece(kind, special):
    core = Tokenizer(models.WordPiece(unk_token="<unk>"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    special = [*special, "[CLS]", "[SEP]"]
    core.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    )
    ends = [(name, core.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    core.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return core


def _llama3(kind, special):
    core = Tokenizer(models.BPE(ignore_merges=True))
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(TEXTS, _bpe(special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    core.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)]),
        ]
    )
    return core


def _regex(pattern):
    from tokenizers import Regex

    return Regex(pattern)


def _bpe(special, **options):
    return trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False, **options)


_CORES = {
    "byte": _byte_level,
    "metaspace": _metaspace,
    "prepended": _prepended,
    "unigram": _unigram,
    "wordpiece": _wordpiece,
    "like": _llama3,
}


class Syllables(PreTrainedTokenizer):
    """Tokens of up to three characters, which join words and lines; it knows no offsets."""

    def __init__(self, **options):
        self.known = {name: i for i, name in enumerate(SPECIAL)}
        for text in [*TEXTS, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,:?!#\n"]:
            for size in (1, 2, 3):
                for i in range(len(text) - size + 1):
                    self.known.setdefault(text[i : i + size], len(self.known))
        super().__init__(**options)

    @property
    def vocab_size(self):
        return len(self.known)

    def get_vocab(self):
        return {**self.known, **self.added_tokens_encoder}

    def _tokenize(self, text, **_):
        made = []
        while text:
            size = next((size for size in (3, 2) if text[:size] in self.known and len(text) >= size), 1)
            made.append(text[:size])
            text = text[size:]
        return made

    def _convert_token_to_id(self, token):
        return self.known.get(token, 0)

    def _convert_id_to_token(self, index):
        return next((token for token, i in self.known.items() if i == index), "<unk>")

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)

    def build_inputs_with_special_tokens(self, one, other=None):
        return [1, *one]
