"""Answers `POST /v1/images`: a picture or a DICOM file as the model sees it, as a PNG."""

from typing import Any

from starlette.requests import Request as Http
from starlette.responses import JSONResponse

from unimed_jax.config import Config, ImageConfig
from unimed_jax.data.dicom_display import WINDOWS
from unimed_jax.data.images import check_header
from unimed_jax.errors import UserError, nearest
from unimed_jax.serve.fields import Fields
from unimed_jax.serve.limits import Limits, wrong
from unimed_jax.serve.pictures import content_of, picture_of, png_url
from unimed_jax.serve.service import Service


async def show(http: Http) -> JSONResponse:
    """Decodes one picture; nothing of it is kept."""
    service: Service = http.app.state.service
    found, ticket = await service.read(http, lambda body: shown(service.config, service.limits, body))
    ticket.leave()
    return JSONResponse(found)


def shown(config: Config, limits: Limits, body: Any) -> dict[str, Any]:
    """Makes the answer to a body; raises Refused."""
    fields = Fields(body, "the body", ("image", "window", "frame"))
    if not fields.has("image"):
        raise wrong("'image' of the body is missing; send a data URL.", "missing_field")
    content = content_of(fields.get("image"), "'image'", limits)
    chosen = {"frame": fields.whole("frame", 0, (1 << 31) - 1), "window": _window(fields)}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    picture = picture_of(content, "'image'", config, limits, **chosen)
    height, width, _ = picture.pixels.shape
    return {
        "image": png_url(picture.pixels),
        "width": width,
        "height": height,
        "frames": picture.header.frames,
        "frame": picture.header.frame,
        "windows": _presets(content) if picture.header.kind == "dicom" else [],
        "kind": picture.header.kind,
    }


def _window(fields: Fields) -> Any:
    """Reads a preset's name or [centre, width]."""
    value = fields.get("window")
    if value is None:
        return None
    if isinstance(value, str):
        if value not in WINDOWS:
            raise wrong(
                f"the window {value[:40]!r} is unknown{nearest(value[:40], WINDOWS)} Choose "
                f"from {', '.join(WINDOWS)}."
            )
        return value
    if not (isinstance(value, list) and len(value) == 2 and all(type(v) in (int, float) for v in value)):
        raise wrong(
            "'window' must be the name of a preset or [centre, width]; change it.", "invalid_type"
        )
    centre, width = value
    if not (abs(centre) <= 1e6 and 1e-6 <= width <= 1e6):
        raise wrong(
            "'window' must have a centre from -1e6 to 1e6 and a width from 1e-6 to 1e6; change it."
        )
    return float(centre), float(width)


def _presets(content: bytes) -> list[dict[str, Any]]:
    """Lists the presets that fit a DICOM file: those of CT if it is in Hounsfield units."""
    try:
        check_header(content, "it", ImageConfig(window="brain"))
    except UserError:
        return []
    return [{"name": name, "centre": c, "width": w} for name, (c, w) in WINDOWS.items()]
