"""An `infer` that was stopped and is run again: the same bytes, nothing rendered twice, nothing stale kept."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager

import pytest
from safetensors.torch import load_file, save_file

from hyimg.cli.app import run
from hyimg.config.image_file import read_settings
from hyimg.model.dit import DiT
from hyimg.rendering import outputs
from hyimg.rendering.outputs import PREFIX, RenderJob
from hyimg.stages import infer as stage

MODELS = ["--dit", "{dit}", "--text_encoder", "{text_encoder}", "--byt5", "{byt5}", "--vae", "{vae}"]
QUICK = ["--image_size", "32", "64", "--infer_steps", "2", "--guidance_scale", "1"]
PROMPTS = "a red square --d 1\na green field --d 2\na dark road --d 3\n"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, model):
    """The results of the prompts, by name, of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "prompts.txt").write_text(PROMPTS, encoding="utf-8")
    files = [f"--{option}={path}" for option, path in model.files().items()]
    output = ["--save_path", folder / "out", "--output_type", "latent_images"]
    arguments = ["infer", *files, *QUICK, "--from_file", folder / "prompts.txt", *output]
    assert run([str(argument) for argument in arguments]) == 0
    return contents(folder / "out")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.is_dir()}


def kept_folders(folder):
    return [path for path in folder.iterdir() if path.name.startswith(PREFIX)] if folder.is_dir() else []


