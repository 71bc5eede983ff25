"""Answers one question with a trained model, and draws its boxes on the image.

A box may be in the question or in the answer.

--run names the folder of a run, or one that `export --format=model` wrote. --config takes its place
if config.init names all weights (those of an original checkpoint and its base model, say).
--config.text.changed=accept answers with a tokenizer that changed since the run was trained.
"""

import argparse
import sys
from pathlib import Path

from unimed_jax.config import TASKS
from unimed_jax.errors import UserError, nearest
from unimed_jax.interruption import owner
from unimed_jax.paths import check_output_file
from unimed_jax.processes import start
from unimed_jax.verbs.options import ACCEPTING, CONFIG_HELP, changed, parser, read_config

PICTURES = (".png", ".jpg", ".jpeg", ".pdf", ".svg")


def run(arguments: list[str]) -> None:
    """Checks the question, opens the model, prints the answer and draws its box."""
    options = parser(__name__, __doc__)
    options.add_argument("--run", help="a run's folder, or that of an exported model")
    options.add_argument("--config", help=f"in place of --run: {CONFIG_HELP}")
    options.add_argument("--task", required=True, help=", ".join(TASKS))
    options.add_argument(
        "--image",
        action="append",
        default=[],
        help="PNG, JPEG, TIFF, DICOM ... (every task but qa); once for each of several",
    )
    options.add_argument(
        "--text", default="", help="the question; refer: what to find; identify: {<x1><y1><x2><y2>}"
    )
    options.add_argument(
        "--out", help="refer, identify: where to draw the box (default: in the run's folder)"
    )
    known, overrides = options.parse_known_args(arguments)
    others = [word for word in overrides if not word.startswith(ACCEPTING)]
    if (known.run is None) == (known.config is None) or (others and known.run):
        raise UserError(
            "predict takes either --run=DIR or --config=FILE with its --config.key=value; give one "
            "of them."
        )
    if known.task not in TASKS:
        raise UserError(
            f"--task={known.task} is not a task{nearest(known.task, TASKS)} Choose from "
            f"{', '.join(TASKS)}."
        )
    if known.task in ("vqa", "qa", "refer", "identify") and not known.text:
        raise UserError(f"task {known.task!r} needs --text.")
    if known.task in ("refer", "identify") and len(known.image) > 1:
        raise UserError(
            f"task {known.task!r} is about one image, not {len(known.image)}; give one --image."
        )

    config = read_config(known.config, overrides) if known.config is not None else None
    picture = _picture(known, known.run if config is None else f"runs/{config.name}")
    start()

    from unimed_jax.data.forms import valid_box
    from unimed_jax.data.images import read_image
    from unimed_jax.evaluate.report.pictures import draw_box
    from unimed_jax.predict.predictor import Predictor, Request
    from unimed_jax.runs.open import open_config, open_run, settings_of

    if known.task == "identify" and valid_box(known.text) is None:
        raise UserError(
            f"--text={known.text!r} is not a box; write {{<x1><y1><x2><y2>}} in hundredths of the "
            "image, with x1 < x2 and y1 < y2, at most 100."
        )
    images = tuple(read_image(path) for path in known.image)
    if config is None:
        own = changed(settings_of(Path(known.run)), overrides, ACCEPTING)
        run = open_run(known.run, changed=own.text.changed)
    else:
        run = open_config(config)
    for note in run.notes:
        print(f"{known.run}: {note}", file=sys.stderr)
    predictor = Predictor(run.model, run.config, run.tokenizer, run.mesh)
    request = Request(known.task, known.text, images, id="--text")
    text = ""
    for piece in predictor.stream(request):
        print(piece, end="", flush=True)
        text += piece
    print()
    box = valid_box({"refer": text, "identify": known.text}.get(known.task, ""))
    if known.task == "refer" and box is None:
        print(
            "The answer holds no valid box ({<x1><y1><x2><y2>}, x1 < x2, y1 < y2, at most 100): "
            "nothing is drawn."
        )
    if box and picture is not None:
        draw_box(picture, images[0], box, known.text if known.task == "refer" else text)
        print(f"drew {picture}")


def _picture(known: argparse.Namespace, folder: str) -> Path | None:
    """Returns where the box will be drawn, or None for a task without one.

    Refuses a place that cannot be written.

    It is called before the model is opened, which takes minutes if that is large.
    """
    if known.out is not None and Path(known.out).suffix.lower() not in PICTURES:
        raise UserError(
            f"--out={known.out} is not the name of a picture; let it end in {', '.join(PICTURES)}."
        )
    if known.task not in ("refer", "identify") or not known.image:
        return None
    if known.out is not None:
        return check_output_file(known.out, "--out")
    picture = Path(folder, f"{Path(known.image[0]).stem}_{known.task}.png")
    if trainer := owner(Path(folder)):
        raise UserError(
            f"{folder} is in use by the run of {trainer}; name another file for the picture with --out."
        )
    try:
        return check_output_file(picture, "--out")
    except UserError as error:
        if known.run is not None and not Path(folder).is_dir():
            return picture  # this is not a run, which opening it reports better
        raise UserError(
            f"{str(error).partition(';')[0]}; name another file for the picture with --out."
        ) from error
