"""Tiny random encoder-decoders of every kind, with words for tokens and rows that they can learn."""

import json

import torch
import transformers

WORDS = {"one": "unu", "two": "doi", "three": "trei", "four": "patru"}
LANGUAGES = ["eng_Latn", "ron_Latn"]
PAD, EOS = 1, 2


def make_tokenizer(kind="bart"):
    """Words as tokens, with the special tokens and the languages of a kind."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    vocabulary = ["<s>", "<pad>", "</s>", "<unk>", *WORDS, *WORDS.values(), "translate", "English", "to", ":"]
    if kind == "nllb":
        return transformers.NllbTokenizer(vocab={t: i for i, t in enumerate([*vocabulary, *LANGUAGES])}, merges=[])
    raw = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    single = "$A </s>" if kind in ("t5", "marian") else "<s> $A </s>"
    raw.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 2)])
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **special)


def make_model(kind, vocab_size=48):
    torch.manual_seed(0)
    ids = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 0}
    if kind == "t5":
        config = transformers.T5Config(
            vocab_size=vocab_size, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=PAD,
            pad_token_id=PAD, eos_token_id=EOS,
        )  # fmt: skip
        return transformers.T5ForConditionalGeneration(config)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64}
    names = {
        "bart": (transformers.BartConfig, transformers.BartForConditionalGeneration),
        "mbart": (transformers.MBartConfig, transformers.MBartForConditionalGeneration),
        "nllb": (transformers.M2M100Config, transformers.M2M100ForConditionalGeneration),
        "marian": (transformers.MarianConfig, transformers.MarianMTModel),
    }
    config, model = names[kind]
    start = PAD if kind == "marian" else EOS
    return model(config(vocab_size=vocab_size, **sizes, **heads, **ids, decoder_start_token_id=start, init_std=0.2))


def rows(count=48):
    words = list(WORDS)
    texts = [[words[i % 4], words[(i // 4) % 4]] for i in range(count)]
    return [{"en": " ".join(text), "ro": " ".join(WORDS[word] for word in text)} for text in texts]


def write_rows(folder):
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return str(folder / "train.jsonl")
