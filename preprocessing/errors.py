"""The error of a user's bad input. A leaf that anyone may import."""


class DataError(ValueError):
    """Bad input. `str(error)` is one line that names the file, row or option at fault and says how to fix it."""
