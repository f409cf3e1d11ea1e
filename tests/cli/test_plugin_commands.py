"""Commands of plugins: listed, helped, run; their errors are ours, and a broken plugin stands in nobody's way."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hyimg.cli.app import run

COMMAND = '''
from hyimg.hookspecs import hookimpl


def greet(name: str, times: int = 1, loud: bool = False):
    """Greet somebody."""
    from hyimg.errors import HyimgError

    if name == "nobody":
        raise HyimgError("there is nobody", hint="name somebody")
    if name == "trouble":
        raise KeyError("trouble")
    print((" ".join([f"hello {name}"] * times)).upper() if loud else " ".join([f"hello {name}"] * times))


@hookimpl
def hyimg_commands():
    return {"greet": greet, "lazy-greet": "no_such_module:greet"}
'''


@pytest.fixture
def hyimg(tmp_path, capsys):
    """Runs a command line with plugin files of the given texts; gives (exit code, stdout, stderr)."""

    def call(*arguments, plugins=(COMMAND,)):
        flags = []
        for number, text in enumerate(plugins):
            file = tmp_path / f"plugin{number}.py"
            file.write_text(text, encoding="utf-8")
            flags += ["--plugin", str(file)]
        capsys.readouterr()
        code = run([*flags, *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


BROKEN = "raise ValueError('mine is broken')"
HEAVY = "import torch\n" + COMMAND.replace('"greet"', '"heavy-greet"')
TAKEN = COMMAND.replace('"greet"', '"Train"')


def test_it_runs_with_its_own_options_and_help(hyimg):
    assert hyimg("greet", "you") == (0, "hello you\n", "")
    assert hyimg("greet", "you", "--times", "2", "--loud") == (0, "HELLO YOU HELLO YOU\n", "")
    code, out, _ = hyimg("greet", "--help")
    assert code == 0
    assert "Greet somebody." in out
    assert "--times" in out


def test_it_is_listed_after_ours(hyimg):
    code, out, err = hyimg("--help")
    assert (code, err) == (0, "")
    assert out.index("make-tiny-model") < out.index("greet")
    assert "Greet somebody." in out
    assert "lazy-greet" in out, "what its place names is not imported for the list"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nobody"], 2, "error: there is nobody\nhint: name somebody\n"),
        (["trouble"], 1, "command `greet` failed: KeyError: 'trouble'"),
        (["you", "--tims", "2"], 2, "error: no such option: `--tims`\nhint: did you mean `--times`?"),
        (["you", "--times", "many"], 2, "error: invalid value for '--times'"),
        ([], 2, "error: missing argument 'name'"),
    ],
)
def test_its_errors_are_told_as_ours(hyimg, arguments, code, words):
    got, out, err = hyimg("greet", *arguments)
    assert (got, out) == (code, "")
    assert words in err
    assert "Traceback" not in err


def test_traceback_shows_where_it_failed(hyimg):
    with pytest.raises(Exception, match="KeyError: 'trouble'") as caught:
        hyimg("greet", "trouble", "--traceback")
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_place_that_leads_nowhere_is_told_when_it_is_run(hyimg):
    code, _, err = hyimg("lazy-greet")
    assert code == 2
    assert "hook `hyimg_commands`: `lazy-greet`: `no_such_module:greet` cannot be imported" in err


def test_a_broken_plugin_stands_in_nobodys_way(hyimg):
    code, out, err = hyimg("--help", plugins=(BROKEN, COMMAND))
    assert code == 0
    assert "greet" in out
    assert err.startswith("warning: the plugin `plugin0` (")
    assert "mine is broken" in err
    assert hyimg("greet", "you", plugins=(BROKEN, COMMAND)) == (0, "hello you\n", "")
    code, _, err = hyimg("other", plugins=(BROKEN, COMMAND))
    assert code == 2
    assert err.startswith("error: no such command `other`, and the plugin `plugin0` (")
    assert "mine is broken" in err, "it may be the one that has the command"
    code, _, err = hyimg("other")
    assert (code, err.splitlines()[0]) == (2, "error: no such command 'other'")


def test_a_name_that_exists_is_an_error_and_ours_runs(hyimg):
    code, out, err = hyimg("--help", plugins=(TAKEN,))
    assert code == 0
    assert "provides `Train` for `hyimg NAME`, which `hyimg.plugins.builtins` already has as `train`" in err
    assert "Train a LoRA on the cached dataset." in out
    code, _, err = hyimg("greet", "you", plugins=(COMMAND, COMMAND))
    assert (code, err) == (0, ""), "the first to give a name has it"
    code, _, err = hyimg("--help", plugins=(COMMAND, COMMAND))
    assert "provides `greet` for `hyimg NAME`, which `plugin0` already has" in err


def test_a_plugin_before_our_own_command_is_refused(hyimg):
    code, _, err = hyimg("plugins")
    assert code == 2
    assert "hint: put it after: `hyimg plugins --plugin ...`" in err


def test_a_signature_that_makes_no_options_is_an_error(hyimg):
    text = "from hyimg.hookspecs import hookimpl\ndef f(x: int | str): ...\n"
    text += "@hookimpl\ndef hyimg_commands(): return {'f': f}"
    code, _, err = hyimg("f", plugins=(text,))
    assert code == 2
    assert "command `f`: its signature cannot be turned into options" in err
    code, out, err = hyimg("--help", plugins=(text, COMMAND))
    assert (code, "greet" in out) == (0, True)
    assert "warning: the plugin `plugin0`" in err


def test_a_plugin_that_imports_torch_is_run_and_not_listed(tmp_path):
    file = tmp_path / "heavy.py"
    file.write_text(HEAVY, encoding="utf-8")
    code = (
        "import sys\nfrom hyimg.cli.app import run\n"
        f"assert run(['--plugin', {str(file)!r}, '--help']) == 0\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
        f"sys.exit(run(['--plugin', {str(file)!r}, 'heavy-greet', 'you']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "heavy-greet" not in done.stdout
    assert done.stdout.endswith("hello you\n")
    assert done.stderr == ""
