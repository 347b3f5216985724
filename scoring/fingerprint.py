"""Which model was scored: a hash of what decides its answers. Imports nothing heavy: reports and tables ask for it."""

from pathlib import Path

import xxhash

PATTERNS = ("*.json", "*.model", "*.jinja", "*.txt", "*.safetensors")

RECORDS = ("palmtop.json", "pruning.json")
"""Files of a model folder that tell how it was made; the second is added to after scoring."""


def fingerprint(folder: Path) -> str:
    """A hash of all that decides a model's answers: configuration, tokenizer and weights."""
    digest = xxhash.xxh3_128()
    files = {file for pattern in PATTERNS for file in folder.glob(pattern) if file.name not in RECORDS}
    for file in sorted(files):
        digest.update(file.name.encode())
        with open(file, "rb") as stream:
            while chunk := stream.read(2**24):
                digest.update(chunk)
    return digest.hexdigest()
