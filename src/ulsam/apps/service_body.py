"""The images in a request's body, in memory alone."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass

from fastapi import HTTPException, Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from ulsam.apps.service_limits import Limits

FORM = "multipart/form-data"
TAKEN = ("image/*", "application/octet-stream", FORM)


@dataclass(frozen=True)
class UploadedFile:
    """An image file as it came: its name, if one came with it, and its bytes."""

    name: str | None
    content: bytes


class _InMemory(MultiPartParser):
    """Starlette's parser, but large files stay in memory too: their sum is limited."""

    spool_max_size = 0  # of tempfile.SpooledTemporaryFile: never written to a disk


async def images_sent(request: Request, limits: Limits) -> list[UploadedFile]:
    """The image files in a request's body, in their order.

    Raises:
        HTTPException: 413 for more bytes or images than ``limits`` allow, 415 for another kind of body, 422 for a
            form that is broken or holds no file.
        ClientDisconnect: the client went away.
    """
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not (media.startswith("image/") or media in TAKEN):
        raise HTTPException(415, f"Content-Type must be one of {', '.join(TAKEN)}, not {media or 'left out'}")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise HTTPException(415, "Content-Encoding must be left out: images are compressed in themselves")
    body = _limited(request, limits)
    if media != FORM:
        return [UploadedFile(None, b"".join([chunk async for chunk in body]))]
    try:
        form = await _InMemory(
            request.headers, body, max_files=limits.images, max_fields=limits.images, max_part_size=limits.bytes
        ).parse()
    except MultiPartException as error:
        status = 413 if error.message.startswith("Too many") else 422
        raise HTTPException(status, f"no form that can be read: {error.message}") from error
    except UnicodeError as error:  # a charset that is none
        raise HTTPException(422, "no form that can be read: its charset") from error
    files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
    if not files:
        raise HTTPException(422, "no file in the form")
    sent = [UploadedFile(_writable(file.filename), await file.read()) for file in files]
    await form.close()
    return sent


async def _limited(request: Request, limits: Limits) -> AsyncGenerator[bytes, None]:
    """The body's pieces; raises when the announced length, or what has come, is too much."""
    announced = request.headers.get("content-length", "0")
    came = int(announced) if announced.isdecimal() else 0
    if came <= limits.bytes:
        came = 0
        async for chunk in request.stream():
            came += len(chunk)
            if came > limits.bytes:
                break
            yield chunk
    if came > limits.bytes:
        raise HTTPException(413, f"the body must be {limits.bytes} bytes or less")


def _writable(name: str | None) -> str | None:
    """``name`` with ? for halves of characters, which JSON in UTF-8 cannot hold."""
    return None if name is None else name.encode(errors="replace").decode()
