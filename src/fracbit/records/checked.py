"""`Checked`: a frozen record that raises `RecipeError` for faults: what was got, what is allowed, what to write. Torch-free.

pydantic finds the faults; here they get their words. A record that is read from a file (records/recipe.py) says its faults in
the same words, with the line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from fracbit.errors import RecipeError, near_matches

Keys = tuple[int | str, ...]
"""The keys and positions that lead to a value: `("overrides", 0, "scheme")`."""
LONGEST = 60  # characters of a value in a message
LARGEST = 2**62


class Checked(BaseModel):
    """The base of the records that users write: frozen, without unknown keys, and with faults that say what to do.

    `called`: the record in a message, such as "a recipe"; `remedies`: for a field without a default, what to do without it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    called: ClassVar[str] = "a record"
    remedies: ClassVar[Mapping[str, str]] = {}

    @field_validator("*", mode="after")
    @classmethod
    def _in_bounds(cls, value: Any) -> Any:
        """Torch and numpy take numbers of 64 bits; a sum of two must be one too."""
        if isinstance(value, int) and abs(value) >= LARGEST:
            raise PydanticCustomError("too_large", "Input should be less than 2^62")
        return value

    def __init__(self, /, **data: Any) -> None:
        """Raises `RecipeError` for a field that is missing, unknown or of another kind."""
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise RecipeError(explained(error, type(self))[1]) from None

    # As pydantic marks its own: a record inside another one is checked with it, so that the keys from the outermost are known.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


def explained(error: ValidationError, record: type[Checked]) -> tuple[Keys, str]:
    """The keys of the first fault of a `record`, and what to say of it; an unknown key comes before anything else."""
    faults = error.errors()
    fault = next((each for each in faults if each["type"] == "extra_forbidden"), faults[0])
    keys = fault["loc"]
    name, last = ".".join(map(str, keys)), str(keys[-1]) if keys else ""
    holder = _holder(record, keys)
    if fault["type"] == "extra_forbidden":
        return keys, f"{record.called} has no key {name!r}; {near_matches(last, holder.model_fields)}"
    if fault["type"] == "missing":
        return keys, f"{name} is missing; {holder.remedies.get(last, 'give it a value')}"
    return (
        keys,
        f"{name} is {_shown(fault['input'])}; {_allowed(fault['type'], fault['msg'], fault['input'])}",
    )


def _allowed(kind: str, message: str, got: object) -> str:
    """What a field takes, from pydantic's own message, which is plain but for the types of Python."""
    if kind == "tuple_type":
        return (
            f"it should be a list, such as [{_shown(got)}]" if isinstance(got, str) else "it should be a list"
        )
    if kind == "dataclass_type":
        return "it should be a scheme in one word, such as nf4/64, or a table of its fields"
    if kind == "literal_error":
        return near_matches(str(got), re.findall(r"'([^']+)'", message))
    if kind == "model_type":
        return "it should be a table of settings"
    return message.replace("Input should", "it should", 1)


def _holder(record: type[Checked], keys: Keys) -> type[Checked]:
    """The record that has the last of the keys: `Calibration` for `("calibration", "samples")`."""
    for key in keys[:-1]:
        field = record.model_fields.get(str(key))
        record = record if field is None else _record_in(field.annotation) or record
    return record


def _record_in(annotation: Any) -> type[Checked] | None:
    """The record that an annotation speaks of: `Calibration` for `Calibration | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Checked):
        return annotation
    return next((found for each in get_args(annotation) if (found := _record_in(each)) is not None), None)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
