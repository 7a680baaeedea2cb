"""The text that comes with every Python: the bundled model's training text, and the text held out from it."""

from __future__ import annotations

from collections.abc import Iterator

from fracbit.data.raw import RawTexts, hash_texts, keep_first
from fracbit.records.text_source import TextSource


def read_bundled(source: TextSource) -> RawTexts:
    """Read modules of the standard library: one text, as fracbit.bundled joins it, or a document each.

    Raises: DataError when this Python has no source files.
    """
    from fracbit import bundled

    held_out = source.split == "held-out"
    if source.documents == "one":
        text = bundled.held_out_text() if held_out else bundled.training_text()
        return keep_first(source, [("the whole text", text)], lambda: hash_texts([text]))
    seen: list[str] = []

    def modules() -> Iterator[tuple[str, str]]:
        for name in bundled.HELD_OUT if held_out else bundled.training_modules():
            seen.append(bundled.module_text(name))
            yield name, seen[-1]

    return keep_first(source, modules(), lambda: hash_texts(seen))
