"""Arguments travel with the files they name."""

import pickle
from dataclasses import dataclass
from pathlib import Path

from sft_core.parcels import pack_parcel, unpacked


@dataclass(frozen=True)
class Argument:
    shard: Path
    folder: Path
    name: str


def test_files_and_folders_travel_once(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    (folder / "inside").mkdir(parents=True)
    (folder / "inside" / "a.json").write_text("{}")
    arguments = []
    for number in range(3):
        (tmp_path / f"part-{number}").write_text(f"rows {number}")
        arguments.append(Argument(tmp_path / f"part-{number}", folder, f"n{number}"))
    sent = pickle.loads(pickle.dumps(pack_parcel(arguments)))
    assert len(sent.contents) == 4
    for argument in arguments:
        argument.shard.unlink()
    with unpacked(sent) as there:
        assert [argument.shard.read_text() for argument in there] == ["rows 0", "rows 1", "rows 2"]
        assert {argument.folder for argument in there} == {there[0].folder}
        assert (there[0].folder / "inside" / "a.json").read_text() == "{}"
        assert [argument.name for argument in there] == ["n0", "n1", "n2"]
        left = there[0].shard
    assert not left.exists()
