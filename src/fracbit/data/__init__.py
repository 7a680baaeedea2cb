"""Token streams: files, data sets and self-generated text, each with the hash of the bytes that were read."""

from fracbit.data.read import read_documents, read_sources
from fracbit.data.samples import read_calibration
from fracbit.data.self_text import generate_calibration
from fracbit.data.tokens import Opening, Samples, Tokens, hash_ids, sample, shared_documents
from fracbit.records.text_source import ID_FORMATS, TextSource, parse_source

__all__ = [
    "ID_FORMATS",
    "Opening",
    "Samples",
    "TextSource",
    "Tokens",
    "generate_calibration",
    "hash_ids",
    "parse_source",
    "read_calibration",
    "read_documents",
    "read_sources",
    "sample",
    "shared_documents",
]