@pytest.fixture
def infer(hyimg, tmp_path):
    """Renders the prompts, and gives the exit code and what was said."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(PROMPTS, encoding="utf-8")

    def call(*extra, out="out", kind="latent_images"):
        output = ["--save_path", tmp_path / out, "--output_type", kind]
        code, _, err = hyimg("infer", *MODELS, *QUICK, "--from_file", prompts, *output, *extra)
        return code, err

    return call


@pytest.fixture
def renders(monkeypatch):
    """How many pictures were rendered since the last call."""
    calls = []
    forward = DiT.forward
    monkeypatch.setattr(DiT, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))

    def count():
        number = len(calls) / 2
        calls.clear()
        return number

    return count


STEPS = {
    "keep": (RenderJob, "keep"),
    "complete": (RenderJob, "complete"),
    "write": (outputs, "write_result"),
}


@contextmanager
def stopped(monkeypatch, step, number, *, killed=False):
    """A block in which a run is stopped by Ctrl-C behind the `number`-th call of a step, or killed there."""
    owner, name = STEPS[step]
    act, calls = getattr(owner, name), []

    def stopping(*arguments, **options):
        result = act(*arguments, **options)
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt
        return result

    def die(job, *error):
        """What a kill leaves: nothing is tidied up, and the lock file stays without its lock."""
        path = job._folder / "lock"
        job._lock.close()
        path.touch()

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stopping)
        if killed:
            patch.setattr(RenderJob, "__exit__", die)
        yield


@pytest.mark.parametrize(
    ("step", "number", "killed", "complete", "rendered_again"),
    [
        ("keep", 2, False, 0, 1),
        ("keep", 3, True, 0, 0),
        ("write", 4, True, 1, 0),  # the second result's last file is there and not recorded
        ("complete", 3, True, 3, 0),
    ],
)
def test_the_same_command_continues_to_the_same_bytes(
    infer, undisturbed, renders, tmp_path, monkeypatch, step, number, killed, complete, rendered_again
):
    with stopped(monkeypatch, step, number, killed=killed):
        code, err = infer()
    assert code == 130
    assert len(kept_folders(tmp_path / "out")) == 1
    assert ("the same command continues here" in err) is not killed
    renders()
    code, err = infer()
    assert code == 0, err
    assert f"kept from the run that was stopped: {complete} of 3 results" in err
    assert renders() == rendered_again
    assert contents(tmp_path / "out") == undisturbed
    assert kept_folders(tmp_path / "out") == []


def test_numbered_files_are_continued_too_and_others_are_not_replaced(
    infer, undisturbed, tmp_path, monkeypatch
):
    with stopped(monkeypatch, "write", 2, killed=True):
        assert infer(out="cat.png", kind="images")[0] == 130
    third = tmp_path / "cat-0003.png"
    third.write_bytes(b"mine")
    code, err = infer(out="cat.png", kind="images")
    assert (code, third.read_bytes()) == (1, b"mine")
    assert f"`{third}` exists" in err
    third.unlink()
    code, err = infer(out="cat.png", kind="images")
    assert code == 0, err
    for number in (1, 2, 3):
        assert (tmp_path / f"cat-000{number}.png").read_bytes() == undisturbed[f"000{number}.png"]
    assert kept_folders(tmp_path) == []


def test_a_seed_that_was_drawn_stays(infer, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a red square\na green field\n", encoding="utf-8")
    with stopped(monkeypatch, "keep", 1):
        infer(kind="images")
    (folder,) = kept_folders(tmp_path / "out")
    seeds = json.loads((folder / "job.json").read_text())["seeds"]
    code, err = infer(kind="images")
    assert code == 0, err
    assert [read_settings(tmp_path / "out" / f"000{n}.png")["seed"] for n in (1, 2)] == seeds
    assert infer(kind="images")[0] == 0
    drawn = [read_settings(tmp_path / "out" / f"000{n}.png")["seed"] for n in (3, 4)]
    assert not set(drawn) & set(seeds), "a run after a complete one draws its own"


def test_a_latent_of_another_seed_is_rendered_again(infer, renders, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a red square\na green field\n", encoding="utf-8")
    with stopped(monkeypatch, "keep", 2):
        infer(kind="images")
    (folder,) = kept_folders(tmp_path / "out")
    (folder / "job.json").unlink()  # and with it the seeds of the two latents
    renders()
    assert infer(kind="images")[0] == 0
    assert renders() == 2


def other_prompt(tmp_path, lora):
    (tmp_path / "prompts.txt").write_text(PROMPTS.replace("road", "street"), encoding="utf-8")


def other_lora(tmp_path, lora):
    save_file({name: 2 * tensor for name, tensor in load_file(lora).items()}, lora)


CHANGES = {
    "prompt": (other_prompt, []),
    "lora": (other_lora, []),
    "setting": (None, ["--infer_steps", "1"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_another_command_kept_is_named_and_not_used(
    infer, trained, renders, tmp_path, monkeypatch, change
):
    lora = tmp_path / "lora.safetensors"
    shutil.copy(trained / "lora.safetensors", lora)
    with stopped(monkeypatch, "complete", 1):
        infer("--lora_weight", lora, kind="images")
    (folder,) = kept_folders(tmp_path / "out")
    renders()
    act, more = CHANGES[change]
    if act is not None:
        act(tmp_path, lora)
    with stopped(monkeypatch, "keep", 1):
        code, err = infer("--lora_weight", lora, *more, kind="images")
    assert code == 130
    assert renders() > 0
    assert "kept from the run" not in err
    assert f"`{folder}` is of a run with other settings that was stopped" in err
    assert len(kept_folders(tmp_path / "out")) == 2


@pytest.mark.parametrize("damage", ["latent", "record", "done", "a link"])
def test_what_is_damaged_is_rendered_again(infer, undisturbed, tmp_path, monkeypatch, damage):
    with stopped(monkeypatch, "complete", 1):
        infer()
    (folder,) = kept_folders(tmp_path / "out")
    if damage == "latent":
        path = folder / "00002.safetensors"
        path.write_bytes(path.read_bytes()[:-8])
    elif damage == "record":
        (folder / "job.json").write_text("[" * 100_000)
    elif damage == "done":
        (folder / "done").write_text("0\n1")  # cut off: it may have been 12
        (tmp_path / "out" / "0001.png").unlink()  # and its user has removed what was complete
    else:
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    code, err = infer()
    if damage == "a link":
        assert (code, f"`{folder}` is a link" in err) == (2, True)
        return
    assert code == 0, err
    assert kept_folders(tmp_path / "out") == []
    found = contents(tmp_path / "out")
    if damage == "record":  # nothing says which numbers were its own
        assert [found[f"000{n}.png"] for n in (2, 3, 4)] == [undisturbed[f"000{n}.png"] for n in (1, 2, 3)]
    else:
        assert found == undisturbed


def test_a_run_next_to_the_same_command_takes_nothing_from_it(infer, undisturbed, tmp_path, monkeypatch):
    encode, codes = stage.encode_states, []

    def meanwhile(*arguments):
        monkeypatch.setattr(stage, "encode_states", encode)
        codes.append(infer()[0])
        return encode(*arguments)

    monkeypatch.setattr(stage, "encode_states", meanwhile)
    assert infer()[0] == 0
    assert codes == [0]
    found = contents(tmp_path / "out")
    assert sorted(found.values()) == sorted([*undisturbed.values(), *undisturbed.values()])
    assert kept_folders(tmp_path / "out") == []


def test_memory_is_bounded_by_batches_that_change_no_byte(infer, undisturbed, tmp_path, monkeypatch):
    batches = []
    encode = stage.encode_states
    monkeypatch.setattr(stage, "_MOST_STATE_BYTES", 1)
    monkeypatch.setattr(
        stage, "encode_states", lambda e, prompts, r: batches.append(prompts) or encode(e, prompts, r)
    )
    assert infer()[0] == 0
    assert batches == [["a red square", ""], ["a green field", ""], ["a dark road", ""]]
    assert contents(tmp_path / "out") == undisturbed


def test_latents_that_are_decoded_are_continued_too(hyimg, infer, undisturbed, tmp_path, monkeypatch):
    latents = []
    for number in (1, 2, 3):
        latents.append(tmp_path / f"{number}.safetensors")
        latents[-1].write_bytes(undisturbed[f"000{number}.safetensors"])
    arguments = ["infer", "--vae", "{vae}", "--latent_path", *latents, "--save_path", tmp_path / "decoded"]
    with stopped(monkeypatch, "complete", 2):
        assert hyimg(*arguments)[0] == 130
    code, _, err = hyimg(*arguments)
    assert code == 0, err
    assert "kept from the run that was stopped: 2 of 3 results" in err
    assert hyimg(*arguments[:-1], tmp_path / "undisturbed")[0] == 0
    assert contents(tmp_path / "decoded") == contents(tmp_path / "undisturbed")
