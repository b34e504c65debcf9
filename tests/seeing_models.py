"""Tiny models that take pictures, one of each family, with processors that need nothing from the net."""

import json

import torch
import transformers
from conftest import make_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

WORDS = ["what is in the picture? a red cat and one blue dog, yes no user assistant USER ASSISTANT"]
TEXT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SIGHT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}PLACE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# of models that take videos too
FILM_CHAT = CHAT.replace(
    "{% else %}{{ part['text'] }}", "{% elif part['type'] == 'video' %}FILM{% else %}{{ part['text'] }}"
)
# as llava-hf's models have it: no token ends an answer
LLAVA_CHAT = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'].upper() + ': ' }}{% endif %}"
    "{% for part in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def make_tokenizer(named=(), more=(), **settings):
    """A byte-level tokenizer; `named` are special tokens that are its attributes."""
    named = dict(named)
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", *named.values(), *more]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        WORDS,
        trainers.BpeTrainer(vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    settings = {"pad_token": "<pad>", "eos_token": "<|im_end|>", **settings}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, extra_special_tokens=named, **settings)


def _llama(tokenizer, **changes):
    return transformers.LlamaConfig(
        **{**TEXT, "num_key_value_heads": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 512, **changes}
    )


def _clip():
    return transformers.CLIPVisionConfig(
        **{**SIGHT, "num_hidden_layers": 3}, image_size=28, patch_size=14, projection_dim=16
    )


def make_llava():
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    tokenizer = make_tokenizer(more=["<image>"], eos_token="</s>", bos_token="<s>")
    look = LlavaImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, do_pad=True)
    processor = transformers.LlavaProcessor(
        look,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_CHAT,
    )
    config = transformers.LlavaConfig(
        vision_config=_clip(),
        text_config=_llama(tokenizer),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
    )
    return transformers.LlavaForConditionalGeneration(config), processor


def make_parts(folder):
    """What a LLaVA is composed of: folders vicuna and clip, and mm_projector.bin as LLaVA has it."""
    tokenizer = make_tokenizer(bos_token="<s>", eos_token="</s>")
    make_llama(vocab_size=len(tokenizer)).save_pretrained(folder / "vicuna")
    tokenizer.save_pretrained(folder / "vicuna")
    tower = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    )
    transformers.CLIPVisionModel(tower).save_pretrained(folder / "clip")
    look = {
        "crop_size": {"height": 28, "width": 28},
        "size": {"shortest_edge": 28},
        "image_processor_type": "CLIPImageProcessor",
    }
    mean = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
    (folder / "clip" / "preprocessor_config.json").write_text(json.dumps({**look, **mean}))
    shapes = {"0.weight": (32, 16), "0.bias": (32,), "2.weight": (32, 32), "2.bias": (32,)}
    torch.save(
        {f"model.mm_projector.{name}": torch.randn(shape) for name, shape in shapes.items()},
        folder / "mm_projector.bin",
    )
    return folder


def make_llava_next():
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    tokenizer = make_tokenizer(more=["<image>"])
    look = LlavaNextImageProcessorPil(
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
    )
    processor = transformers.LlavaNextProcessor(
        look,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT.replace("PLACE", "<image>"),
    )
    config = transformers.LlavaNextConfig(
        vision_config=_clip(),
        text_config=_llama(tokenizer),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
        vision_feature_layer=-2,
    )
    return transformers.LlavaNextForConditionalGeneration(config), processor


def make_gemma3():
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = make_tokenizer(names, bos_token="<s>")
    look = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    chat = "{{ bos_token }}" + CHAT.replace("PLACE", "<start_of_image>")
    processor = transformers.Gemma3Processor(look, tokenizer, image_seq_length=4, chat_template=chat)
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(
            **TEXT, num_key_value_heads=2, head_dim=8, vocab_size=len(tokenizer), max_position_embeddings=512
        ),
        vision_config=transformers.SiglipVisionConfig(**SIGHT, image_size=28, patch_size=7),
        mm_tokens_per_image=4,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    return transformers.Gemma3ForConditionalGeneration(config), processor


def make_paligemma():
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    tokenizer = make_tokenizer({"image_token": "<image>"}, bos_token="<s>")
    look = SiglipImageProcessorPil(size={"height": 28, "width": 28})
    look.image_seq_length = 4
    processor = transformers.PaliGemmaProcessor(look, tokenizer)
    config = transformers.PaliGemmaConfig(
        text_config=transformers.GemmaConfig(
            **TEXT, num_key_value_heads=2, head_dim=8, vocab_size=len(processor.tokenizer), max_position_embeddings=512
        ),
        vision_config=transformers.SiglipVisionConfig(**SIGHT, image_size=28, patch_size=14, projection_dim=16),
        image_token_index=tokenizer.image_token_id,
        projection_dim=16,
        hidden_size=16,
    )
    return transformers.PaliGemmaForConditionalGeneration(config), processor


def make_idefics3():
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    more = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
    more += [f"<row_{i}_col_{j}>" for i in range(1, 3) for j in range(1, 3)]
    tokenizer = make_tokenizer(more=more)
    look = Idefics3ImageProcessorPil(
        size={"longest_edge": 56}, max_image_size={"longest_edge": 28}, do_image_splitting=True
    )
    processor = transformers.Idefics3Processor(
        look, tokenizer, image_seq_len=4, chat_template=CHAT.replace("PLACE", "<image>")
    )
    config = transformers.Idefics3Config(
        text_config=_llama(processor.tokenizer, pad_token_id=0),
        vision_config={**SIGHT, "image_size": 28, "patch_size": 7},
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=0,
    )
    return transformers.Idefics3ForConditionalGeneration(config), processor


