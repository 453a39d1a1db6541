"""What went wrong, in one sentence with cause and cure, whichever library raised it.

Exceptions of libraries are recognized by name, so that none of them is imported for it.
"""

from __future__ import annotations

import errno
import os
import platform
import re
import shlex
import sys
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from peso.errors import PesoError

DONE, FAILED, MISUSED, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143  # exit statuses
HOW_STOPPED = {INTERRUPTED: "interrupted", TERMINATED: "terminated by SIGTERM"}
AGAIN = "run the same command again to continue"

MEMORY = (
    "use a machine with more memory, or lower training.batch_size, decoding.batch_size or the size of the "
    "backbone; `peso run CONFIG --dry-run` estimates what is needed"
)
DAMAGED = "the file is damaged or not of the expected kind; fetch or write it again"
NETWORK = (
    "check the network connection and the name, or fetch the files beforehand (`peso pull`; HF_HUB_OFFLINE=1 "
    "uses only what is in the cache)"
)
FULL = "free some space and start the same command again: it continues where it was"

OF_NUMBER = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EFBIG: "the limit on the size of a file is too low (ulimit -f), or the file system's is",
    errno.EROFS: "choose a place that can be written",
    errno.EACCES: "check the owner and the permissions (ls -ld), or choose another place",
    errno.EPERM: "check the owner and the permissions (ls -ld), or choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EISDIR: "name a file, not a directory",
    errno.ENOTDIR: "a part of the path is a file; name a path below a directory",
    errno.ENOTEMPTY: "choose a path that does not exist yet",
    errno.EEXIST: "choose a path that does not exist yet",
    errno.ENOENT: "check the path",
    errno.ELOOP: "the symbolic links of the path form a circle",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "close other programs, or raise the system's limit on open files",
    errno.EIO: "the disk or the network file system failed; check it and start the same command again",
    errno.ESTALE: "the network file system lost the file; mount it again and start the same command again",
    errno.EAGAIN: "the system's limit on processes or locks is reached (ulimit -u); end others or raise it",
    errno.ENOMEM: MEMORY,
    errno.EINVAL: "the path cannot be used for this; choose another place",
    errno.EXDEV: "choose a place on the same file system",
    errno.EBUSY: "another program uses it; end that program, or choose another place",
    errno.ETXTBSY: "another program uses it; end that program, or choose another place",
    errno.EOPNOTSUPP: "the file system does not support it; choose a place on a local disk",
    errno.ENOLCK: "the file system does not support locks; choose a place on a local disk",
    errno.ENOSYS: "the file system does not support it; choose a place on a local disk",
    errno.ENXIO: "it is a device or a pipe; name an ordinary file",
    errno.ENODEV: "it is a device or a pipe; name an ordinary file",
    errno.ESPIPE: "it is a device or a pipe; name an ordinary file",
    errno.EPIPE: "the program that read the output has ended",
}
# by class, the most specific first: what it is about, and the cure
OF_CLASS = (
    ("torch.OutOfMemoryError", "out of GPU memory", MEMORY),
    ("_duckdb.OutOfMemoryException", "out of memory while reading the data", MEMORY),
    ("builtins.MemoryError", "out of memory", MEMORY),
    (
        "torch.AcceleratorError",
        "the GPU failed",
        "start the same command again: it continues; see nvidia-smi",
    ),
    ("huggingface_hub.errors.HFValidationError", "not a name on the Hugging Face hub", "check it"),
    ("huggingface_hub.errors.EntryNotFoundError", "not found on the Hugging Face hub", NETWORK),
    ("huggingface_hub.errors.OfflineModeIsEnabled", "offline", NETWORK),
    ("httpx2.HTTPError", "the download failed", NETWORK),
    ("httpx.HTTPError", "the download failed", NETWORK),
    ("requests.exceptions.RequestException", "the download failed", NETWORK),
    ("urllib.error.URLError", "the download failed", NETWORK),
    ("builtins.ConnectionError", "the connection failed", NETWORK),
    ("builtins.TimeoutError", "no answer in time", NETWORK),
    ("gzip.BadGzipFile", "a compressed file cannot be read", DAMAGED),
    ("zipfile.BadZipFile", "a zip file cannot be read", DAMAGED),
    ("zlib.error", "a compressed file cannot be read", DAMAGED),
    ("_lzma.LZMAError", "a compressed file cannot be read", DAMAGED),
    ("builtins.EOFError", "a file ends too early", DAMAGED),
    ("_pickle.UnpicklingError", "a file of weights or of a checkpoint cannot be read", DAMAGED),
    (
        "safetensors._safetensors_rust.SafetensorError",
        "a safetensors file cannot be read or written",
        DAMAGED,
    ),
    ("pyarrow.lib.ArrowException", "a Parquet or Arrow file cannot be read or written", DAMAGED),
    ("_duckdb.InvalidInputException", "the data cannot be read", "check the file and the data section"),
    ("_duckdb.Error", "the data cannot be read", "check the files that the data section names"),
    ("yaml.error.YAMLError", "a file is not valid YAML", "correct it at the place named"),
    ("json.decoder.JSONDecodeError", "a file is not valid JSON", DAMAGED),
    ("pydantic_core._pydantic_core.ValidationError", "a configuration has an invalid value", "correct it"),
    ("builtins.UnicodeDecodeError", "a file is not UTF-8 text", "convert it to UTF-8"),
    ("builtins.UnicodeEncodeError", "a name or text has a character that cannot be written", "rename it"),
    ("builtins.RecursionError", "something is nested too deeply", "check the configuration and the files"),
)
# by what a class too general says
OF_TEXT = (
    ("can't allocate memory", "out of memory", MEMORY),
    ("out of memory", "out of memory", MEMORY),
    ("embedded null", "a path contains a null character", "remove it"),
    ("determine home directory", "a path begins with ~ and a name that is no user's", "write it in full"),
    ("symlink loop", "the symbolic links of a path form a circle", "correct them"),
    ("os error 28", "no space left on the device", FULL),
    (
        "can't start new thread",
        "no further thread can be started",
        "raise the limit on processes (ulimit -u)",
    ),
)


