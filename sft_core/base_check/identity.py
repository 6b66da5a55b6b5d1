"""Which base an adapter was trained on, as its folder says it: a name for people, a fingerprint for the merge.

In: what the recipe calls the base, and its folder where it is on this disk. Out: `base_model.json` beside the adapter,
which PEFT does not read. A path is no name: elsewhere there is another folder, or none.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from sft_core.errors import ModelError
from sft_core.fingerprint import canonical_json

RECORD = "base_model.json"
SNAPSHOT = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})$")
"""Where the hub's client keeps a model."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
BLOCKS, BLOCK_BYTES = 16, 4096
"""Of a tensor that has more bytes, as many blocks of that size count, spread evenly from its first byte to its last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseIdentity:
    """`name`: hub id, or the folder's own name. `commit`: of the hub. `weights`: see `weights_fingerprint`; None if
    they were not at hand."""

    name: str
    on_hub: bool
    commit: str | None
    weights: str | None

    def write(self, folder: Path) -> None:
        """Beside the adapter."""
        text = json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"
        (folder / RECORD).write_text(text, "utf-8")

    def metadata(self) -> str:
        """The line of a model card's metadata, which the hub wants to be a hub id; '' for a local folder."""
        return f"base_model: {json.dumps(self.name)}\n" if self.on_hub else ""

    def words(self) -> str:
        """`some/base` or `base` (a local folder), and its fingerprint as far as people read one."""
        where = "" if self.on_hub else " (a local folder)"
        return f"{self.name}{where}" + (f", weights {self.weights[:12]}" if self.weights else "")


def identity_of(given: str, folder: Path | None) -> BaseIdentity:
    """Of the base that a recipe calls `given`; `folder`: where its files are, if they are on this disk."""
    local = Path(given).is_dir()
    snapshot = SNAPSHOT.search(str((folder or Path(given)).absolute()))
    name = given
    if local or not HUB_ID.fullmatch(given):
        name = f"{snapshot['owner']}/{snapshot['name']}" if snapshot else Path(given).absolute().resolve().name
    weights = None
    if folder is not None and folder.is_dir():
        try:
            weights = weights_fingerprint(folder)
        except ModelError:  # only its config.json is here
            weights = None
    on_hub = bool(snapshot) or (not local and HUB_ID.fullmatch(given) is not None)
    return BaseIdentity(name=name, on_hub=on_hub, commit=snapshot["commit"] if snapshot else None, weights=weights)


def recorded_identity(folder: Path) -> BaseIdentity | None:
    """What an adapter's folder says; None where another program wrote it. ModelError if the file is no such record."""
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        return BaseIdentity(**json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path}: no record of a base model ({error}); convert the checkpoint again") from None


def foreign_identity(name: str) -> BaseIdentity:
    """Of an adapter that has PEFT's `base_model_name_or_path` alone, which may be a path on someone's machine."""
    on_hub = "/" in name and HUB_ID.fullmatch(name) is not None
    return BaseIdentity(name=name if on_hub else Path(name).name or name, on_hub=on_hub, commit=None, weights=None)


def require_same_base(folder: Path, recorded: BaseIdentity, base: Path, *, other_base: bool) -> str:
    """One line on what was compared. ModelError if the base is not the one that the adapter was trained on, unless
    `other_base` says that it need not be.
    """
    if recorded.weights is None:
        return f"not compared: {folder} does not record the weights it was trained on"
    found = weights_fingerprint(base)
    if found == recorded.weights:
        return "the weights the adapter was trained on"
    if other_base:
        return f"other weights than the adapter was trained on ({recorded.words()}), as was asked for"
    raise ModelError(
        f"{folder} was trained on {recorded.words()}, and the base {base} has other weights ({found[:12]}) of the same "
        "kind: the merged model would be neither. Give the base of the training; to merge all the same, --other-base"
    )


def weights_fingerprint(folder: Path) -> str:
    """SHA-256 of every tensor's name, dtype, shape and sampled bytes: the same however the model is cut into files and
    wherever it lies, another one for any other training. ModelError if the weights are not all there.
    """
    from sft_core.base_check.weights import weights_in

    digest = hashlib.sha256()
    for name, weight in sorted(weights_in(folder).items()):
        place = weight.place
        digest.update(canonical_json([name, str(place.dtype), list(place.shape)]).encode())
        size = place.slot(name).nbytes
        with place.file.open("rb") as file:
            for start, length in _blocks(size):
                file.seek(place.offset + start)
                digest.update(file.read(length))
    return digest.hexdigest()


def _blocks(size: int) -> list[tuple[int, int]]:
    """Start and length of what is read of a tensor of `size` bytes."""
    if size <= BLOCKS * BLOCK_BYTES:
        return [(0, size)]
    last = size - BLOCK_BYTES
    return [(last * i // (BLOCKS - 1), BLOCK_BYTES) for i in range(BLOCKS)]
