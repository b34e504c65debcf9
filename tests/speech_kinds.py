"""Tiny random models of speech with their processors, and sounds that say something: a tone for each word."""

import json

import numpy as np
import soundfile
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.models.whisper.tokenization_whisper import LANGUAGES

RATE = 16_000
WORDS = {"unu": 300, "doi": 600, "trei": 1200, "patru": 2400}
END = "<|endoftext|>"
SPECIAL = [
    # the tokenizer counts on every language
    *(END, "<|startoftranscript|>", *(f"<|{code}|>" for code in LANGUAGES), "<|translate|>", "<|transcribe|>"),
    *("<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"),
]


def tone(words, seconds=0.4, rate=RATE):
    """The tones of some words, one after the other."""
    time = np.arange(int(seconds * rate)) / rate
    return np.concatenate([0.3 * np.sin(2 * np.pi * WORDS[word] * time) for word in words.split()]).astype(np.float32)


def write_clips(folder, count=24, name="train.jsonl", texts=None):
    """Rows of one word each with its sound, in wav; the path of the file of rows.

    Args:
        texts: What is to be written for each word; None: the word.
    """
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        word = list(WORDS)[i % 4]
        soundfile.write(folder / "clips" / f"{i}.wav", tone(word) * (0.5 + i / count), RATE)
        rows.append({"audio": f"clips/{i}.wav", "text": (texts or {}).get(word, word)})
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def make_whisper_tokenizer():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = transformers.WhisperTokenizer(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.pad_token = END
    return tokenizer


def save_whisper(folder, layers=1, **changes):
    """A Whisper of a layer on each side and 32 wide that hears a window of 2 seconds."""
    tokenizer = make_whisper_tokenizer()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    torch.manual_seed(0)
    values = {
        "vocab_size": len(tokenizer), "d_model": 32, "num_mel_bins": 80, "init_std": 0.1,
        "max_source_positions": 100, "max_target_positions": 48,
        **{f"{side}_{part}": value for side in ("encoder", "decoder")
           for part, value in {"layers": layers, "attention_heads": 2, "ffn_dim": 64}.items()},
        "decoder_start_token_id": ids["<|startoftranscript|>"],
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), ids[END]),
    }  # fmt: skip
    config = transformers.WhisperConfig(**{**values, **changes})
    model = transformers.WhisperForConditionalGeneration(config)
    model.generation_config = transformers.GenerationConfig(
        decoder_start_token_id=config.decoder_start_token_id, is_multilingual=True, max_length=48,
        lang_to_id={token: ids[token] for token in ("<|en|>", "<|ro|>")}, return_timestamps=False,
        task_to_id={task: ids[f"<|{task}|>"] for task in ("transcribe", "translate")},
        no_timestamps_token_id=ids["<|notimestamps|>"],
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), ids[END]),
    )  # fmt: skip
    model.save_pretrained(folder)
    extractor = transformers.WhisperFeatureExtractor(chunk_length=2)
    transformers.WhisperProcessor(extractor, tokenizer).save_pretrained(folder)
    return folder


def teach_whisper(folder, steps=80):
    """Let a Whisper of `save_whisper` hear the words: without that it would have to learn to hear by an adapter."""
    model = transformers.WhisperForConditionalGeneration.from_pretrained(folder)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    processor.tokenizer.set_prefix_tokens(language="ro", task="transcribe")
    words = list(WORDS) * 2
    sounds = [tone(word) * (0.5 + i / 16) for i, word in enumerate(words)]
    features = processor.feature_extractor(sounds, sampling_rate=RATE, return_tensors="pt")["input_features"]
    rows = [processor.tokenizer(word)["input_ids"][1:] for word in words]
    longest = max(map(len, rows))
    labels = torch.tensor([[*row, *[-100] * (longest - len(row))] for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.005)
    for _ in range(steps):
        loss = model(input_features=features, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return loss.item()


def _save_letters(folder):
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *sorted(set("".join(WORDS)))]
    (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    return transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))


def save_wav2vec2(folder):
    """A wav2vec2 of two layers and 16 wide, with a letter for each frame."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _save_letters(folder)
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        conv_dim=(16, 16, 16), conv_stride=(5, 4, 4), conv_kernel=(10, 8, 4), num_feat_extract_layers=3,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, pad_token_id=0, layerdrop=0.0,
        mask_time_prob=0.05, mask_time_length=2,
    )  # fmt: skip
    transformers.Wav2Vec2ForCTC(config).save_pretrained(folder)
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    transformers.Wav2Vec2Processor(extractor, tokenizer).save_pretrained(folder)
    return folder


def save_moonshine(folder):
    """A Moonshine of two layers and 16 wide, which reads samples as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = Tokenizer(models.WordLevel({t: i for i, t in enumerate(["<s>", "<pad>", "</s>", "<unk>", *WORDS])}, "<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **special)
    torch.manual_seed(0)
    config = transformers.MoonshineConfig(
        vocab_size=8, hidden_size=16, intermediate_size=32, encoder_num_hidden_layers=2, decoder_num_hidden_layers=2,
        encoder_num_attention_heads=2, decoder_num_attention_heads=2, decoder_start_token_id=0, bos_token_id=0,
        eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    transformers.MoonshineForConditionalGeneration(config).save_pretrained(folder)
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True, do_normalize=False)
    transformers.Wav2Vec2Processor(extractor, tokenizer).save_pretrained(folder)
    return folder
