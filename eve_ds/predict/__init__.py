"""Use a trained model: answer, match, judge, find images. From Python by the class ``EVE``, in a terminal by
``python -m eve_ds.predict COMMAND``. Needs no DeepSpeed.

    from eve_ds.predict import EVE

    eve = EVE.from_pretrained("runs/vqa")
    print(eve.answer("photo.jpg", "what color is the square?")[0].answer)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eve_ds.predict.eve import EVE

__all__ = ["EVE"]


def __getattr__(name: str) -> Any:
    # Not at import: torch takes seconds, for which neither --help nor the message about a bad option should wait.
    if name == "EVE":
        from eve_ds.predict.eve import EVE

        return EVE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
