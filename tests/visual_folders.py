"""A tiny BART, and folders in the layouts of VL-BART's image and video tasks; the features hold the right answers."""

import json
import random

import numpy as np
import torch

COLORS = ("red", "green", "blue", "black")


def make_bart_folder(folder, width=32, layers=1, **changes):
    """A BART with a byte-level tokenizer of its own special tokens; returns the folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    texts = ["true false red green blue black vqa: gpa: nlvr: caption: what color is it? a0: a1: [Subs] [Q] [TS]"] * 3
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    raw.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    names = {
        "bos_token": "<s>",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **names)
    settings = {
        "vocab_size": len(tokenizer),
        "d_model": width,
        "encoder_layers": layers,
        "decoder_layers": layers,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 2 * width,
        "decoder_ffn_dim": 2 * width,
        "max_position_embeddings": 128,
        "init_std": 0.2,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    }
    torch.manual_seed(1)
    BartForConditionalGeneration(BartConfig(**{**settings, **changes})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_grid(file, color, side=3, width=8, seed=0):
    """A grid in which one place shows the color."""
    import h5py

    rng = np.random.default_rng(seed)
    values = 0.1 * rng.standard_normal((side * side, width)).astype("float32")
    values[rng.integers(side * side), COLORS.index(color)] = 4.0
    file.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(file, "w") as opened:
        opened[f"{file.stem}/features"] = values


def write_frames(file, color, length=5, width=8, seed=0):
    rng = np.random.default_rng(seed)
    values = 0.1 * rng.standard_normal((length, width)).astype("float32")
    values[rng.integers(length), COLORS.index(color)] = 4.0
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, features=values)


def write_json(file, value):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


def write_picture(file):
    from PIL import Image

    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 6), (200, 30, 30)).save(file)


def make_image_folder(root, count=24, people=True):
    """VQA, GQA, NLVR2 and captions of pictures of one color each."""
    draw, grids = random.Random(0), "clip_features/data_clip_RN101_att"
    for split, vqa, offset in (("train", "karpathy_train", 0), ("test", "karpathy_test", 1000)):
        word = {"train": "train2014", "test": "val2014"}[split]
        images, rows = [], {"vqa": [], "gqa": [], "nlvr": []}
        for i in range(offset, offset + (count if split == "train" else 8)):
            color, other = draw.choice(COLORS), draw.choice(COLORS)
            image = f"COCO_{word}_{i:012d}"
            write_grid(root / "COCO" / grids / f"{image}.h5", color, seed=i)
            images.append(
                {
                    "filename": f"{image}.jpg",
                    "cocoid": i,
                    "split": "restval" if i % 2 and split == "train" else split,
                    "sentences": [{"raw": f"it is {color}"}, {"raw": f"a {color} thing "}],
                }
            )
            rows["vqa"].append(
                {
                    "question_id": i * 10,
                    "img_id": image,
                    "sent": "what color is it?",
                    "label": {color: 1, other: 0.3} if other != color else {color: 1},
                    "answer_type": "other",
                    "question_type": "what color",
                    "is_topk_optimal": True,
                }
            )
            write_grid(root / ("VG" if split == "train" else "GQA") / grids / f"{i}.h5", color, seed=i)
            question = {"img_id": str(i), "question_id": f"q{i}", "sent": "what color?", "label": {color: 1.0}}
            rows["gqa"].append(question)
            pair = [color, color if i % 2 else other]
            for k, each in enumerate(pair):
                write_grid(root / "nlvr" / grids / f"{split}-{i}-0-img{k}.h5", each, seed=2 * i + k)
            rows["nlvr"].append(
                {
                    "identifier": f"{split}-{i}-0-0",
                    "img0": f"{split}-{i}-0-img0",
                    "img1": f"{split}-{i}-0-img1",
                    "label": int(pair[0] == pair[1]),
                    "sent": "both are one color",
                    "uid": f"nlvr2_{split}_{i}",
                }
            )
        write_picture(root / "COCO" / "images" / f"COCO_val2014_{1000:012d}.png")
        write_json(root / "vqa" / f"{vqa}.json", rows["vqa"])
        write_json(root / "GQA" / ("train.json" if split == "train" else "testdev.json"), rows["gqa"])
        write_json(root / "nlvr" / f"{split}.json", rows["nlvr"])
        known = root / "COCO" / "dataset_coco.json"
        before = json.loads(known.read_text())["images"] if known.is_file() else []
        write_json(known, {"images": before + images, "dataset": "coco"})
        if split == "test" and people:
            answers = [
                {
                    "question_id": row["question_id"],
                    "answers": [{"answer": next(iter(row["label"]))}] * 9 + [{"answer": "x"}],
                }
                for row in rows["vqa"]
            ]
            write_json(root / "vqa" / "v2_mscoco_val2014_annotations.json", {"annotations": answers})
    write_json(root / "GQA" / "valid.json", [])
    return root


def make_video_folder(root, count=16):
    """TVQA, How2QA, TVC and YC2C of clips of one color each; half of the answers are spoken."""
    draw = random.Random(0)
    for task, videos, choices in (("tvqa", "tv", 5), ("how2qa", "how2", 4), ("tvc", "tv", 0), ("yc2c", "yc2", 0)):
        for split, size in (("train_release", count), ("val_release", 6)):
            rows, spoken = [], []
            for i in range(size):
                video, color = f"{task}_{split}_{i}", draw.choice(COLORS)
                write_frames(root / "vis_features" / videos / "clip-vit" / f"{video}.npz", color, 3 + i % 6, seed=i)
                spoken.append({"vid_name": video, "sub": [{"text": f" say {color} ", "start": 0.0, "end": 1.5}]})
                row = {"vid_name": video, "duration": 5}
                if choices:
                    words = [*draw.sample(COLORS, 4), "none"]
                    row |= {f"a{k}": f"{word}." for k, word in enumerate(words[:choices])}
                    row |= {"qid": 100 + i, "q": "what color?", "ts": "0.5-3.25", "answer_idx": words.index(color)}
                    row |= {"show_name": "Friends"} if task == "tvqa" else {}
                else:
                    descs = [
                        {"desc": f"it is {color}", "desc_id": i, "type": "v"},
                        {"desc": f"{color} thing", "desc_id": -i, "type": "v"},
                    ]
                    row |= {"clip_id": 500 + i, "descs": descs}
                    row |= {"ts": [0, 3.38]} if task == "tvc" else {}
                rows.append(row)
            file = root / "ann" / task / f"{task}_{split}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            with (root / "ann" / f"{videos}_subtitles.jsonl").open("a") as opened:
                opened.write("".join(json.dumps(row) + "\n" for row in spoken))
    return root
