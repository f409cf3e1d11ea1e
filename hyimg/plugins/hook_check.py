"""Whether a function that is named like a hook is one, and would be called as it is written."""

from __future__ import annotations

import inspect

from hyimg import hookspecs
from hyimg.errors import HyimgError, did_you_mean

HOOKS = tuple(name for name in dir(hookspecs) if name.startswith("hyimg_"))


def check_hook(place: str, hook: str, function: object) -> None:
    """Raises HyimgError for a hook that does not exist, is not marked, is a wrapper, or asks for what it is not given.

    `place` names the plugin and where it is from.
    """
    if hook not in HOOKS:
        raise HyimgError(
            f"{place} implements `{hook}`, which is no hook",
            hint=did_you_mean(hook, HOOKS) or f"the hooks are {', '.join(HOOKS)}",
        )
    blame = f"{place}: hook `{hook}`"
    marks = getattr(function, "hyimg_impl", None)
    if marks is None or not inspect.isroutine(function):
        raise HyimgError(
            f"{blame} is not marked, so it would never be called",
            hint="put `@hookimpl` (from hyimg.hookspecs) in front of the function",
        )
    if marks["wrapper"] or marks["hookwrapper"]:
        raise HyimgError(f"{blame} is a wrapper", hint="write a function that is called beside the others")
    may = tuple(inspect.signature(getattr(hookspecs, hook)).parameters)
    for parameter in inspect.signature(function).parameters.values():
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if parameter.default is parameter.empty and not variadic and parameter.name not in may:
            takes = ", ".join(f"`{name}`" for name in may) if may else "nothing"
            raise HyimgError(
                f"{blame} asks for `{parameter.name}`, which it is not given",
                hint=f"the hook may take {takes}",
            )
