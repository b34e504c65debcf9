"""LLaVA-1.5 composed of its parts: the paper's counts, its conversation to the byte, and a projector of LLaVA's own."""

import json

import pytest
import torch
import transformers
from adapted import logits, move

from doralib import DoraConfig, adapt, load_adapter, save_adapter
from doralib.adapters.towers import choose_language_layers
from doralib.evaluation.rows import read_examples
from doralib.evaluation.task_file import load_tasks
from doralib.training.recipe_file import packaged_recipes, read_recipe

pytest.importorskip("PIL", reason="pictures are read by pillow")
from PIL import Image
from seeing_models import ALONE, build, make_parts

from doralib.checkpoints.llava import VICUNA, compose_llava
from doralib.checkpoints.merge import merge_checkpoint
from doralib.checkpoints.models import load_image_text
from doralib.data.picture_encoder import PictureEncoder
from doralib.data.picture_rows import read_picture_row
from doralib.data.pictures import Picture, measure_pictures
from doralib.errors import UsageError
from doralib.recipe import DataSettings, ModelSettings


@pytest.mark.parametrize(("method", "count"), [("dora", 342_155_264), ("lora", 340_795_392)])
def test_what_the_recipes_train_is_counted_as_in_the_paper(method, count):
    recipe = read_recipe(f"llava/llava15-7b-{method}", [])
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
        ),
        text_config=transformers.LlamaConfig(vocab_size=32064),  # LLaMA-7B's sizes are the defaults
    )
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(config)
        adapt(model, choose_language_layers(model, recipe.adapter))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_the_recipes_are_those_of_the_paper():
    scores = packaged_recipes()["llava/llava15-7b-dora"].published
    assert (scores["gqa"], scores["vizwiz"], scores["average"]) == (62.9, 52.2, 67.6)
    recipe = read_recipe("llava/llava15-7b-dora", [])
    assert (recipe.adapter.r, recipe.adapter.lora_alpha, recipe.adapter.lora_dropout) == (128, 256, 0.05)
    assert (recipe.training["learning_rate"], recipe.training["projector_learning_rate"]) == (2e-4, 2e-5)
    assert (recipe.data.max_length, recipe.data.layout, recipe.data.image_pixels) == (2048, "llava", None)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make_parts(tmp_path_factory.mktemp("parts"))


def test_a_composed_model_is_its_parts(parts, tmp_path):
    out = compose_llava(
        str(parts / "vicuna"), str(parts / "clip"), tmp_path / "llava", projector=parts / "mm_projector.bin"
    )
    model, processor = load_image_text(ModelSettings(path=str(out)))
    text = transformers.AutoModelForCausalLM.from_pretrained(parts / "vicuna")
    tower = transformers.CLIPVisionModel.from_pretrained(parts / "clip")
    projector = torch.load(parts / "mm_projector.bin", weights_only=True)
    seen = processor.image_processor(Image.new("RGB", (40, 20), (200, 30, 30)), return_tensors="pt")["pixel_values"]
    # filled up with the mean color, which is nearly 0 once it is normalized
    assert seen.shape == (1, 3, 28, 28)
    assert seen[0, :, 0].abs().max() < 0.02 < seen[0, :, 14].abs().max()
    with torch.no_grad():
        hidden = tower(seen, output_hidden_states=True).hidden_states[-2][:, 1:]
        weights = [projector[f"model.mm_projector.{name}"] for name in ("0.weight", "0.bias", "2.weight", "2.bias")]
        made = torch.nn.functional.gelu(hidden @ weights[0].T + weights[1]) @ weights[2].T + weights[3]
        place = processor.tokenizer.convert_tokens_to_ids("<image>")
        ids = torch.tensor([[7, place, place, place, place, 9, 11]])
        words = text.get_input_embeddings()(torch.tensor([[7, 9, 11]]))
        want = text(inputs_embeds=torch.cat([words[:, :1], made, words[:, 1:]], 1)).logits
        found = model(input_ids=ids, pixel_values=seen).logits
    torch.testing.assert_close(found[..., : want.shape[-1]], want, atol=1e-5, rtol=1e-4)
    assert found.shape[-1] % 64 == 0
    # without weights it is the same, and none are read
    empty = compose_llava(str(parts / "vicuna"), str(parts / "clip"), tmp_path / "empty", empty=True)
    alike = transformers.AutoConfig.from_pretrained(empty)
    assert {name for name, value in model.config.to_dict().items() if value != alike.to_dict()[name]} <= {
        "_name_or_path"
    }
    assert not list(empty.glob("*.safetensors"))
    with pytest.raises(UsageError, match="is there already"):
        compose_llava(str(parts / "vicuna"), str(parts / "clip"), out)
    torch.save({"model.mm_projector.0.weight": torch.zeros(3, 3)}, tmp_path / "other.bin")
    with pytest.raises(UsageError, match="is of other parts"):
        compose_llava(str(parts / "vicuna"), str(parts / "clip"), tmp_path / "b", projector=tmp_path / "other.bin")


