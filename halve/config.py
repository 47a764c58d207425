"""The base of every stage's settings."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Frozen settings that refuse unknown keys; field docstrings are the help text."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=()
    )
