"""The base of every stage's settings."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticUndefined, to_jsonable_python

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

    DECIDES_NOTHING: ClassVar[frozenset[str]] = frozenset()
    """Settings that leave the result as it is: they are not on record, and may change when a run goes on."""
    ADDED_LATER: ClassVar[frozenset[str]] = frozenset()
    """Settings that are on record where they are not at their default: what was made before there were any stays what it is."""

    def recorded(self) -> dict[str, Any]:
        """The settings that an artefact's record has."""
        values = self.model_dump(mode="json", exclude=set(self.DECIDES_NOTHING))
        return {
            name: value
            for name, value in values.items()
            if name not in self.ADDED_LATER or value != self.default(name)
        }

    def differs_from(self, record: Mapping[str, Any], apart: Iterable[str] = ()) -> bool:
        """Whether an artefact with this record was made with other settings: see `differing`."""
        return bool(self.differing(record, apart))

    def differing(self, record: Mapping[str, Any], apart: Iterable[str] = ()) -> dict[str, Any]:
        """The settings that an artefact with this record was made with, where they are others; one that it lacks had its default.

        Args:
            apart: settings that may differ.
        """
        values = self.model_dump(mode="json", exclude={*self.DECIDES_NOTHING, *apart})
        made = {name: record.get(name, self.default(name)) for name in values}
        return {name: value for name, value in made.items() if value != values[name]}

    @classmethod
    def default(cls, name: str) -> Any:
        """A setting's default, as a record has it."""
        default = cls.model_fields[name].get_default(call_default_factory=True)
        return default if default is PydanticUndefined else to_jsonable_python(default)

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