def make_smolvlm():
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    more = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
    more += [f"<row_{i}_col_{j}>" for i in range(1, 3) for j in range(1, 3)]
    tokenizer = make_tokenizer(more=more)
    size = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}}
    processor = transformers.SmolVLMProcessor(
        SmolVLMImageProcessorPil(**size, do_image_splitting=True),
        tokenizer,
        transformers.SmolVLMVideoProcessor(**size),
        image_seq_len=4,
        chat_template=CHAT.replace("PLACE", "<image>"),
    )
    config = transformers.SmolVLMConfig(
        text_config=_llama(tokenizer, pad_token_id=0),
        vision_config={**SIGHT, "image_size": 28, "patch_size": 7},
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=0,
    )
    return transformers.SmolVLMForConditionalGeneration(config), processor


_QWEN_CHAT = FILM_CHAT.replace("PLACE", "<|vision_start|><|image_pad|><|vision_end|>")
_QWEN_CHAT = _QWEN_CHAT.replace("FILM", "<|vision_start|><|video_pad|><|vision_end|>")
_QWEN_SIZE = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}


def _qwen_tokenizer():
    return make_tokenizer(more=["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"])


def _qwen_ids(tokenizer):
    names = {
        "image": "<|image_pad|>",
        "video": "<|video_pad|>",
        "vision_start": "<|vision_start|>",
        "vision_end": "<|vision_end|>",
    }
    return {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}


def make_qwen2_5_vl():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = _qwen_tokenizer()
    processor = transformers.Qwen2_5_VLProcessor(
        Qwen2VLImageProcessorPil(size=_QWEN_SIZE, patch_size=7),
        tokenizer,
        transformers.Qwen2VLVideoProcessor(size=_QWEN_SIZE, patch_size=7),
        chat_template=_QWEN_CHAT,
    )
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            **TEXT,
            "num_key_value_heads": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": 16,
            "patch_size": 7,
            "window_size": 28,
            "fullatt_block_indexes": [1],
        },
        **_qwen_ids(tokenizer),
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config), processor


def make_qwen3_vl():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = _qwen_tokenizer()
    processor = transformers.Qwen3VLProcessor(
        Qwen2VLImageProcessorPil(size=_QWEN_SIZE, patch_size=7),
        tokenizer,
        transformers.Qwen3VLVideoProcessor(size=_QWEN_SIZE, patch_size=7),
        chat_template=_QWEN_CHAT,
    )
    config = transformers.Qwen3VLConfig(
        text_config={
            **TEXT,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": 16,
            "patch_size": 7,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        **_qwen_ids(tokenizer),
    )
    return transformers.Qwen3VLForConditionalGeneration(config), processor


def make_internvl():
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = make_tokenizer(names)
    processor = transformers.InternVLProcessor(
        GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, crop_to_patches=True, max_patches=4),
        tokenizer,
        transformers.InternVLVideoProcessor(size={"height": 28, "width": 28}),
        image_seq_length=4,
        chat_template=FILM_CHAT.replace("PLACE", "<IMG_CONTEXT>\n").replace("FILM", "<video>\n"),
    )
    config = transformers.InternVLConfig(
        vision_config={**SIGHT, "image_size": [28, 28], "patch_size": [7, 7]},
        text_config=transformers.Qwen2Config(
            **TEXT, num_key_value_heads=2, vocab_size=len(tokenizer), max_position_embeddings=512
        ),
        image_token_id=tokenizer.context_image_token_id,
        downsample_ratio=0.5,
        image_seq_length=4,
    )
    return transformers.InternVLForConditionalGeneration(config), processor


def make_llava_next_video():
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    tokenizer = make_tokenizer(more=["<image>", "<video>"])
    size = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    processor = transformers.LlavaNextVideoProcessor(
        transformers.LlavaNextVideoVideoProcessor(**size),
        LlavaNextImageProcessorPil(**size, image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]]),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=FILM_CHAT.replace("PLACE", "<image>").replace("FILM", "<video>"),
    )
    config = transformers.LlavaNextVideoConfig(
        vision_config={**_clip().to_dict(), "image_size": 56},
        text_config=_llama(tokenizer),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]],
        vision_feature_layer=-2,
    )
    return transformers.LlavaNextVideoForConditionalGeneration(config), processor


ALONE = {
    "llava": make_llava,
    "llava_next": make_llava_next,
    "gemma3": make_gemma3,
    "paligemma": make_paligemma,
    "idefics3": make_idefics3,
}
"""Families whose processors need pillow alone."""
WITH_TORCHVISION = {
    "smolvlm": make_smolvlm,
    "qwen2_5_vl": make_qwen2_5_vl,
    "qwen3_vl": make_qwen3_vl,
    "internvl": make_internvl,
    "llava_next_video": make_llava_next_video,
}
"""Families whose processors take videos too, and need torchvision for it, and SmolVLM's num2words."""


def build(make):
    """The model with random weights large enough that its answers depend on what it sees, and its processor."""
    torch.manual_seed(0)
    model, processor = make()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() >= 2:
                p.copy_(4 * p if p.any() else torch.randn_like(p) / 4)
    processor.tokenizer.chat_template = processor.chat_template
    return model.eval(), processor
