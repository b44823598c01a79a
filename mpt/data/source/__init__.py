"""Where text comes from: documents, always in the same order, from each kind of source."""

from mpt.data.source.document import Document, Meter
from mpt.data.source.documents import documents
from mpt.data.source.place import Source, find_source

__all__ = ["Document", "Meter", "Source", "documents", "find_source"]
