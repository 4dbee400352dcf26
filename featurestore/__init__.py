"""Braid's feature store: read, search and train from aligned multimodal embeddings.

    from featurestore import FeatureStore
    store = FeatureStore("build/stamps-store")
    store.search("stamps", text="a red bird", k=3)

Nothing here imports Beam; torch and faiss are imported by the calls that need them, pyarrow and deltalake by the first use of
a name of this package, so that a command's `--help` does not wait for them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featurestore.errors import BraidError
    from featurestore.storage import Storage
    from featurestore.store import FeatureStore

__all__ = ["BraidError", "FeatureStore", "Storage"]

_HOMES = {"BraidError": "errors", "FeatureStore": "store", "Storage": "storage"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'featurestore' has no attribute {name!r}; it has: {', '.join(__all__)}")
    import importlib

    return getattr(importlib.import_module(f"featurestore.{_HOMES[name]}"), name)