def test_a_published_row_is_written_as_llava_writes_it(parts, tmp_path):
    out = compose_llava(str(parts / "vicuna"), str(parts / "clip"), tmp_path / "llava")
    _, processor = load_image_text(ModelSettings(path=str(out)))
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg")
    row = {
        "image": "a.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "A cat."},
            {"from": "human", "value": "And now?"},
            {"from": "gpt", "value": "A dog."},
        ],
    }
    settings = DataSettings(train="-", layout="messages", messages="conversations", images="image")
    encoder, read = PictureEncoder(processor), read_picture_row(row, settings, tmp_path)
    given, made = encoder.write(read)
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    assert (
        given.text == f"{system} USER: <image>\nWhat is it? ASSISTANT: A cat.</s>USER: And now? ASSISTANT: A dog.</s>"
    )
    assert [given.text[start:end] for start, end in made.learned] == [" A cat.</s>", " A dog.</s>"]
    sizes = list(measure_pictures(read.pictures).values())
    ids, labels, _ = encoder.encode(given, made, sizes)
    assert made.begins_bare  # the start token is the tokenizer's own to add
    assert len(ids) == len(labels)
    assert processor.tokenizer.decode([label for label in labels if label >= 0]) == " A cat.</s> A dog.</s>"
    assert processor.chat_template == VICUNA


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_an_adapter_of_the_language_model_alone_goes_onto_the_whole(family, tmp_path):
    whole, processor = build(ALONE[family])
    whole.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    made = {"llava": transformers.LlamaForCausalLM, "gemma3": transformers.Gemma3ForCausalLM}[family]
    text = made(whole.config.text_config).eval()
    inside = {name.replace("model.language_model.", "model."): value for name, value in whole.state_dict().items()}
    text.load_state_dict({name: value for name, value in inside.items() if name in text.state_dict()})
    move(adapt(text, DoraConfig(r=2, target_modules=("q_proj", "v_proj"))))
    save_adapter(text, tmp_path / "adapter")
    load_adapter(whole, tmp_path / "adapter")
    torch.testing.assert_close(logits(whole), logits(text))
    merge_checkpoint(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    merged = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert type(merged) is type(whole)
    torch.testing.assert_close(logits(merged), logits(text), atol=1e-5, rtol=1e-4)


def test_popes_files_are_read_where_llava_has_them(tmp_path):
    (tmp_path / "coco").mkdir()
    (tmp_path / "val2014").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "val2014" / "COCO_val2014_000000310196.jpg")
    asked = {
        "question_id": 1,
        "image": "COCO_val2014_000000310196.jpg",
        "text": "Is there a snowboard in the image?",
        "label": "yes",
    }
    for name in ("random", "popular", "adversarial"):
        (tmp_path / "coco" / f"coco_pope_{name}.json").write_text(
            json.dumps(asked) + "\n" + json.dumps({**asked, "label": "no"}) + "\n"
        )
    tasks = load_tasks([f"pope={tmp_path}"])
    assert [task.name for task in tasks] == ["pope/random", "pope/popular", "pope/adversarial"]
    first, second = read_examples(tasks[0])
    assert first.prompt == "Is there a snowboard in the image?\nAnswer the question using a single word or phrase."
    assert (first.answer, second.answer) == ("yes", "no")
    assert first.pictures == (Picture(str(tmp_path / "val2014" / "COCO_val2014_000000310196.jpg")),)
    # as POPE's own script reads them
    said = {"Yes, there is.": "yes", "No.": "no", "There is not. Yes": "no", "A snowboard": "yes", "no, it is": "no"}
    assert {text: tasks[0].predicted(text) for text in said} == said
