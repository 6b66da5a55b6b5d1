"""Hostile files: each is refused by the command with one clear error and exit status 1, in bounded memory and time, and
none of them runs. Files that would run under `pickle.load` prove first that they do.
"""

import builtins
import contextlib
import io
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

ROOT = Path(__file__).parents[2]
MEMORY = 8 * 2**30
"""Bytes of address space that the command may have; a bomb that inflates needs more."""
RECIPE = "name: hostile\nbase_model: {path: nowhere/base}\ndatasets: [{path: rows.jsonl}]\ntrain: {lora: {r: 3}}\n"


class Call:
    """Pickles as `function(*arguments)`."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.function, self.arguments, self.state = function, arguments, state

    def __reduce__(self) -> Any:
        return (self.function, self.arguments) if self.state is None else (self.function, self.arguments, self.state)

    def __call__(self) -> None: ...


RUNNING: dict[str, Callable[[Path], Any]] = {
    "os.system": lambda marker: Call(os.system, f"touch '{marker}'"),
    "subprocess": lambda marker: Call(subprocess.check_call, ["touch", str(marker)]),
    "eval": lambda marker: Call(builtins.eval, f"open({str(marker)!r}, 'w')"),
    "exec": lambda marker: Call(builtins.exec, f"open({str(marker)!r}, 'w')"),
    "open": lambda marker: Call(builtins.open, str(marker), "w"),
    "method": lambda marker: Call(Path(marker).touch),
    "nested": lambda marker: [[{"a": (Call(print, Call(os.system, f"touch '{marker}'")),)}]],
    "getattr": lambda marker: Call(Call(getattr, Path, "touch"), Path(marker)),
    "import": lambda marker: Call(Call(getattr, Call(builtins.__import__, "os"), "system"), f"touch '{marker}'"),
    "setstate": lambda marker: Call(
        OrderedDict, state=Call(dict, Call(subprocess.check_output, ["touch", str(marker)]))
    ),
    "torch.load": lambda marker: Call(torch.load, Call(os.system, f"touch '{marker}'")),
}


def zipped(path: Path, text: bytes, **entries: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", text)
        for name, data in entries.items():
            archive.writestr(f"archive/{name}", data)
    return path


def _bare(text: bytes) -> Callable[[Path], Any]:
    return lambda path: zipped(path, text)


def _encoded(path: Path) -> Any:
    """`_codecs.encode(..., "hex")` doubles its argument, thirty times over."""
    text = b"\x80\x02X\x10\x00\x00\x00" + b"A" * 16
    text = b"\x80\x02" + b"c_codecs\nencode\n" * 30 + text[2:]
    return zipped(path, text + b"X\x03\x00\x00\x00hex\x86R" * 30 + b".")


def _inflated(path: Path) -> Any:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"N0" * 200_000_000 + b"N.")


def _traversal(path: Path) -> Any:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        archive.writestr("archive/../../../tmp/evil", b"x")


def _overlapping(path: Path) -> Any:
    """A thousand small entries could show the same gigabyte."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        archive.writestr("archive/data/0", b"x" * 4096)
        archive.writestr("archive/data/1", b"x" * 4096)
        archive.filelist[2].header_offset = archive.filelist[1].header_offset + 100


def _tar(path: Path) -> Any:
    """Torch's format from before 0.1.10."""
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            text = pickle.dumps(Call(os.system, "touch x"))
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text))


def _storage(text: bytes, path: Path, data: bytes = b"\0" * 16) -> Path:
    """A tensor of FloatStorage 0 (4 numbers), described by `text`: offset, size, stride."""
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
    head = b"\x80\x02}X\x0a\x00\x00\x00state_dict}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n("
    zipped(path, head + storage + text + b"\x89}tRss.", **{"data/0": data})
    return path


