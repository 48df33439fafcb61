"""Files that are written whole or not at all: their modes, links, errors, and what killed processes leave."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from ifd_trainer.data import atomic
from ifd_trainer.data.atomic import clear_stale, is_temporary, write_atomically, write_json
from ifd_trainer.errors import FileAccessError, NotFoundError

LEFT = ".a-ifdtmp-{place}-{process}-0123abcd.txt"


def write(path: Path, text: str = "new", **more: object) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text), **more)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask(request):
    old = os.umask(request.param)
    yield request.param
    os.umask(old)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002, 0o027], indirect=True)
def test_a_new_file_has_the_mode_that_the_umask_leaves(tmp_path, umask):
    write(tmp_path / "new" / "a.txt")
    assert mode(tmp_path / "new" / "a.txt") == 0o666 & ~umask
    (tmp_path / "plain").touch()
    assert mode(tmp_path / "new" / "a.txt") == mode(tmp_path / "plain")


@pytest.mark.parametrize("before", [0o600, 0o640, 0o664, 0o755])
def test_a_file_that_is_replaced_keeps_its_mode_and_is_private_while_it_is_written(tmp_path, before):
    path, seen = tmp_path / "a.txt", []
    path.write_text("old")
    path.chmod(before)
    write_atomically(path, lambda temporary: seen.append(mode(temporary)) or temporary.write_text("new"))
    assert (path.read_text(), mode(path), seen) == ("new", before, [0o600])


def test_a_link_is_followed_and_stays(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "a.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("far/a.txt")
    (tmp_path / "broken.txt").symlink_to(tmp_path / "far" / "b.txt")
    for link, file in (("link.txt", "a.txt"), ("broken.txt", "b.txt")):
        write(tmp_path / link)
        assert (tmp_path / link).is_symlink()
        assert (tmp_path / "far" / file).read_text() == "new"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.txt", "b.txt", "broken.txt", "far", "link.txt"]


def test_what_is_no_regular_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "link.txt").symlink_to("/dev/null")
    (tmp_path / "folder.txt").mkdir()
    for name, shown in (("pipe.txt", "pipe.txt"), ("link.txt", "/dev/null"), ("folder.txt", "folder.txt")):
        with pytest.raises(FileAccessError, match=f"Cannot write .*{shown}: it is there already, and is no regular"):
            write(tmp_path / name)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_read_only_file_is_not_replaced(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("old")
    path.chmod(0o444)
    access = os.access
    monkeypatch.setattr(os, "access", lambda name, kind: access(name, kind) and (name != path))  # root may write all
    with pytest.raises(FileAccessError, match=r"a\.txt: it is there already, and read-only"):
        write(path)
    assert path.read_text() == "old"


def test_a_file_that_fails_leaves_the_old_one_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fails(temporary: Path) -> None:
        temporary.write_text("half")
        raise KeyError("broken")

    with pytest.raises(KeyError):
        write_atomically(path, fails)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "old")]


def test_an_error_about_a_file_that_is_read_stays_what_it_is(tmp_path):
    with pytest.raises(FileNotFoundError) as raised:
        write_atomically(tmp_path / "a.txt", lambda _: (tmp_path / "source.txt").read_text())
    assert not isinstance(raised.value, FileAccessError)

    def told(_: Path) -> None:
        raise NotFoundError("No such file: rows.")

    with pytest.raises(NotFoundError, match=r"^No such file: rows\.$"):
        write_atomically(tmp_path / "a.txt", told)


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileAccessError, match=f"Cannot write {tmp_path}/file/new/a.txt: Not a directory"):
        write(tmp_path / "file" / "new" / "a.txt")


FULL = """
import resource, signal, sys
from pathlib import Path
import pyarrow as pa, pyarrow.csv, pyarrow.parquet as pq
from ifd_trainer.data.atomic import write_atomically
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
table = pa.table({"n": list(range(10_000))})
def ipc(path):
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)
kinds = {
    "text": lambda path: path.write_text("x" * 10_000),
    "parquet": lambda path: pq.write_table(table, path),
    "csv": lambda path: pa.csv.write_csv(table, path),
    "ipc": ipc,
}
for name, write in kinds.items():
    try:
        write_atomically(Path(sys.argv[1], name), write)
    except Exception as error:
        print(type(error).__name__, error)
"""


def test_a_full_disk_is_told_with_the_name_of_the_file_whatever_writes_it(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        f"FileAccessError Cannot write {tmp_path / name}: File too large." for name in ("text", "parquet", "csv", "ipc")
    ]
    assert list(tmp_path.iterdir()) == []


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"Größe": [1, None]})
    assert path.read_text(encoding="utf-8") == '{\n "Größe": [\n  1,\n  null\n ]\n}\n'
    with pytest.raises(TypeError):
        write_json(path, {"Größe": {1, 2}})
    assert json.loads(path.read_text(encoding="utf-8")) == {"Größe": [1, None]}
    assert list(tmp_path.iterdir()) == [path]


def test_what_killed_processes_left_is_deleted_and_nothing_else(tmp_path, tmp_path_factory):
    seen = []
    write_atomically(tmp_path_factory.mktemp("seen") / "a.txt", lambda temporary: seen.append(temporary.name))
    _, _, here, process, _ = seen[0].split("-")  # .a-ifdtmp-PLACE-PROCESS-RANDOM.txt
    assert process == str(os.getpid())
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    there = "0" * 8
    files = {
        "dead": LEFT.format(place=here, process=gone.pid),
        "alive": LEFT.format(place=here, process=os.getpid()),
        "elsewhere": LEFT.format(place=there, process=gone.pid),
        "old": LEFT.format(place=there, process=gone.pid + 1),
        "other": ".a-tmp.txt",
        "rows": "a-ifdtmp-rows.txt",
    }
    for name in files.values():
        (tmp_path / name).touch()
    os.utime(tmp_path / files["old"], (time.time() - 2 * atomic.STALE,) * 2)
    assert [is_temporary(Path(name)) for name in files.values()] == [True] * 4 + [False] * 2
    write(tmp_path / "b.txt")
    left = {name for name in files if (tmp_path / files[name]).exists()}
    assert left == {"alive", "elsewhere", "other", "rows"}
    clear_stale(tmp_path / "missing")


def test_a_process_that_is_killed_leaves_one_recognisable_file_that_the_next_one_deletes(tmp_path):
    program = "import os, sys; from pathlib import Path; from ifd_trainer.data.atomic import write_atomically; "
    program += "write_atomically(Path(sys.argv[1]), lambda path: os._exit(9))"
    path = tmp_path / ("long name " * 20 + ".txt")
    assert subprocess.run([sys.executable, "-c", program, str(path)], cwd=ROOT).returncode == 9
    assert [is_temporary(left) for left in tmp_path.iterdir()] == [True]
    write(path)
    assert list(tmp_path.iterdir()) == [path]
