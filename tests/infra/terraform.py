"""infra/terraform as python-hcl2 reads it: blocks with their labels and what stands in them."""

import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import hcl2

FOLDER = Path(__file__).parents[2] / "infra" / "terraform"
BLOCK = "__is_block__"


class Block(NamedTuple):
    """A top-level block: `resource "google_storage_bucket" "store" {…}` has the labels (google_storage_bucket, store)."""

    kind: str
    labels: tuple[str, ...]
    body: dict[str, Any]
    file: str

    @property
    def address(self) -> str:
        """How other blocks refer to it."""
        head = {"resource": (), "variable": ("var",)}.get(self.kind, (self.kind,))
        return ".".join((*head, *self.labels))


def plain(value: Any) -> Any:
    """The value without the quotes that python-hcl2 leaves around strings, and its comments and marks."""
    if isinstance(value, dict):
        return {plain(key): plain(each) for key, each in value.items() if not key.startswith("__")}
    if isinstance(value, list):
        return [plain(each) for each in value]
    return value[1:-1] if isinstance(value, str) and re.fullmatch(r'".*"', value, re.DOTALL) else value


def labelled(kind: str, tree: dict[str, Any], file: str, labels: tuple[str, ...] = ()) -> list[Block]:
    """Follows the nested mappings of a block's labels down to its body."""
    if tree.get(BLOCK):
        return [Block(kind, labels, plain(tree), file)]
    inner = [(key, each) for key, each in tree.items() if isinstance(each, dict)]
    return [block for key, each in inner for block in labelled(kind, each, file, (*labels, plain(key)))]


@cache
def blocks() -> tuple[Block, ...]:
    """Every top-level block of every file."""
    found: list[Block] = []
    for path in sorted(FOLDER.glob("*.tf")):
        for kind, trees in hcl2.loads(path.read_text()).items():
            if kind.startswith("__"):
                continue
            found += [block for tree in trees for block in labelled(kind, tree, path.name)]
    return tuple(found)


def of(kind: str) -> dict[str, Block]:
    """The blocks of one kind, by address."""
    return {block.address: block for block in blocks() if block.kind == kind}
