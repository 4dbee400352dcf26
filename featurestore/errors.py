"""Braid's exceptions: one root, and one class per thing that a caller can do about it.

Every message says what is wrong, the value, what is allowed, where (shard, id, field) and the mend; none a password.
"""

from featurestore.addresses import redacted

__all__ = [
    "AlignmentError",
    "BraidError",
    "BudgetExceeded",
    "DecodeError",
    "EndpointError",
    "InputError",
    "JobError",
    "MissingExtra",
    "NotFound",
    "SpecError",
    "StoreError",
    "WorkerDied",
]


class BraidError(Exception):
    """Root of every error that Braid raises on purpose. Its text is meant for a person, and its addresses hold no password."""

    def __init__(self, *told: object) -> None:
        super().__init__(*(redacted(each) if isinstance(each, str) else each for each in told))


class InputError(BraidError):
    """An argument or an input file is wrong: correct it and call again."""


class SpecError(InputError):
    """The spec is wrong: its text lists every mistake with line, value, what is allowed and the mend."""


class NotFound(BraidError):
    """The store has no such corpus, view, index, set, version or id: its text lists what there is."""


class StoreError(BraidError):
    """The store cannot be read or written: check its address, its rights and its options."""


class AlignmentError(StoreError):
    """An artefact does not hold what the catalog says: run `braid verify`, then `braid run` to remake it."""


class BudgetExceeded(BraidError):
    """More values were rejected than the spec's failure budget allows: `braid quarantine SPEC` lists them."""


class WorkerDied(BraidError):
    """A worker process was killed or ended by itself: nothing was published, run it again."""


class JobError(BraidError):
    """The engine refused a job, or ended it: nothing of it was published. Mend what it says, and run it again."""


class EndpointError(BraidError):
    """A remote model does not answer, not as it should, or has been asked as much as it may: run it again later."""


class MissingExtra(BraidError):
    """A package of an optional extra is not installed: install the extra that its text names."""


class DecodeError(BraidError):
    """One value cannot be decoded. It goes to quarantine with `reason`; its batch goes on.

    Attributes:
        reason: a short code, e.g. `empty`, `not_text`, `invalid_utf8`, `decode_error`, `too_large`, `refused`, `nan_output`.
        detail: what the decoder said, for the quarantine table.
    """

    def __init__(self, reason: str, detail: str) -> None:
        # Both as they came, or it could not be pickled.
        super().__init__(reason, detail)
        self.reason: str = self.args[0]
        self.detail: str = self.args[1]

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"
