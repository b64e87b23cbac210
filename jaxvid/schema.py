"""The form of values that come from elsewhere: JSON, and the fields of a config.

A form is a type, a `Whole`, a `Real`, a `Choice`, [form of each item], or {key: form}. A key that
ends with ? may be absent, and the key OPEN lets a mapping have others. A float may be written
without a fraction.
"""

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxvid.errors import UserError, shown

OPEN = "..."
MAX_FLOAT = (2 - 2**-23) * 2.0**127  # of float32, in which all is computed


class Whole(NamedTuple):
    """Whole numbers from `low` to `high`."""

    low: int = 0
    high: int = 2**53


class Real(NamedTuple):
    """Numbers from `low` to `high`."""

    low: float
    high: float


class Choice(tuple):
    """One of some values."""

    def __new__(cls, *values):
        return super().__new__(cls, values)


def check(field: str, value, form) -> None:
    """Raise UserError, naming the part of `field` that differs, unless `value` has the form."""
    if isinstance(form, dict):
        _check_mapping(field, value, form)
    elif isinstance(form, list):
        _require(isinstance(value, list | tuple), field, value, "a list")
        for index, item in enumerate(value):
            check(f"{field}.{index}", item, form[0])
    elif isinstance(form, Choice):
        _require(value in list(form), field, value, f"one of {', '.join(map(str, form))}")
    elif isinstance(form, Real):
        is_real = _is(value, float) and form.low <= value <= form.high
        _require(is_real, field, value, f"a number of {form.low} to {form.high}")
    elif isinstance(form, Whole):
        is_whole = _is(value, int) and form.low <= value <= form.high
        _require(is_whole, field, value, f"a whole number of {form.low} to {form.high}")
    else:
        _require(_is(value, form), field, value, f"of type {_name(form)}")


def build(make: Callable, options: Mapping[str, Any], **others):
    """make(**options, **others), with options that have the names and types of its signature.

    Parameters without an annotation have the type of their default, or any. Raises UserError.
    """
    parameters = inspect.signature(make).parameters
    for name, value in options.items():
        if name not in parameters or name in others:
            raise UserError(f"{name}: no such field here; leave it out")
        parameter = parameters[name]
        form = parameter.annotation
        if form is parameter.empty:
            form = type(parameter.default) if parameter.default not in (None, form) else Any
        _require(_is(value, form), name, value, f"of type {_name(form)}")
    for name, parameter in parameters.items():
        is_needed = parameter.default is parameter.empty and parameter.kind != parameter.VAR_KEYWORD
        if is_needed and name not in options and name not in others:
            raise UserError(f"{name}: missing; add it")
    return make(**options, **others)


def section(field: str, value) -> dict:
    """A section of a config as a dict. Raises UserError for anything else."""
    _require(_is(value, Mapping), field, value, "a section of fields")
    return dict(value)


def _check_mapping(field, value, form):
    _require(_is(value, Mapping), field or "content", value, "a section of fields")
    within = f"{field}." if field else ""
    for key, inner in form.items():
        name = key.removesuffix("?")
        if name in value:
            check(f"{within}{name}", value[name], inner)
        elif not key.endswith("?") and key != OPEN:
            raise UserError(f"{within}{key}: missing; add it")
    known = {key.removesuffix("?") for key in form}
    for name in value:
        if name not in known and OPEN not in form:
            raise UserError(f"{within}{name}: no such field here; leave it out")


def _is(value, form) -> bool:
    """Whether a value has a type, as annotations write it."""
    origin, of = typing.get_origin(form), typing.get_args(form)
    if form is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_is(value, one) for one in of)
    if origin is tuple:
        return isinstance(value, list | tuple) and all(_is(item, of[0]) for item in value)
    if form is Mapping or origin is Mapping:
        return isinstance(value, Mapping) or hasattr(value, "to_dict")  # the latter: ConfigDict
    if form is float:
        return isinstance(value, float) or (_is(value, int) and abs(value) <= MAX_FLOAT)
    if form is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return value is None if form is None else isinstance(value, origin or form)


def _require(holds, field, value, wanted):
    if not holds:
        raise UserError(f"{field}={shown(value)}: must be {wanted}")


def _name(form) -> str:
    return getattr(form, "__name__", str(form)) if typing.get_origin(form) is None else str(form)
