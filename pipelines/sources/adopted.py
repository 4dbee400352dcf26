"""What a tar must be like to be adopted: indexed where it lies, one shard as it is, its values read from there ever after.

The members of a sample stand side by side, each name once, and all are files: then `webdataset` reads the tar as Braid does,
sample by sample in the same order. What keeps a tar from it is told with its place before anything is stored.
"""

from featurestore.errors import InputError
from featurestore.identity import hash64
from pipelines.sources.tar_members import CutOff, Member

__all__ = ["Rules"]

_COPY = "leave adopt out of corpus.source: then its samples are copied"


class Rules:
    """Proves one tar, member by member in its order. Holds 8 bytes a sample.

    Args:
        uri: the tar.
        by_key: whether the samples' ids are of their keys, which a copy needs to be unique in the tar too.

    Raises:
        InputError: from every method, where the tar cannot be adopted.
    """

    def __init__(self, uri: str, by_key: bool) -> None:
        self._uri, self._by_key = uri, by_key
        self._key, self._extensions, self._keys = "", dict[str, int](), set[int]()
        self._samples = self._found = 0
        try:
            uri.encode()
        except UnicodeEncodeError:
            raise InputError(f"{uri!a}: its name is not UTF-8, so that nothing can refer to it; rename it") from None

    def take(self, member: Member, key: str, extension: str) -> None:
        """The next member, whose key is empty where it belongs to no sample."""
        if member.kind:
            raise self._refusal(member.start, f"{member.name!r} is {member.kind}", _COPY)
        if not key:
            return
        if key != self._key:
            if (hashed := hash64(repr(key))) in self._keys:
                told = f"key {key!r} comes back after {self._key!r}: the members of a sample must stand side by side"
                raise self._refusal(member.start, told, "take it out of corpus.source.path" if self._by_key else _COPY)
            self._keys.add(hashed)
            self._key, self._extensions = key, {}
        if (first := self._extensions.setdefault(extension, member.start)) != member.start:
            raise self._refusal(member.start, f"{member.name!r} stands twice, first at byte {first}", _COPY)

    def cut_off(self, size: int, cut: CutOff) -> InputError:
        """The error for a tar of this size that is not whole."""
        return self._refusal(size, str(cut), _COPY)

    def sample(self, values: int) -> None:
        """The next sample has so many of the values that are asked for."""
        self._samples += 1
        self._found += values

    def end(self) -> None:
        """The tar has no more samples."""
        if self._samples and not self._found:
            raise InputError(
                f"{self._uri}: none of its {self._samples} samples has a value that corpus.fields asks for, so it makes no "
                "shard; correct corpus.fields, or take it out of corpus.source.path"
            )

    def _refusal(self, at: int, what: str, mend: str) -> InputError:
        return InputError(
            f"{self._uri}, byte {at}: {what}; such a tar cannot be adopted as it is: write it again, or {mend}"
        )
