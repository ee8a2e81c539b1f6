"""pydantic's errors in our words. They never repeat the value, which may be a secret."""

from __future__ import annotations

from pydantic_core import ErrorDetails

from spillway.config.section import nearest


def wording(details: ErrorDetails) -> str:
    kind, context = details["type"], details.get("ctx", {})
    given = details["input"]
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        values = [value.strip("'") for value in str(context["expected"]).replace(" or ", ", ").split(", ")]
        near = nearest(given, values) if isinstance(given, str) else ""
        return f"must be {context['expected']}".replace("'", "") + near
    if kind in _TEXTS:
        return _TEXTS[kind].format_map(context)
    return details["msg"][:1].lower() + details["msg"][1:]


_NUMBER = "must be a whole number"
_TIME = "must be a time with its zone, such as 2026-01-02T03:04:05Z"
_TEXTS = {
    "missing": "is required",
    "extra_forbidden": "unknown key",
    "timezone_aware": _TIME,
    "datetime_type": _TIME,
    "datetime_parsing": _TIME,
    "datetime_from_date_parsing": _TIME,
    "too_long": "may have at most {max_length} items",
    "union_tag_not_found": "is required",
    "string_type": "must be text; put it in quotes",
    "int_type": _NUMBER,
    "int_parsing": _NUMBER,
    "int_from_float": _NUMBER,
    "int_parsing_size": _NUMBER,
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "too_short": "may not be empty",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
    "model_attributes_type": "must be a mapping",
    "path_type": "must be a path",
}
