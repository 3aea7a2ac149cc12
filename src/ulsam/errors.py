"""The one exception that means: the user can fix this."""


class UlsamError(ValueError):
    """Something is wrong that the caller can put right; the message is one line that says how.

    The command line prints it as ``ulsam: error: ...`` and exits with status 2; every other exception is a bug.
    """
