"""Token streams: files, sets and self-generated text, each with the hash of what was read."""

from fracbit.data.calibration import read_calibration
from fracbit.data.generate import generate_calibration
from fracbit.data.read import read_documents, read_sources
from fracbit.data.source import Source, parse_source
from fracbit.data.tokens import Calibration, Opening, Tokens, hash_ids, sample, shared_documents

__all__ = [
    "Calibration",
    "Opening",
    "Source",
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