FILES: dict[str, Callable[[Path], Any]] = {
    "memo of 4 billion": _bare(b"\x80\x02}r\xff\xff\xff\xff(X\x01\x00\x00\x00ah\x07u."),
    "memo that is not there": _bare(b"\x80\x02h\x63."),
    "text of 2 GB": _bare(b"\x80\x02X" + struct.pack("<I", 2**31 - 1) + b"a."),
    "bytes of 4 EB": _bare(b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"a."),
    "number of 2 GB": _bare(b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"\xff."),
    "frame of 4 EB": _bare(b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"cos\nsystem\n."),
    "bytearray": _bare(b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x10\x85R."),
    "persistent id of torch.load": _bare(b"\x80\x02X\x04\x00\x00\x00evilQ."),
    "persistent id in text": _bare(b"Pevil\n."),
    "extension code": _bare(b"\x80\x02\x82\x01."),
    "INST": _bare(b"(S'touch x'\nios\nsystem\n."),
    "OBJ": _bare(b"(cos\nsystem\nS'touch x'\no."),
    "STACK_GLOBAL": _bare(b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94\x93\x8c\x06touch \x85R."),
    "NEWOBJ_EX": _bare(b"\x80\x04cbuiltins\nset\n)}\x92."),
    "BUILD on a name": _bare(b"\x80\x02ctorch\nSize\n}X\x01\x00\x00\x00aK\x01sb."),
    "call of a result": _bare(b"\x80\x02cbuiltins\ngetattr\n)R)R."),
    "key that takes for ever to hash": _bare(b"\x80\x02}()" + b"2\x86" * 90 + b"K\x01u."),
    "list in a million lists": _bare(b"\x80\x02" + b"(" * 1_000_000 + b"l" * 1_000_000 + b"."),
    "no STOP": _bare(b"\x80\x02}"),
    "empty": _bare(b""),
    "items of a tuple": _bare(b"\x80\x02(K\x01tK\x01K\x02s."),
    "items of a text": _bare(b"\x80\x02X\x01\x00\x00\x00a(K\x01K\x02u."),
    "append to a dict": _bare(b"\x80\x02}K\x01a."),
    "state of a text": _bare(b"\x80\x02X\x01\x00\x00\x00a}b."),
    "state of a name": _bare(b"\x80\x02cbuiltins\ngetattr\n}X\x08\x00\x00\x00__call__cos\nsystem\nsb."),
    "name within a name": _bare(b"\x80\x04\x8c\x0bcollections\x8c\x20OrderedDict.__init__.__globals__\x93."),
    "name under no module": _bare(b"\x80\x04\x8c\x00\x8c\x10builtins.getattr\x93."),
    "name that is no text": _bare(b"\x80\x04K\x01K\x02\x93."),
    "argument that is no tuple": _bare(b"\x80\x02ccollections\nOrderedDict\n]R."),
    "storage in a list": _bare(b"\x80\x02]X\x07\x00\x00\x00storageaQ."),
    "encode that doubles": _encoded,
    "zip bomb": _inflated,
    "zip traversal": _traversal,
    "tensor of 4 TB": lambda path: _storage(b"K\x00(\x8a\x06\x00\x00\x00\x00\x00\x01t(K\x00t", path),
    "tensor outside its storage": lambda path: _storage(b"K\x02(K\x04t(K\x01t", path),
    "tensor of a negative stride": lambda path: _storage(b"K\x03(K\x04t(J\xff\xff\xff\xfft", path),
    "storage of another size": lambda path: _storage(b"K\x00(K\x04t(K\x01t", path, b"\0" * 15),
    "tensor of 65 dimensions": lambda path: _storage(b"K\x00(" + b"K\x01" * 65 + b"t(" + b"K\x01" * 65 + b"t", path),
    "tensor as long as a text": lambda path: _storage(b"K\x00X\x01\x00\x00\x00a(K\x01t", path),
    "tensor of 2 to the 80": lambda path: _storage(b"K\x00(\x8a\x0b" + b"\0" * 10 + b"\x01t(K\x01t", path),
    "tensor of a negative size": lambda path: _storage(b"K\x00(J\xff\xff\xff\xfft(K\x01t", path),
    "tensor of a negative offset": lambda path: _storage(b"J\xff\xff\xff\xff(K\x04t(K\x01t", path),
    "tensor that repeats one number": lambda path: _storage(b"K\x00(M\xff\xfft(K\x00t", path),
    "entries over each other": _overlapping,
    "safetensors": lambda path: path.write_bytes(safetensors.torch.save({"x": torch.ones(2)})),
    "legacy format": lambda path: torch.save({"state_dict": {}}, path, _use_new_zipfile_serialization=False),
    "legacy format that runs": lambda path: path.write_bytes(pickle.dumps(Call(os.system, "touch x"))),
    "tar": _tar,
}


READ_ALL = """
import json, sys
from pathlib import Path
from sft_core.convert.reader import read_pickle
from sft_core.errors import SftError
said = {}
for path in sorted(Path(sys.argv[1]).glob("*.pth")):
    try:
        said[path.stem] = str(type(read_pickle(path)))
    except SftError as error:
        said[path.stem] = f"refused: {error}"
print(json.dumps(said))
"""


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (120, 120))


def run_limited(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        preexec_fn=limited,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """One file for each attack, numbered; and what a process in bounded memory said of each."""
    folder = tmp_path_factory.mktemp("hostile")
    for number, attack in enumerate(RUNNING.values()):
        torch.save({"meta": {}, "state_dict": {"x": attack(folder / "executed")}}, folder / f"{number}.pth")
    for number, write in enumerate(FILES.values(), len(RUNNING)):
        write(folder / f"{number}.pth")
    empty = tmp_path_factory.mktemp("empty")
    run = run_limited("-c", READ_ALL, str(folder), cwd=empty)
    assert run.returncode == 0, run.stderr[-2000:]
    assert not (folder / "executed").exists()
    assert not list(empty.iterdir())
    return folder, json.loads(run.stdout)


@pytest.mark.parametrize("number", range(len(RUNNING) + len(FILES)), ids=[*RUNNING, *FILES])
def test_hostile_files_are_refused_and_nothing_runs(hostile: tuple[Path, dict[str, str]], number: int) -> None:
    folder, said = hostile
    assert said[str(number)].startswith(f"refused: {folder / f'{number}.pth'}: ")


@pytest.mark.parametrize("name", list(RUNNING))
def test_the_attacks_work_on_a_reader_that_executes(name: str, tmp_path: Path) -> None:
    torch.save({"x": RUNNING[name](tmp_path / "executed")}, tmp_path / "x.pth")
    with contextlib.suppress(TypeError, AttributeError, ValueError):  # raised behind the attack
        torch.load(tmp_path / "x.pth", weights_only=False)
    assert (tmp_path / "executed").exists()


def test_the_command_says_one_line_and_exits_with_1(hostile: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    run = run_limited(
        "-m", "cli.main", "convert", "pth-to-hf", "recipe.yaml", str(hostile[0] / "0.pth"), "out", cwd=tmp_path
    )
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert "posix.system" in run.stderr + run.stdout
    assert not (hostile[0] / "executed").exists()