def sentence(error: BaseException) -> str | None:
    """Cause and cure of an error, in one sentence; None where only the program itself can be at fault.

    >>> sentence(PermissionError(13, "Permission denied", "/root/x")).split("; ")[0]
    '/root/x: permission denied'
    >>> sentence(KeyError("x")) is None
    True
    """
    if isinstance(error, PesoError):
        return str(error)
    text = str(error)
    classes = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__}
    if isinstance(error, OSError) and error.errno in OF_NUMBER:
        return _of_number(error)
    if isinstance(error, RuntimeError | ValueError) or "Safetensor" in type(error).__name__:
        for words, cause, cure in OF_TEXT:
            if words in text:
                return f"{cause} ({_first_line(text)}); {cure}"
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("peso"):
        return f"the Python package {error.name} is not installed; install peso again, with its dependencies"
    for name, cause, cure in OF_CLASS:
        if name in classes:
            return f"{cause} ({_first_line(text) or type(error).__name__}); {cure}"
    if not isinstance(error, OSError):
        return None
    if error.errno is None:  # a message alone, as Transformers raises it for what the hub does not have
        hub = any("transformers" in frame.filename for frame in traceback.extract_tb(error.__traceback__))
        return f"{_first_line(text) or 'a file cannot be read or written'}; {NETWORK if hub else DAMAGED}"
    return _of_number(error)


def _of_number(error: OSError) -> str:
    paths = [str(path) for path in (error.filename, error.filename2) if path is not None]
    about = f"{' → '.join(paths)}: " if paths else ""
    number = error.errno or 0
    cause, cure = os.strerror(number), OF_NUMBER.get(number, "check the path and the file system")
    return f"{about}{cause[:1].lower()}{cause[1:]}; {cure}"


def unexpected(error: BaseException) -> str:
    """What a report of a defect needs, without a traceback: error, place, version and command."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "peso" in Path(frame.filename).parts] or frames
    at = f" at {Path(own[-1].filename).name}:{own[-1].lineno} in {own[-1].name}" if own else ""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    return (
        f"{type(error).__name__}: {_first_line(str(error))}{at}\n"
        "This is a defect in peso. Please report it with the line above, these two, and what PESO_DEBUG=1 "
        "before the command shows:\n"
        f"  peso {installed_version()}, Python {platform.python_version()}, {platform.platform()}\n"
        f"  command: {shlex.join(words)}"
    )


def installed_version() -> str:
    try:
        return version("peso")
    except PackageNotFoundError:  # imported from its source tree
        return "unknown"


def debugging() -> bool:
    """Whether tracebacks are asked for: ``peso --debug`` or PESO_DEBUG=1."""
    return os.environ.get("PESO_DEBUG", "") not in ("", "0")


def explain(error: BaseException) -> str:
    """What to print for an error: its traceback where that is asked for, then a sentence or a report."""
    shown = "".join(traceback.format_exception(error)) if debugging() else ""
    return f"{shown}error: {sentence(error) or 'unexpected ' + unexpected(error)}"


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


# C0 and C1 controls, line separators, overrides of the writing direction, halves of surrogate pairs
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_BREAKS = re.compile("[\t\n]")


def printable(text: str, *, one_line: bool = False) -> str:
    r"""The text with control characters as ``\u001b``, which JSON reads back as the same character.

    Args:
        one_line: write tabs and line ends out, too.

    >>> printable("red \x1b[31m\n"), printable("a\nb", one_line=True)
    ('red \\u001b[31m\n', 'a\\u000ab')
    """
    text = _UNSAFE.sub(_written_out, text)
    return _BREAKS.sub(_written_out, text) if one_line else text


def _written_out(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"
