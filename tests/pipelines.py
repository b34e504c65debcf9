"""Tiny diffusion pipelines with random weights, one of each family, made from their configurations."""

import json

import torch

WIDTH = 16
"""Of a text encoder."""


def make_tokenizer(folder):
    """A CLIP tokenizer that knows letters alone."""
    from transformers import CLIPTokenizer

    letters = [chr(i) for i in range(33, 127)]
    tokens = [*letters, *(f"{each}</w>" for each in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=16)


def make_words():
    """A tokenizer of whole words, where a pipeline has T5."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "cat": 4, "dog": 5}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=16
    )


def make_clip(vocabulary, *, projected=False):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=WIDTH,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def make_vae(channels=4, shift=None):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        shift_factor=shift,
    ).eval()


def make_unet(**more):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **more,
    ).eval()


def make_pipeline(family, folder, prediction="epsilon", seed=0):
    """Write a pipeline of the family into the folder, and return it."""
    import diffusers

    torch.manual_seed(seed)
    clip = make_tokenizer(folder.parent / "clip")
    first = make_clip(len(clip))
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    if family == "sd15":
        pipeline = diffusers.StableDiffusionPipeline(
            vae=make_vae(),
            text_encoder=first,
            tokenizer=clip,
            unet=make_unet(cross_attention_dim=WIDTH),
            scheduler=diffusers.DDIMScheduler(**noise, prediction_type=prediction, clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    elif family == "sdxl":
        pipeline = diffusers.StableDiffusionXLPipeline(
            vae=make_vae(),
            text_encoder=first,
            text_encoder_2=make_clip(len(clip), projected=True),
            tokenizer=clip,
            tokenizer_2=clip,
            unet=make_unet(
                cross_attention_dim=2 * WIDTH,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + WIDTH,
                transformer_layers_per_block=(1, 2),
                use_linear_projection=True,
            ),
            scheduler=diffusers.EulerDiscreteScheduler(**noise, prediction_type=prediction),
            add_watermarker=False,
        )
    elif family == "sd3":
        pipeline = diffusers.StableDiffusion3Pipeline(
            transformer=diffusers.SD3Transformer2DModel(
                sample_size=8,
                patch_size=2,
                in_channels=16,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=2 * WIDTH,
                caption_projection_dim=16,
                pooled_projection_dim=2 * WIDTH,
                out_channels=16,
                pos_embed_max_size=16,
            ).eval(),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=make_vae(16, 0.1),
            text_encoder=make_clip(len(clip), projected=True),
            tokenizer=clip,
            text_encoder_2=make_clip(len(clip), projected=True),
            tokenizer_2=clip,
            text_encoder_3=None,
            tokenizer_3=None,
        )
    else:
        from transformers import T5Config, T5EncoderModel

        t5 = T5Config(vocab_size=6, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        pipeline = diffusers.FluxPipeline(
            transformer=diffusers.FluxTransformer2DModel(
                patch_size=1,
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                # as wide as a block of bitsandbytes: its kernel for AVX-512 errs at others
                num_attention_heads=4,
                joint_attention_dim=WIDTH,
                pooled_projection_dim=WIDTH,
                axes_dims_rope=(4, 4, 8),
                guidance_embeds=True,
            ).eval(),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
            vae=make_vae(4, 0.1),
            text_encoder=first,
            tokenizer=clip,
            text_encoder_2=T5EncoderModel(t5).eval(),
            tokenizer_2=make_words(),
        )
    pipeline.save_pretrained(folder)
    return pipeline


def make_pictures(folder, count=4, size=(20, 16), captions=True):
    """Colored squares, each with a caption beside it."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", size, (40 * i, 255 - 40 * i, 90)).save(folder / f"{i}.png")
        if captions:
            (folder / f"{i}.txt").write_text(f"a {'cat' if i % 2 else 'dog'} {i}")
    return folder
