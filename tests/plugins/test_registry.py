"""Plugins: names in any case, and one sentence that names plugin, place and hook for whatever one does wrong."""

from __future__ import annotations

import importlib.metadata
import re

import pytest

from hyimg.errors import HyimgError, RunError
from hyimg.plugins import load_plugins

MARK = "from hyimg.hookspecs import hookimpl\n@hookimpl\n"


def test_a_name_is_found_in_any_case_and_known_by_its_own_spelling(plugin):
    plugins = plugin(MARK + "def hyimg_samplers(): return {'Mine': max}")
    assert plugins.resolve("samplers", "mINE") is max
    assert plugins.canonical("samplers", "mine") == "Mine"
    assert plugins.canonical("samplers", "Heun") == "heun"
    assert plugins.canonical("optimizers", "adamw8BIT") == "AdamW8bit"
    with pytest.raises(HyimgError, match="`--sampler` `Min` is unknown") as caught:
        plugins.canonical("samplers", "Min")
    assert "did you mean `Mine`?" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (
            ["def hyimg_losses(): return {'L2': max}"],
            "provides `L2` for `--loss_type`, which `hyimg.plugins.builtins`",
        ),
        (["def hyimg_losses(): return {'x': max, 'X': min}"], "`one` already has as `x`"),
        (
            ["def hyimg_losses(): return {'x': max}", "def hyimg_losses(): return {'X': max}"],
            "`one` already has",
        ),
    ],
)
def test_names_that_differ_in_case_alone_are_one_name(plugin, texts, words):
    plugins = plugin(*[MARK + text for text in texts])
    with pytest.raises(HyimgError, match=words):
        plugins.resolve("losses", "x")


