"""A tiny BART of about 8 million parameters, trained here to restore texts: WordNet's glosses and Tux Paint's captions.

    python benchmarks/tiny_bart.py --out tiny-bart

The texts are of the Debian packages wordnet-base and tuxpaint-stamps-default, which are fetched once (168 MB), or
given: --package-file wordnet-base_1%3a3.0-37_all.deb. The model is a BART with a byte-level tokenizer of 8,000 tokens,
random before; a third of each text is hidden in spans, each behind one mask, as in arXiv 1910.13461. What it can do
beyond that is little: it stands in for facebook/bart-base where there is no hub. Its 2,000 steps took 44 minutes of one
thread that shared two busy cores; the loss ended at 1.5.
"""

import argparse
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

from doralib.cli.demo_assets import DEFAULT_CACHE
from doralib.cli.demo_fetch import Package, fetch_package, read_members
from doralib.cli.demo_speech import STAMPS
from doralib.disk import replacing

WORDNET = Package(
    requirement="wordnet-base=1:3.0-37",
    file="wordnet-base_1%3a3.0-37_all.deb",
    sha256="61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
    nbytes=6_467_132,
    holds="WordNet 3.0 (WordNet's own license)",
    source="Debian",
)
SPECIAL = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}
LONGEST = 48
HIDDEN, SPAN = 0.3, 3.0
# batches that are sorted by length together
POOL = 20
RATE, WARMUP = 7e-4, 300


def read_glosses(package: Path) -> list[str]:
    """``a word: what it means`` for each sense of WordNet."""
    texts = []
    for _, content in read_members(package, lambda name: "/wordnet/data." in name):
        for line in content.decode("latin-1").splitlines():
            head, _, gloss = line.partition(" | ")
            words = head.split()
            if gloss and len(words) > 4:
                texts.append(f"{words[4].replace('_', ' ')}: {gloss.strip()}")
    return texts


def read_captions(package: Path) -> list[str]:
    """The English line of each stamp's texts."""
    found = read_members(package, lambda name: "/stamps/" in name and re.search(r"[^/]\.txt$", name) is not None)
    texts = [content.decode("utf-8", "replace").splitlines()[0].strip() for _, content in found if content.strip()]
    return [text for text in texts if text]


def make_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, with BART's marks around a text."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIAL.values()), initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(texts, trainer)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, **SPECIAL)


def make_model(vocabulary: int, width: int, layers: int) -> BartForConditionalGeneration:
    """A BART with random weights."""
    sizes = {"d_model": width, "encoder_layers": layers, "decoder_layers": layers, "max_position_embeddings": 640}
    sizes |= {"encoder_attention_heads": width // 64, "decoder_attention_heads": width // 64}
    sizes |= {"encoder_ffn_dim": 4 * width, "decoder_ffn_dim": 4 * width}
    return BartForConditionalGeneration(BartConfig(vocab_size=vocabulary, forced_eos_token_id=2, **sizes))


def hide(tokens: list[int], mask: int, rng: np.random.Generator) -> list[int]:
    """The tokens with spans of them behind one mask each."""
    left, corrupted, i = round(HIDDEN * len(tokens)), [], 0
    while i < len(tokens):
        if left > 0 and rng.random() < HIDDEN / SPAN * 1.5:
            span = min(int(rng.poisson(SPAN)), left)
            corrupted.append(mask)
            left, i = left - max(span, 1), i + span
        else:
            corrupted.append(tokens[i])
            i += 1
    return corrupted


def make_batches(
    texts: list[str], tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator, batch: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches without end: texts with holes, and the whole texts as labels; those of a batch are about as long."""
    rows = [ids[:LONGEST] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    while True:
        order = rng.permutation(len(rows)).tolist()
        for start in range(0, len(order) - batch, batch * POOL):
            pool = sorted(order[start : start + batch * POOL], key=lambda i: len(rows[i]))
            for first in rng.permutation(range(0, len(pool) - batch + 1, batch)).tolist():
                whole = [rows[i] for i in pool[first : first + batch]]
                holes = [hide(row, tokenizer.mask_token_id, rng) for row in whole]
                ids, mask = pad([[0, *row, 2] for row in holes], tokenizer.pad_token_id)
                labels, _ = pad([[0, *row, 2] for row in whole], -100)
                yield {"input_ids": ids, "attention_mask": mask, "labels": labels}


def pad(rows: list[list[int]], filling: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as one tensor, and which places are theirs."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[filling] * (longest - len(row))] for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])


def pretrain(
    model: BartForConditionalGeneration, batches: Iterator[dict[str, torch.Tensor]], steps: int, every: int
) -> None:
    """Train so many steps; the rate rises, then falls to 0."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    begin, shown = time.monotonic(), []
    model.train()
    for step in range(1, steps + 1):
        rate = RATE * min(step / WARMUP, 1.0) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = rate
        loss = model(**next(batches)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        shown.append(loss.item())
        if step % every == 0:
            left = (time.monotonic() - begin) / step * (steps - step) / 60
            print(f"step {step}: loss {sum(shown[-every:]) / every:.3f}, {left:.0f} minutes to go", flush=True)


def main() -> None:
    """Read the texts, train, write the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tiny-bart"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=100, help="steps between lines")
    parser.add_argument("--package-file", type=Path, action="append", default=[])
    asked = parser.parse_args()
    torch.manual_seed(asked.seed)
    cache = DEFAULT_CACHE.expanduser()
    glosses = read_glosses(fetch_package(WORDNET, cache, asked.package_file))
    captions = read_captions(fetch_package(STAMPS, cache, asked.package_file))
    texts = [*glosses, *captions * 5]
    tokenizer = make_tokenizer(texts, asked.tokens)
    model = make_model(len(tokenizer), asked.width, asked.layers)
    print(f"{len(glosses):,} glosses, {len(captions):,} captions, {model.num_parameters():,} parameters", flush=True)
    batches = make_batches(texts, tokenizer, np.random.default_rng(asked.seed), asked.batch)
    pretrain(model, batches, asked.steps, asked.every)
    with replacing(asked.out) as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
    print(f"the model is in {asked.out}")


if __name__ == "__main__":
    main()
