"""LLaVA's folder `eval` in small: the files of its seven evaluations as it publishes them, each with a picture."""

import base64
import json

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
PEOPLE = ["nokia"] * 4 + ["Nokia phone"] * 3 + ["the nokia", "phone", "cell phone"]
MMBENCH = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category"]
MMBENCH += ["comment", "split"]


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def draw(path, color):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 8), color).save(path)
    return path


def ask(number, image, text, group="default"):
    return {"question_id": number, "image": image, "text": f"{text}\n{SHORT}", "category": group}


def make_evaluations(root, pope=None):
    """Write the folder; `pope` has rows of POPE's own files by the way that their objects were chosen."""
    make_gqa(root / "gqa")
    make_textvqa(root / "textvqa")
    make_pope(root / "pope", pope)
    make_sqa(root / "scienceqa")
    make_vqav2(root / "vqav2")
    make_vizwiz(root / "vizwiz")
    make_mmbench(root / "mmbench")
    return root


def make_gqa(gqa):
    write_lines(
        gqa / "llava_gqa_testdev_balanced.jsonl",
        [
            ask("201307251", "n1.jpg", "Is it overcast?"),
            ask("201640614", "n1.jpg", "Who is wearing the dress?"),
            ask("202225914", "n1.jpg", "What is it?"),
        ],
    )
    truth = {
        "201307251": {"answer": "no", "types": {"structural": "verify"}},
        "201640614": {"answer": "woman", "types": {"structural": "query"}},
        "202225914": {"answer": "dress", "types": {"structural": "query"}},
    }
    (gqa / "data").mkdir()
    (gqa / "data" / "testdev_balanced_questions.json").write_text(json.dumps(truth))
    draw(gqa / "data" / "images" / "n1.jpg", "red")


def make_textvqa(text):
    asked = [
        f"what is the brand of this phone?\nReference OCR token: NOKIA, 12\n{SHORT}",
        f"What color is it?\n{SHORT}",
    ]
    row = {"question_id": "003a", "image": "003a.jpg", "category": "default"}
    write_lines(text / "llava_textvqa_val_v051_ocr.jsonl", [{**row, "text": each} for each in asked])
    people = {"what is the brand of this phone?": PEOPLE, "what color is it?": ["it's red."] * 10}
    told = [{"image_id": "003a", "question": each.capitalize(), "answers": said} for each, said in people.items()]
    (text / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": told}))
    draw(text / "train_images" / "003a.jpg", "blue")


def make_pope(pope, rows):
    rows = rows or {
        name: [
            {"question_id": i, "image": "p.jpg", "text": f"Is there a {name} {thing} in the image?", "label": label}
            for i, (thing, label) in enumerate([("cat", "yes"), ("dog", "no"), ("car", "yes"), ("cup", "no")], 1)
        ]
        for name in ("adversarial", "random", "popular")
    }
    lines = []
    for begin, (name, each) in enumerate(rows.items()):
        write_lines(pope / "coco" / f"coco_pope_{name}.json", each)
        # LLaVA's file has a slip where POPE's has none
        slip = lambda row: row["text"].replace("cup in the image", "cup in the imange")
        lines += [ask(begin * 10**7 + row["question_id"], row["image"], slip(row), name) for row in each]
    write_lines(pope / "llava_pope_test.jsonl", lines)
    draw(pope / "val2014" / "p.jpg", "green")


def make_sqa(sqa):
    value = "Context: N/A\nQuestion: Which is a state?\nOptions: (A) Ohio (B) Paris"
    talks = [
        {"id": "4", "image": "4/image.png", "conversations": [{"from": "human", "value": f"{value}\n<image>"}]},
        {"id": "5", "conversations": [{"from": "human", "value": value}]},
        {
            "id": "6",
            "image": "4/image.png",
            "conversations": [{"from": "human", "value": f"{value} (C) Rome\n<image>"}],
        },
    ]
    known = {"4": (["Ohio", "Paris"], 0), "5": (["Ohio", "Paris"], 1), "6": (["Ohio", "Paris", "Rome"], 2)}
    problems = {name: {"choices": choices, "answer": answer} for name, (choices, answer) in known.items()}
    draw(sqa / "images" / "test" / "4" / "image.png", "white")
    (sqa / "llava_test_CQM-A.json").write_text(json.dumps(talks))
    (sqa / "problems.json").write_text(json.dumps(problems))
    (sqa / "pid_splits.json").write_text(json.dumps({"test": list(problems)}))


def make_vqav2(vqa):
    asked = [ask(262144000 + i, "COCO_test2015_1.jpg", f"What is thing {i}?") for i in (5, 6, 7)]
    write_lines(vqa / "llava_vqav2_mscoco_test2015.jsonl", asked)
    write_lines(vqa / "llava_vqav2_mscoco_test-dev2015.jsonl", asked[:2])
    draw(vqa / "test2015" / "COCO_test2015_1.jpg", "black")


def make_vizwiz(vizwiz):
    name = "VizWiz_test_00000000.jpg"
    unsure = "When the provided information is insufficient, respond with 'Unanswerable'."
    write_lines(vizwiz / "llava_test.jsonl", [ask(name, name, f"What is this?\n{unsure}")])
    draw(vizwiz / "test" / name, "gray")


def make_mmbench(mmbench):
    coded = base64.b64encode(draw(mmbench / "picture.png", "red").read_bytes()).decode()
    cells = [
        [
            241,
            'Which is "heavier"?',
            "Some prior\nknowledge",
            "a cat",
            "a dog",
            "",
            "",
            "A",
            "p",
            coded,
            "s",
            "l",
            "c",
            "dev",
        ],
        [252, "What is it?", "", "one", "two", "three", "four", "D", "p", coded, "s", "l", "", "dev"],
    ]
    quote = lambda cell: '"' + str(cell).replace('"', '""') + '"' if set('"\n') & set(str(cell)) else str(cell)
    table = "".join("\t".join(map(quote, row)) + "\n" for row in [MMBENCH, *cells])
    (mmbench / "mmbench_dev_20230712.tsv").write_text(table)
