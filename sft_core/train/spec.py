"""What the parent tells the training process: one JSON file, so that any launcher can start it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from sft_core.recipe import TrainConfig

MAPPED = "packed.arrow"
"""Beside the checkpoints: the packed rows, mapped by all ranks."""
SILENCE_SECONDS = 45.0
"""What ranks allow the process that started them, where nobody says: three quarters of a lease."""
SAMPLES = "samples.jsonl"
"""Beside the checkpoints: answers to the recipe's `sample_prompts`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSpec:
    """Folders are absolute. `checkpoints` holds resumable state, `metrics` gets one JSON line a logged step."""

    packed: str
    base_model: str
    trust_remote_code: bool
    train: dict[str, Any]
    seed: int
    checkpoints: str
    metrics: str
    conversations: str | None = None
    """Folder that tells where a row comes from."""
    resize: bool = False
    """Whether the newest checkpoint was written by another number of ranks."""
    checkpoint_every: int = 1
    """Where activations are recomputed: in all layers (1), or in every n-th."""
    split_was_chosen: bool = False
    """Whether rows at once, or what is recomputed, were `auto` in the recipe; `train` then has what was chosen."""
    silence_seconds: float = SILENCE_SECONDS
    """Without a sign of life of the process that started them, ranks end themselves after so long."""
    cuda: bool | None = None
    """Whether the run was started for GPUs; a rank that cannot use one then fails. null: nobody looked."""

    @property
    def config(self) -> TrainConfig:
        """The recipe's section, validated again."""
        return TrainConfig.model_validate(self.train)

    def write(self, path: Path) -> None:
        """Save as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1), "utf-8")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Back from `write`."""
        return cls(**json.loads(path.read_text("utf-8")))
