"""Settings of codecs and error controls, to and from plain values."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any, ClassVar

from flcore.errors import InvalidInputError

__all__ = ["Settings"]


class Settings:
    """Base of the frozen dataclasses that describe a codec or an error control.

    Attributes
    ----------
    family : str
        "codec" or "feedback": the key under which `to_dict` puts the name.
    name : str
        The name of the codec or of the error control.
    """

    family: ClassVar[str]
    name: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values; `from_dict` reads them."""
        return {self.family: self.name, **asdict(self)}  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> Any:
        """Return the object that `to_dict` described.

        Raises
        ------
        InvalidInputError
            Another codec or error control, or settings it does not have.
        """
        options = dict(settings)
        if (name := options.pop(cls.family, cls.name)) != cls.name:
            raise InvalidInputError(f"settings: expected {cls.family} {cls.name!r}, got {name!r}")
        known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        if unknown := options.keys() - known:
            raise InvalidInputError(f"settings: {cls.__name__} has no {', '.join(sorted(unknown))}")
        return cls(**options)
