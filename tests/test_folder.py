import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import openmythos.folder
from openmythos.checkpoint.load import load_checkpoint
from openmythos.checkpoint.save import OWN_FILES, save_pretrained
from openmythos.folder import (
    append,
    damage,
    locked,
    put_in_place,
    remove_folder,
    remove_unfinished,
    replaced_folder,
    require_writable,
    whole_file,
    write_json,
    write_manifest,
    write_whole,
)
from openmythos.model.recurrent import RecurrentDepthLM
from tests.checkpoint.examples import TOKENS, make_model
from tests.train.examples import full_disk


@pytest.fixture
def model() -> RecurrentDepthLM:
    return make_model(0)


@pytest.fixture
def folder(model: RecurrentDepthLM, tmp_path: Path) -> Path:
    return save_pretrained(model, tmp_path / "saved")


# --- files ----------------------------------------------------------------------------------------


def test_a_file_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    for content in ("é\n", b"\xff", memoryview(b"ab")):
        write_whole(path, content)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    write_json(path, {"a": [1, None]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": [1, None]}
    assert [each.name for each in path.parent.iterdir()] == ["a.txt"]


def test_a_full_disk_appends_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    append(path, "é\n")
    with full_disk(100), pytest.raises(OSError, match=r"a\.txt cannot be written: file too large"):
        append(path, "x" * 200)
    append(path, "b\n")
    assert path.read_text(encoding="utf-8") == "é\nb\n"


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write_and_fail() -> None:
        with whole_file(path) as file:
            file.write(b"half")
            assert path.read_text() == "old"
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        write_and_fail()
    assert [each.name for each in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "old"


def test_what_is_whole_is_put_in_place(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    put_in_place(tmp_path / "b", tmp_path / "a")
    assert (tmp_path / "a").read_text() == "b" and not (tmp_path / "b").exists()
    for name in (".step.tmp", "..step.tmp.tmp", "step"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").touch()
    remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "step"]


def test_a_kill_while_a_folder_is_deleted_leaves_no_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make() -> None:
        (tmp_path / "step").mkdir()
        (tmp_path / "step" / "file").touch()

    make()
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", lambda path: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            remove_folder(tmp_path / "step")
    assert [path.name for path in tmp_path.iterdir()] == [".step.tmp"]
    make()
    remove_folder(tmp_path / "step")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_errors_of_the_system_name_the_file(tmp_path: Path) -> None:
    (tmp_path / ".a.txt.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"a\.txt cannot be written: no space left on device"):
        write_whole(tmp_path / "a.txt", "x" * 100_000)


@pytest.mark.parametrize("write", [write_whole, lambda path, _: require_writable(path)])
def test_a_folder_is_no_place_for_a_file(write: Callable, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"folder is a folder; give the path of a file$"):
        write(tmp_path / "folder", "x")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"^\S*file/a\.json cannot be written: \S+file is no folder"):
        write(tmp_path / "file" / "a.json", "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_trial_leaves_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    for name in ("a", "b"):
        require_writable(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
def test_places_where_nothing_can_be_written_are_one_sentence() -> None:
    for use in (
        lambda place: write_whole(place, "x"),
        lambda place: replaced_folder(place, ()).__enter__(),
        lambda place: locked(place).__enter__(),
    ):
        with pytest.raises(OSError, match=r"^/proc/x/y cannot be written: no such file or dir"):
            use(Path("/proc/x/y"))


def test_a_manifest_finds_every_change(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("a", "deep/b"):
        (tmp_path / name).write_text("content")
    assert damage(tmp_path) is None  # there is no manifest
    write_manifest(tmp_path)
    assert damage(tmp_path) is None
    (tmp_path / "c").touch()  # is not named in it
    assert damage(tmp_path) is None
    (tmp_path / "a").write_text("contend")
    assert damage(tmp_path) == "a does not match its SHA-256"
    (tmp_path / "a").write_text("longer content")
    assert damage(tmp_path) == "a has 14 bytes instead of 7"
    (tmp_path / "a").unlink()
    assert damage(tmp_path) == "a is missing"
    for text in ("", "[]", "{}", '{"files": []}', '{"files": {"a": {"bytes": 1}}}', "\xff"):
        (tmp_path / "manifest.json").write_bytes(text.encode("latin-1"))
        assert damage(tmp_path) == "manifest.json cannot be read"


def test_a_lock_names_the_process_and_ends_with_it(tmp_path: Path) -> None:
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom openmythos.folder import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('in', flush=True)\n    time.sleep(60)\n"
    )
    with locked(tmp_path / "new"):
        pass
    assert list((tmp_path / "new").iterdir()) == []
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "in\n"
    with pytest.raises(ValueError, match=rf"is in use by process {process.pid} on .*; wait"):
        locked(tmp_path).__enter__()
    process.kill()
    process.communicate()
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
        with pytest.raises(ValueError, match=f"process {os.getpid()} "):
            locked(tmp_path).__enter__()


# --- replacing ------------------------------------------------------------------------------------


def test_other_files_are_never_deleted(model: RecurrentDepthLM, folder: Path) -> None:
    (folder / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"holds thesis\.tex: replacing the folder would delete"):
        save_pretrained(model, folder)
    with pytest.raises(ValueError, match="is a file; a checkpoint is a folder"):
        save_pretrained(model, folder / "config.json")
    assert (folder / "thesis.tex").exists()
    load_checkpoint(folder)


@pytest.mark.parametrize("can_exchange", [True, False])
def test_replacing_leaves_nothing_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    if not can_exchange:
        monkeypatch.setattr(openmythos.folder, "_exchange", lambda first, second: False)
    new = make_model(1)
    (folder.parent / ".saved.old").mkdir()
    (folder.parent / ".saved.tmp").mkdir()
    save_pretrained(new, folder)
    assert [path.name for path in folder.parent.iterdir()] == ["saved"]
    assert torch.equal(load_checkpoint(folder)(TOKENS).logits, new(TOKENS).logits)


def test_a_link_keeps_pointing_to_its_folder(folder: Path) -> None:
    link = folder.parent / "latest"
    link.symlink_to(folder)
    save_pretrained(make_model(1), link)
    assert link.is_symlink()
    assert torch.equal(load_checkpoint(link).embed.weight, load_checkpoint(folder).embed.weight)


def test_failed_save_leaves_the_old_checkpoint(model: RecurrentDepthLM, folder: Path) -> None:
    def write_and_fail() -> None:
        with replaced_folder(folder, OWN_FILES) as fresh:
            (fresh / "config.json").touch()
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        write_and_fail()
    assert [path.name for path in folder.parent.iterdir()] == ["saved"]
    assert torch.equal(load_checkpoint(folder)(TOKENS).logits, model(TOKENS).logits)


KILLED_SAVES = """
import os, sys
import torch
from openmythos import folder as files
from openmythos.checkpoint.load import load_checkpoint
from openmythos.checkpoint.save import OWN_FILES, save_pretrained
sys.path.insert(0, sys.argv[3])
from tests.checkpoint.examples import make_model

# Save, and be killed at the n-th thing that the process asks of the system, for n = 1, 2, 3 ...
folder, count, number = sys.argv[1], 0, 0
if sys.argv[2] == "renames":
    files._exchange = lambda first, second: False
old, new = make_model(0), make_model(1)
asked = ("open", "os.", "shutil.", "ctypes.")

def watch(event, args):
    global count
    if number and event.startswith(asked):
        count += 1
        if count == number:
            os._exit(9)

sys.addaudithook(watch)
outcomes = []
for step in range(1, 200):
    number = 0
    save_pretrained(old, folder)
    child = os.fork()
    if child == 0:
        number, count = step, 0
        save_pretrained(new, folder)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    weight = load_checkpoint(folder).embed.weight
    found = [torch.equal(weight, model.embed.weight) for model in (old, new)]
    assert sum(found) == 1, (step, found)
    outcomes.append(found[1])
    if status == 0:
        break
    assert status == 9, status
else:
    raise SystemExit("the save never ended")
assert outcomes == sorted(outcomes) and outcomes[-1] and not outcomes[0], outcomes
print(len(outcomes), outcomes.count(True))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children")
@pytest.mark.parametrize("way", ["exchange", "renames"])
def test_a_kill_at_any_instant_leaves_one_complete_checkpoint(tmp_path: Path, way: str) -> None:
    here = Path(__file__).parent
    command = [sys.executable, "-c", KILLED_SAVES, str(tmp_path / "saved"), way, str(here.parent)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=here.parent)
    assert ran.returncode == 0, ran.stderr
    kills, kept_new = map(int, ran.stdout.split())
    assert kills > 10
    assert kept_new > 1
