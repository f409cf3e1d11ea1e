"""`hyimg plugins`: the loaded plugins, and what they provide."""

from __future__ import annotations

from dataclasses import asdict

from hyimg.config.tools import PluginsConfig
from hyimg.plugins import load_plugins
from hyimg.report import Reporter, say, say_json


def plugins(config: PluginsConfig, report: Reporter) -> None:
    """Prints every loaded plugin with its origin, hooks and names, as lines or as JSON."""
    rows = load_plugins(config.common.plugin).listing()
    if config.listing.json:
        say_json([asdict(row) for row in rows])
        return
    for row in rows:
        say(f"{row.name} ({row.origin})")
        say(f"  hooks: {', '.join(row.hooks) or 'none'}")
        for kind, names in row.provides.items():
            say(f"  {kind.replace('_', ' ')}: {', '.join(names)}")
