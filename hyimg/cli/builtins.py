"""Our own commands, registered through the hook that plugins use, so that no plugin can take their names."""

from __future__ import annotations

from hyimg.hookspecs import Provided, hookimpl


@hookimpl
def hyimg_commands() -> Provided:
    from hyimg.cli.app import app

    return {str(info.name): info.callback for info in app.registered_commands if info.callback is not None}
