"""Answers one question with a trained model; a box in the question or the answer is drawn on the image.

--run names the folder of a run, or one that `export --format=model` wrote. --config takes its place if config.init
names all weights (those of an original checkpoint and its base model, say).
"""

from pathlib import Path

from unimed_jax.config import TASKS
from unimed_jax.errors import UserError, nearest
from unimed_jax.verbs.options import CONFIG_HELP, parser, read_config


def run(arguments: list[str]) -> None:
    """Checks the question, opens the model, prints the answer and draws its box."""
    options = parser(__name__, __doc__)
    options.add_argument("--run", help="a run's folder, or that of an exported model")
    options.add_argument("--config", help=f"in place of --run: {CONFIG_HELP}")
    options.add_argument("--task", required=True, help=", ".join(TASKS))
    options.add_argument("--image", help="PNG, JPEG, TIFF, DICOM ... (every task but qa)")
    options.add_argument("--text", default="", help="the question; refer: what to find; identify: {<x1><y1><x2><y2>}")
    options.add_argument("--out", help="refer, identify: where to draw the box (default: in the run's folder)")
    known, overrides = options.parse_known_args(arguments)
    if (known.run is None) == (known.config is None) or (overrides and known.run):
        raise UserError(
            "predict takes either --run=DIR or --config=FILE with its --config.key=value; give one of them."
        )
    if known.task not in TASKS:
        raise UserError(
            f"--task={known.task} is not a task{nearest(known.task, TASKS)} Choose from {', '.join(TASKS)}."
        )
    if known.task in ("vqa", "qa", "refer", "identify") and not known.text:
        raise UserError(f"task {known.task!r} needs --text.")

    from unimed_jax.data.forms import text_to_box
    from unimed_jax.data.images import read_image
    from unimed_jax.evaluate.report.pictures import draw_box
    from unimed_jax.predict.predictor import Predictor, Request
    from unimed_jax.runs.open import open_config, open_run

    if known.task == "identify" and text_to_box(known.text) is None:
        raise UserError(f"--text={known.text!r} is not a box; write {{<x1><y1><x2><y2>}} in hundredths of the image.")
    image = read_image(known.image) if known.image else None
    run = open_run(known.run) if known.run else open_config(read_config(known.config, overrides))
    predictor = Predictor(run.model, run.config, run.tokenizer, run.mesh)
    request = Request(known.task, known.text, () if image is None else (image,), id="--text")
    text = ""
    for piece in predictor.stream(request):
        print(piece, end="", flush=True)
        text += piece
    print()
    box = text_to_box({"refer": text, "identify": known.text}.get(known.task, ""))
    if box and image is not None:
        out = Path(known.out or run.folder / f"{Path(known.image).stem}_{known.task}.png")
        draw_box(out, image, box, known.text if known.task == "refer" else text)
        print(f"drew {out}")
