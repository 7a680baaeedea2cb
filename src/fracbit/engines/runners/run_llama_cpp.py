"""Runs in the environment of llama.cpp: what it predicts for a text, which it cuts into ids itself.

llama-perplexity writes the log-probabilities of the second half of every sample, 16 bits each, down to e^-16 of the likeliest.
"""

import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy
from answer import answer, asked

TOOL = Path(sys.prefix) / "llama.cpp" / "build" / "bin" / "llama-perplexity"


def main():
    """Let the tool write its log-probabilities, and read them."""
    given = asked()
    model, kept = Path(given.export), given.out / "kept"
    model = model / "model.gguf" if model.is_dir() else model
    length, samples = given.ids.shape[1], given.ids.shape[0]
    words = [
        TOOL,
        "-m",
        model,
        "-f",
        given.text,
        "-c",
        length,
        "-b",
        length,
        "--chunks",
        samples,
        "--kl-divergence-base",
        kept,
    ]
    threads = os.environ.get("OMP_NUM_THREADS")
    words += ["-t", threads] if threads else []
    ran = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    if ran.returncode or not kept.is_file():
        sys.exit(ran.stderr[-2000:])
    ids, logs = read(kept)
    reader = gguf.GGUFReader(model)
    if flag(reader, "tokenizer.ggml.add_bos_token"):
        ids[:, 0] = flag(reader, "tokenizer.ggml.bos_token_id")
    answer(given.out, {"llama.cpp": "build 11434"}, ids=ids, logits=logs, first=length // 2, in_part=True)
    kept.unlink()


def read(path):
    """Ids int [samples, length] and log-probabilities fp32 [samples, n, vocabulary], NaN where they are not told."""
    data = path.read_bytes()
    assert data[:8] == b"_logits_"
    length, vocabulary, samples = numpy.frombuffer(data, "<i4", 3, 8)
    ids = numpy.frombuffer(data, "<i4", samples * length, 20).reshape(samples, length).copy()
    width = 2 * ((vocabulary + 1) // 2) + 4
    rows = numpy.frombuffer(data, "<u2", offset=20 + 4 * samples * length)
    rows = rows.reshape(samples, length - 1 - length // 2, width)
    ends = numpy.ascontiguousarray(rows[..., :4]).view("<f4")  # scale and smallest log-probability
    codes = rows[..., 4 : 4 + vocabulary]
    logs = ends[..., :1] * codes + ends[..., 1:]
    return ids, numpy.where(codes == 0, numpy.nan, logs).astype(numpy.float32)


def flag(reader, key):
    """A number in the metadata of a file; 0 where it is not there."""
    field = reader.get_field(key)
    return 0 if field is None else int(field.contents())


if __name__ == "__main__":
    main()
