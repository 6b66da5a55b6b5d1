"""Faults that a user can mend. Everything else is a bug and keeps its traceback.

SftError
 +-- RecipeError      the recipe, or an override of it, is wrong
 +-- SourceError      a data source is missing or unreadable
 +-- DataError        rows, turns or labels are not fit to train on
 |    +-- RowError    one row cannot be read; carries the reason that the quarantine counts
 +-- DiskError        a disk is full or read-only, a right is missing, a name is too long
 +-- MemoryFault      a GPU's or the machine's memory ran out
 +-- PlanError        something is no longer as it was planned
 +-- StoreError       an artifact is missing, torn or altered
 +-- TrainError       the training process failed
 +-- ModelError       a checkpoint, adapter or model folder is wrong
 +-- RegistryError    MLflow's registry refused or lacks something

A message says what (with the value), where (file, row, key) and what to do. Secrets of URLs in it are shown as `***`.
"""

from sft_core.credentials import without_credentials


class SftError(Exception):
    """Base of all faults that a user can mend; the command line prints it without a traceback."""

    def __init__(self, *said: object) -> None:
        super().__init__(*(without_credentials(part) if isinstance(part, str) else part for part in said))


class RecipeError(SftError):
    """The recipe, or an override of it, is wrong."""


class SourceError(SftError):
    """A data source is missing or unreadable."""


class DataError(SftError):
    """Rows, turns or labels are not fit to train on."""


class RowError(DataError):
    """One row cannot become a conversation. `reason` is a short slug to count by, such as `missing_column`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class DiskError(SftError):
    """A disk is full or read-only, a right is missing, a name is too long."""


class MemoryFault(SftError):
    """A GPU's or the machine's memory ran out."""


class PlanError(SftError):
    """What a step would read, or the code that runs it, is not what was planned."""


class StoreError(SftError):
    """An artifact is missing, torn or altered."""


class TrainError(SftError):
    """The training process failed."""


class ModelError(SftError):
    """A checkpoint, adapter or model folder is wrong."""


class RegistryError(SftError):
    """The model registry refused or lacks something."""