FAULTS = {
    "returns None": ("def hyimg_losses(): pass", "hook `hyimg_losses` returned a NoneType"),
    "returns a list": ("def hyimg_losses(): return ['x']", "hook `hyimg_losses` returned a list"),
    "a name is no text": (
        "def hyimg_losses(): return {3: max}",
        "hook `hyimg_losses` returned `3: <built-in",
    ),
    "a value is no function": (
        "def hyimg_losses(): return {'x': 3}",
        "hook `hyimg_losses` returned `'x': 3`",
    ),
    "raises": ("def hyimg_losses(): return {}['k']", "hook `hyimg_losses` failed: KeyError: 'k'"),
    "exits in a hook": (
        "def hyimg_losses(): raise SystemExit(3)",
        "hook `hyimg_losses` failed: SystemExit: 3",
    ),
    "leads nowhere": (
        "def hyimg_losses(): return {'x': 'no_such_module:f'}",
        "hook `hyimg_losses`: `x`: `no_such_module:f` cannot be imported: ModuleNotFoundError",
    ),
    "asks for too much": ("def hyimg_losses(run): return {}", "hook `hyimg_losses` takes `run`"),
    "asks for an unknown": ("def hyimg_step_end(step, los): pass", "hook `hyimg_step_end` takes `los`"),
    "is a wrapper": (
        "def hyimg_losses(): return {}\n@hookimpl(wrapper=True)\ndef hyimg_run_end(run):\n    return (yield)",
        "hook `hyimg_run_end` is a wrapper",
    ),
    "is not marked": (
        "def hyimg_losses(): return {}\ndef hyimg_run_end(run): pass",
        "hook `hyimg_run_end` is not marked",
    ),
    "is misspelt": ("def hyimg_loses(): return {}", "implements `hyimg_loses`, which is not a hook"),
    "exits on import": (
        "def hyimg_losses(): return {}\nimport sys\nsys.exit('bye')",
        "imported: SystemExit: bye",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_plugin_is_named_with_its_place_and_hook(plugin, tmp_path, fault):
    text, words = FAULTS[fault]
    with pytest.raises(HyimgError) as caught:
        plugin(MARK + text).resolve("losses", "x")
    start = f"the plugin `one` ({tmp_path / 'one.py'})"
    assert caught.value.message.startswith(start)
    assert words in caught.value.message
    assert caught.value.exit_code == 2
    assert "\n" not in caught.value.message


def test_the_listing_checks_what_a_plugin_gives(plugin):
    rows = {row.name: row for row in plugin(MARK + "def hyimg_losses(): return {'x': max}").listing()}
    assert rows["one"].provides == {"losses": ("x",)}
    assert rows["one"].hooks == ("hyimg_losses",)
    assert rows["hyimg.plugins.builtins"].provides["samplers"] == ("euler", "heun", "dpm++2m")
    with pytest.raises(HyimgError, match="returned a set"):
        plugin(MARK + "def hyimg_losses(): return {'x'}").listing()
    with pytest.raises(
        HyimgError, match="provides `train` for `hyimg NAME`, which `hyimg.plugins.builtins` already has"
    ):
        plugin(MARK + "def hyimg_commands(): return {'train': max}").listing()


def test_a_kind_of_which_there_is_none_says_so(plugin):
    with pytest.raises(HyimgError, match="`--caption_transform` `x` is unknown") as caught:
        plugin().resolve("caption_transforms", "x")
    assert "no loaded plugin provides one" in str(caught.value.hint)


def test_where_problems_are_collected_the_other_plugins_are_loaded(tmp_path):
    files = {
        "broken": "raise ValueError('no')",
        "misspelt": MARK + "def hyimg_loses(): return {}",
        "good": MARK + "def hyimg_losses(): return {'x': max}",
    }
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    problems = []
    plugins = load_plugins([str(tmp_path / f"{name}.py") for name in files], problems=problems)
    assert plugins.resolve("losses", "x") is max
    assert len(problems) == 2
    assert "cannot be imported: ValueError: no" in problems[0].message
    assert "misspelt" not in {row.name for row in plugins.listing()}


def test_an_installed_plugin_that_is_named_again_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a_module_of_mine.py").write_text(MARK + "def hyimg_losses(): return {}", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("HYIMG_LOAD_PLUGINS")
    points = [importlib.metadata.EntryPoint("mine", "a_module_of_mine", "hyimg")]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)
    with pytest.raises(
        HyimgError, match="`--plugin` `a_module_of_mine` is already loaded as the plugin `mine`"
    ):
        load_plugins(["a_module_of_mine"])
    points[0] = importlib.metadata.EntryPoint("mine", "a_module_of_mine:hyimg_losses", "hyimg")
    with pytest.raises(
        HyimgError, match=re.escape("the plugin `mine` (a_module_of_mine:hyimg_losses) is a function")
    ):
        load_plugins()


def test_an_event_reaches_each_plugin_with_what_it_asks_for(plugin):
    keep = "seen = []\n" + MARK
    plugins = plugin(
        keep + "def hyimg_step_end(step): seen.append(step)",
        keep + "def hyimg_step_end(): seen.append('end')",
    )
    plugins.notify("hyimg_step_end", run=None, step=3, loss_B=None)
    seen = [plugins.manager.get_plugin(name).seen for name in ("one", "two")]
    assert seen == [[3], ["end"]]


@pytest.mark.parametrize("raised", ["ValueError('no\\nluck')", "SystemExit()"])
def test_an_event_hook_that_fails_is_a_failed_run(plugin, raised):
    plugins = plugin(MARK + f"def hyimg_run_end(run): raise {raised}")
    with pytest.raises(RunError) as caught:
        plugins.notify("hyimg_run_end", run=None)
    assert caught.value.exit_code == 1
    assert re.match(
        r"the plugin `one` \(.*one.py\): hook `hyimg_run_end` failed: (ValueError: no luck|SystemExit)$",
        caught.value.message,
    )


def test_what_a_plugin_says_to_the_user_itself_is_not_changed(plugin):
    text = (
        "from hyimg.errors import HyimgError\n" + MARK + "def hyimg_run_start(run): raise HyimgError('mine')"
    )
    with pytest.raises(HyimgError, match="^mine$"):
        plugin(text).notify("hyimg_run_start", run=None)
