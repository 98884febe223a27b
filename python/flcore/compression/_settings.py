"""Settings of codecs and error controls, to and from plain values."""

from __future__ import annotations

import ast
from collections.abc import Collection, Mapping
from dataclasses import asdict, fields
from typing import Any, ClassVar

from flcore.errors import InvalidInputError

__all__ = [
    "Settings",
    "as_text",
    "check_choice",
    "check_flag",
    "check_integer",
    "from_text",
    "read_value",
]


def check_choice(name: str, value: Any, known: Collection[Any]) -> None:
    """Raise `InvalidInputError` unless `value` is one of the known ones; True is not 1 here."""
    if isinstance(value, bool) or value not in known:
        words = ", ".join(str(x) for x in known)
        raise InvalidInputError(f"{name}: expected one of {words}, got {value!r}")


def check_integer(name: str, value: Any, least: int, most: int) -> None:
    """Raise `InvalidInputError` unless `value` is an integer from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise InvalidInputError(
            f"{name}: expected an integer from {least} to {most}, got {value!r}"
        )


def check_flag(name: str, value: Any) -> None:
    """Raise `InvalidInputError` unless `value` is True or False."""
    if not isinstance(value, bool):
        raise InvalidInputError(f"{name}: expected True or False, got {value!r}")


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

    def to_text(self, leave_out: Collection[str] = ()) -> str:
        """Return the settings as one word, ``name:key=value,...``; `from_text` reads it."""
        return as_text(self.name, self, leave_out)


def as_text(name: str, described: Any, leave_out: Collection[str] = ()) -> str:
    """Return the fields of a dataclass that are not at their defaults, ``name:key=value,...``."""
    changed = [
        f"{field.name}={value}"
        for field in fields(described)
        if (value := getattr(described, field.name)) != field.default
        and field.name not in leave_out
    ]
    return ":".join([name, ",".join(changed)] if changed else [name])


def from_text(classes: Mapping[str, type], text: str, **more: Any) -> Any:
    """Return the codec or the error control that a word describes.

    Parameters
    ----------
    classes : mapping
        Classes by name: `flcore.compression.CODECS` or `FEEDBACKS`.
    text : str
        ``name`` or ``name:key=value,key=value``, e.g. ``topk:ratio=0.01,values=bfloat16``.
    more
        Settings that `text` need not repeat; those that are None, that the class does not have or
        that `text` gives are left out.

    Raises
    ------
    InvalidInputError
        There is no such name, or no such setting, or a value that cannot be used.

    Examples
    --------
    >>> from flcore.compression import CODECS
    >>> codec = from_text(CODECS, "topk:ratio=0.01,values=bfloat16")
    >>> codec.ratio, codec.values
    (0.01, 'bfloat16')
    """
    name, _, rest = text.partition(":")
    if name not in classes:
        raise InvalidInputError(f"expected one of {', '.join(sorted(classes))}, got {name!r}")
    kind = classes[name]
    known = {field.name for field in fields(kind)}
    options = {key: value for key, value in more.items() if key in known and value is not None}
    for part in rest.split(",") if rest else []:
        key, equals, value = (word.strip() for word in part.partition("="))
        if not equals or key not in known:
            raise InvalidInputError(
                f"{name}: expected settings like key=value with a key of "
                f"{', '.join(sorted(known)) or 'none: it has no settings'}; got {part!r}"
            )
        options[key] = read_value(value)
    return kind(**options)


def read_value(text: str) -> Any:
    """Read a number, True, False or None; anything else is a word."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
