"""Makes command-line options out of the stages' settings, so that neither is written twice."""

import functools
import inspect
import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pydantic
import typer

from halve.config import Config
from halve.errors import RecipeError
from halve.languages import language
from pipeline.console import Result
from pipeline.failures import fault_text

# What users call a setting where its name in Python is a plural.
_SHORT = {"langs": "lang", "splits": "split", "models": "model"}
_LANGUAGES = ("lang", "langs", "source_lang")

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


def speaks(name: str) -> bool:
    """Whether this process prints a command's result: of those that train together (accelerate, torchrun) one does."""
    together = int(os.environ.get("WORLD_SIZE", "1")) > 1 and name in ("teach", "tune")
    return not together or os.environ.get("RANK", "0") == "0"


def command(
    app: typer.Typer, name: str, config: type[Config] | None = None
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Registers a function as a command.

    Its parameters become options as they stand; a first parameter `config` becomes one option for each
    setting of `config`. Every command also takes --json and --debug. What it returns is printed.
    """

    def register(function: Callable[..., Result]) -> Callable[..., Result]:
        own = [p for p in inspect.signature(function).parameters.values() if p.name != "config"]
        taken = {parameter.name for parameter in own}
        fields = {
            key: field
            for key, field in (config.model_fields if config else {}).items()
            if key not in taken and _option_type(field.annotation) is not None
        }

        @functools.wraps(function)
        def run(**given: Any) -> None:
            as_json, _ = given.pop("as_json"), given.pop("debug")
            if config is not None:
                settings = {key: given.pop(key) for key in fields}
                given["config"] = settings_from(config, settings, given)
            found = function(**given)
            if speaks(name):
                found.show(as_json)

        parameters = [*own, *(_option(key, field) for key, field in fields.items())]
        parameters += [_parameter("as_json", Json, False), _parameter("debug", Debug, False)]
        parameters.sort(key=lambda p: p.default is not inspect.Parameter.empty)
        run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        )
        app.command(name)(run)
        return function

    return register


def option_name(key: str) -> str:
    """--memory-gb for memory_gb, --lang for langs."""
    return "--" + _SHORT.get(key, key).replace("_", "-")


def settings_from(config: type[Config], given: dict[str, Any], fixed: dict[str, Any]) -> Any:
    """Settings from options; those not given keep their defaults.

    Raises:
        RecipeError: values that the settings refuse, all of them named.
        InputError: an unknown language.
    """
    values: dict[str, Any] = {}
    for key, value in given.items():
        if value is None or value == []:
            continue
        values[key] = _split_commas(value) if isinstance(value, list) and key != "models" else value
        if key in _LANGUAGES:
            codes = values[key] if isinstance(values[key], list) else [values[key]]
            # Named twice is meant once.
            known = list(dict.fromkeys(language(code).code for code in codes))
            values[key] = known if isinstance(values[key], list) else known[0]
    # A setting that a command takes by itself (serve's --model) comes with the others.
    values |= {key: value for key, value in fixed.items() if key in config.model_fields}
    try:
        return config.model_validate(values)
    except pydantic.ValidationError as error:
        faults = [
            f"{option_name(str(fault['loc'][0]))}: {fault_text(fault)}"
            if fault["loc"]
            else fault_text(fault)
            for fault in error.errors(include_url=False)
        ]
        raise RecipeError("; ".join(faults), mend="see --help") from None


def _split_commas(values: list[Any]) -> list[str]:
    return [part.strip() for value in values for part in str(value).split(",") if part.strip()]


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def _option(key: str, field: Any) -> inspect.Parameter:
    name = option_name(key)
    kind = _option_type(field.annotation)
    text = " ".join((field.description or "").split())
    if kind is bool:
        name = f"{name}/--no-{name.removeprefix('--')}"
    required = field.is_required()
    default = None if required else field.get_default(call_default_factory=True)
    shown = _shown(default)
    option = typer.Option(
        name, help=text, metavar=_metavar(key, kind), show_default=shown if shown else False
    )
    if required:
        return _parameter(key, Annotated[kind, option], inspect.Parameter.empty)
    return _parameter(key, Annotated[kind | None, option], None)


def _metavar(key: str, kind: Any) -> str | None:
    if kind is bool:
        return None
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    if key in _LANGUAGES:
        return "CODE"
    return {int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT" if kind is str else "LIST")


def _shown(default: Any) -> str:
    if default is None or default == ():
        return ""
    if isinstance(default, tuple):
        return ", ".join(str(part) for part in default)
    return str(default).lower() if isinstance(default, bool) else str(default)


def _option_type(annotation: Any) -> Any:
    """The type of the option for a setting; None where it cannot be one."""
    annotation = _without_annotated(annotation)
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        kinds = [part for part in get_args(annotation) if part is not type(None)]
        return _option_type(kinds[0]) if len(kinds) == 1 else None
    if origin is tuple:
        return list[str]
    if origin is Literal:
        # Choices of numbers are checked with the settings; typer offers those of words.
        words = all(isinstance(choice, str) for choice in get_args(annotation))
        return annotation if words else int
    return annotation if annotation in (int, float, str, bool, Path) else None


def _without_annotated(annotation: Any) -> Any:
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return annotation
