"""What a service takes at most."""

from dataclasses import dataclass, fields

from ulsam.base.errors import UlsamError


@dataclass(frozen=True)
class Limits:
    """What a service takes at most; what lies above is refused, as `ulsam.apps.service` says.

    Attributes:
        batch: images that the model computes at once, whichever requests they come from.
        images: in one request.
        megabytes: of one request's body, in units of 1,000,000 bytes.
        pixels: width * height of an image.
        requests: being received or answered at once.
        timeout: seconds from a request's headers to its answer.
        idle: seconds for which a connection is kept on which no whole header arrives, or no answer is taken.

    Raises:
        UlsamError: a limit is too small, or ``pixels`` above what is ever read.

    >>> Limits(batch=1)
    Traceback (most recent call last):
    ulsam.base.errors.UlsamError: the limit of batch must be 2 or more, not 1
    """

    batch: int = 32
    images: int = 32
    megabytes: int = 16
    pixels: int = 50_000_000
    requests: int = 64
    timeout: float = 30.0
    idle: int = 15

    def __post_init__(self) -> None:
        from ulsam.data.images import MAX_PIXELS  # it imports numpy, which the help of these limits does without

        for field in fields(self):
            least = {"batch": 2, "timeout": 0.1}.get(field.name, 1)
            value = getattr(self, field.name)
            if not value >= least:
                raise UlsamError(f"the limit of {field.name} must be {least} or more, not {value}")
        if self.pixels > MAX_PIXELS:
            raise UlsamError(f"the limit of pixels must be {MAX_PIXELS} or less, not {self.pixels}")

    @property
    def bytes(self) -> int:
        """Of one request's body."""
        return self.megabytes * 1_000_000
