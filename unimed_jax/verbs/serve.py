"""Serves a run or an exported model: a page, an API in OpenAI's form and one of our own.

It listens on this machine alone unless --host says otherwise, opens nothing else, and keeps nothing of
what it is asked (docs/serving.md). A token that clients must send is read from the environment
variable UNIMED_SERVE_TOKEN or from a file (--token-file), so that no list of processes shows it.
SIGTERM lets those that wait have their answers.
"""

import importlib.util
import os
import re
from pathlib import Path

from unimed_jax.errors import UserError
from unimed_jax.processes import start
from unimed_jax.verbs.options import ACCEPTING, changed, parser

TOKEN = "UNIMED_SERVE_TOKEN"
LEAST_TOKEN = 16  # letters


def run(arguments: list[str]) -> None:
    """Opens the model, says where it listens, and answers until a signal comes."""
    options = parser(__name__, __doc__)
    options.add_argument("--run", required=True, help="a run's folder, or that of an exported model")
    options.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 for all machines (default: %(default)s)"
    )
    options.add_argument(
        "--port", type=int, default=8000, help="0: any that is free (default: %(default)s)"
    )
    options.add_argument(
        "--origin",
        action="append",
        default=[],
        help="of the page behind a proxy, such as https://unimed.hospital; may be repeated",
    )
    options.add_argument("--name", help="of the model, for clients (default: that of the folder)")
    options.add_argument("--token-file", help=f"file with the token that clients send (or in {TOKEN})")
    options.add_argument(
        "--queue", type=int, default=64, help="requests that may wait (default: %(default)s)"
    )
    options.add_argument(
        "--slots", type=int, help="answers made at once (default: config.evaluate.batch)"
    )
    options.add_argument(
        "--max-tokens", type=int, help="of an answer (default: config.evaluate.max_new_tokens)"
    )
    options.add_argument(
        "--seconds", type=float, default=120.0, help="that an answer may take (default: %(default)g)"
    )
    options.add_argument(
        "--max-mib", type=int, default=32, help="of a request's body (default: %(default)s)"
    )
    options.add_argument(
        "--max-pixels", type=int, default=1 << 25, help="of an image (default: %(default)s)"
    )
    options.add_argument("--max-images", type=int, default=4, help="of a request (default: %(default)s)")
    known, overrides = options.parse_known_args(arguments)
    for name, least, most in (
        ("port", 0, 65535),
        ("queue", 1, 100_000),
        ("slots", 1, 4096),
        ("max_tokens", 1, 65536),
        ("seconds", 1, 86400),
        ("max_mib", 1, 1024),
        ("max_pixels", 1, 1 << 26),
        ("max_images", 1, 64),
    ):
        value = getattr(known, name)
        if value is not None and not least <= value <= most:
            raise UserError(f"--{name.replace('_', '-')}={value} must lie from {least} to {most}.")
    for origin in known.origin:
        if not re.fullmatch(r"https?://([a-z0-9.-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?", origin):
            raise UserError(
                f"--origin={origin} is not what a browser sends; write it as https://unimed.hospital, "
                "in small letters and without a path."
            )
    for word in overrides:
        if not word.startswith(ACCEPTING):
            kept = f" (a token goes into {TOKEN} or --token-file)" if word.startswith("--token") else ""
            raise UserError(f"argument {word.partition('=')[0]!r} is unknown{kept}; see --help.")
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"serve needs {' and '.join(missing)}; run pip install 'unimed_jax[serve]'.")
    token = _token(known.token_file)
    start()

    import jax

    from unimed_jax.interruption import Stoppable, Stopped
    from unimed_jax.runs.open import open_run, settings_of
    from unimed_jax.serve.app import application, names_of
    from unimed_jax.serve.limits import Limits
    from unimed_jax.serve.server import listening, server_of, stopped_by_signal
    from unimed_jax.serve.service import Service

    if jax.process_count() > 1:
        raise UserError("serve runs in one process; start it on one machine.")
    config = changed(settings_of(Path(known.run)), overrides, ACCEPTING)
    limits = Limits(
        max_tokens=known.max_tokens or config.evaluate.max_new_tokens,
        queue=known.queue,
        seconds=known.seconds,
        drain_seconds=min(known.seconds, 600),
        bytes=known.max_mib << 20,
        pixels=known.max_pixels,
        images=known.max_images,
    )
    try:
        place = listening(known.host, known.port)
    except (OSError, UnicodeError) as error:  # the latter for what no name can be
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"--host={known.host} --port={known.port}: this process cannot listen there ({reason}); "
            "choose another."
        ) from error
    opened = open_run(known.run, changed=config.text.changed)
    name = known.name or Path(known.run).resolve().name
    service = Service(opened, name, limits, known.slots)
    host, port = place.getsockname()[:2]
    shown, names = f"[{host}]" if ":" in host else host, names_of(known.host, host)
    print(f"serving {name} at http://{shown}:{port} (Ctrl-C ends it)", flush=True)
    if not names and not token:
        print(f"Every machine that reaches this address may ask: set {TOKEN} for a token.", flush=True)
    stops = stopped_by_signal()
    server_of(application(service, names, token, known.origin), service.limits, stops).run([place])
    if service.failed:
        raise UserError(f"{known.run}: its first answer could not be made: {service.failed}")
    if Stoppable.current is not None and Stoppable.current.number is not None:
        answers = sum(service.counts.answers.values())
        raise Stopped(Stoppable.current.number, f", after {answers} answers", "serves again")


def _token(file: str | None) -> str:
    """Reads the token; raises UserError for one that is too short to keep anybody out."""
    token, where = os.environ.get(TOKEN, ""), TOKEN
    if file is not None:
        from unimed_jax.parsing import read_text

        if token:
            raise UserError(f"both {TOKEN} and --token-file give a token; leave one of them out.")
        token, where = read_text(file, "name another file").strip(), f"--token-file={file}"
        if not token:
            raise UserError(f"{where} is empty; write a token into it.")
    if token and (len(token) < LEAST_TOKEN or not token.isascii() or any(c.isspace() for c in token)):
        raise UserError(
            f"{where} must be at least {LEAST_TOKEN} letters without blanks (openssl rand "
            "-hex 32 makes one)."
        )
    return token
