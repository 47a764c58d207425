"""The base of every stage's settings."""

from collections.abc import Mapping
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""What every generator of random numbers takes."""


class Config(BaseModel):
    """Frozen settings that refuse unknown keys, infinity and NaN; field docstrings are the help text."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    @model_validator(mode="before")
    @classmethod
    def _one_is_a_list_of_one(cls, values: Any) -> Any:
        """`langs: de` for `langs: [de]`, as the command line's options take it."""
        if not isinstance(values, Mapping):
            return values
        lists = {
            name
            for name, one in cls.model_fields.items()
            if tuple in (get_origin(one.annotation), *map(get_origin, get_args(one.annotation)))
        }
        return {
            name: (value,) if name in lists and isinstance(value, str) else value
            for name, value in values.items()
        }
