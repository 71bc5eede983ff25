"""Answers one question with a trained model, and draws its boxes on the image.

A box may be in the question or in the answer.

--run names the folder of a run, or one that `export --format=model` wrote. --config takes its place
if config.init names all weights (those of an original checkpoint and its base model, say).
--decoder names a server that has the run's exported decoder (vLLM, see docs/vllm.md); images are encoded
here. --config.text.changed=accept answers with a tokenizer that changed since the run was trained.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unimed_jax.config import TASKS, DataConfig, ImageConfig
from unimed_jax.errors import UserError, nearest
from unimed_jax.interruption import owner
from unimed_jax.paths import check_output_file
from unimed_jax.processes import start
from unimed_jax.settings import checked
from unimed_jax.verbs.options import ACCEPTING, CONFIG_HELP, changed, parser, read_config

if TYPE_CHECKING:
    from unimed_jax.predict.request import Request
    from unimed_jax.runs.open import Run

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
        "--frame", help="of a film or a file of pages: a number from 0, first, middle or last"
    )
    options.add_argument("--window", help="of grey DICOM: brain, bone, lung ... or CENTRE,WIDTH")
    options.add_argument(
        "--text", default="", help="the question; refer: what to find; identify: {<x1><y1><x2><y2>}"
    )
    options.add_argument(
        "--out", help="refer, identify: where to draw the box (default: in the run's folder)"
    )
    options.add_argument("--decoder", metavar="URL", help="up to and with /v1: who decodes the answer")
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

    from unimed_jax.data.box_text import valid_box
    from unimed_jax.data.forms import is_cut
    from unimed_jax.data.images import read_image
    from unimed_jax.evaluate.report.pictures import draw_box
    from unimed_jax.predict.request import Request
    from unimed_jax.runs.open import open_config, open_run, settings_of

    if known.task == "identify" and valid_box(known.text) is None:
        raise UserError(
            f"--text={known.text!r} is not a box; write {{<x1><y1><x2><y2>}} in hundredths of the "
            "image, with x1 < x2 and y1 < y2, at most 100."
        )
    own = changed(settings_of(Path(known.run)), overrides, ACCEPTING) if config is None else config
    if is_cut(known.text, bool(known.image), known.task, own.text):
        raise UserError(
            f"--text has more than the first {own.text.max_words} words of a question that this model "
            "reads (config.text.max_words); shorten it."
        )
    view = _view(known, own.data)
    images = tuple(read_image(path, view) for path in known.image)
    run = open_config(own) if config else open_run(known.run, changed=own.text.changed)
    for note in run.notes:
        print(f"{known.run}: {note}", file=sys.stderr)
    request = Request(known.task, known.text, images, id="--text")
    text = ""
    for piece in _answer(run, request, known.decoder):
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


def _answer(run: "Run", request: "Request", decoder: str | None) -> Iterable[str]:
    """Yields the answer in pieces, or whole where another server decodes it."""
    from unimed_jax.predict.predictor import Predictor
    from unimed_jax.predict.remote import RemoteDecoder

    parts = run.model, run.config, run.tokenizer
    if decoder is None:
        return Predictor(*parts, run.mesh).stream(request)
    return RemoteDecoder(*parts, decoder, run.mesh).answers([request])


def _view(known: argparse.Namespace, data: DataConfig) -> ImageConfig:
    """Returns how images are read: as those of the run's sources, but for --frame and --window.

    Where the sources differ, the default holds, which is said.
    """
    view = data.common_image
    if view is None:
        view = ImageConfig()
        if known.image and not (known.frame or known.window):
            print("The run's sources read images by different settings, so the default ones hold; "
                  "give --frame or --window for others.", file=sys.stderr)  # fmt: skip
    if known.frame is not None:
        frame = int(known.frame) if known.frame.isdecimal() else known.frame
        view = dataclasses.replace(view, frame=checked(ImageConfig, "frame", frame, "--frame"))
    if known.window is not None:
        try:
            window: Any = tuple(float(word) for word in known.window.split(","))
        except ValueError:
            window = known.window
        view = dataclasses.replace(view, window=checked(ImageConfig, "window", window, "--window"))
    return view


def _picture(known: argparse.Namespace, folder: str) -> Path | None:
    """Returns where the box will be drawn, or None for a task without one.

    Refuses a place that cannot be written, and one for a task that draws nothing.

    It is called before the model is opened, which takes minutes if that is large.
    """
    boxes = known.task in ("refer", "identify")
    if known.out is not None and not boxes:
        raise UserError(f"--out draws boxes, which task {known.task!r} has none of; leave it out.")
    if known.out is not None and Path(known.out).suffix.lower() not in PICTURES:
        raise UserError(
            f"--out={known.out} is not the name of a picture; let it end in {', '.join(PICTURES)}."
        )
    if not boxes or not known.image:
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
