"""Describe any error in one sentence with its cause and what to do about it.

Exceptions of other libraries are recognized by name, so that the libraries need not be imported.
"""

from __future__ import annotations

import errno
import os
import platform
import re
import shlex
import sys
import traceback
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from peso.errors import PesoError

DONE, FAILED, MISUSED, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143  # exit statuses
HOW_STOPPED = {INTERRUPTED: "interrupted", TERMINATED: "terminated by SIGTERM"}
AGAIN = "run the same command again to continue"

MEMORY = (
    "use a machine with more memory, or reduce training.batch_size, decoding.batch_size or the size of the "
    "backbone; `peso run CONFIG --dry-run` estimates the memory needed"
)
DAMAGED = "the file is damaged or not of the expected type; download or create it again"
NETWORK = (
    "check the network connection and the name, or download the files in advance (`peso pull`; with "
    "HF_HUB_OFFLINE=1 only the cache is used)"
)
SPARK = "check Spark's own messages above and its configuration, or use data.engine: duckdb"
LOST = "see its last output above, and run the same command again; it continues from the newest checkpoint"
FULL = "free some space and run the same command again; it continues where it stopped"

# what to do about an OSError, by its number
OF_NUMBER = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or use a file system that allows larger files",
    errno.EROFS: "choose a writable location",
    errno.EACCES: "check the owner and the permissions (ls -ld), or choose another location",
    errno.EPERM: "check the owner and the permissions (ls -ld), or choose another location",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EISDIR: "name a file, not a directory",
    errno.ENOTDIR: "a part of the path is a file; name a path below a directory",
    errno.ENOTEMPTY: "choose a path that does not exist yet",
    errno.EEXIST: "choose a path that does not exist yet",
    errno.ENOENT: "check the path",
    errno.ELOOP: "the symbolic links in the path form a loop",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "close other programs, or raise the system's limit on open files",
    errno.EIO: "the disk or the network file system failed; check it and run the same command again",
    errno.ESTALE: "the network file system lost the file; mount it again and run the same command again",
    errno.EAGAIN: "the limit on processes or locks is reached (ulimit -u); stop other processes or raise it",
    errno.ENOMEM: MEMORY,
    errno.EINVAL: "the path cannot be used for this; choose another location",
    errno.EXDEV: "choose a location on the same file system",
    errno.EBUSY: "another program uses it; close that program, or choose another location",
    errno.ETXTBSY: "another program uses it; close that program, or choose another location",
    errno.EOPNOTSUPP: "the file system does not support this; choose a location on a local disk",
    errno.ENOLCK: "the file system does not support locks; choose a location on a local disk",
    errno.ENOSYS: "the file system does not support this; choose a location on a local disk",
    errno.ENXIO: "the path is a device or a pipe; name a regular file",
    errno.ENODEV: "the path is a device or a pipe; name a regular file",
    errno.ESPIPE: "the path is a device or a pipe; name a regular file",
    errno.EPIPE: "the program that read the output has ended",
}
# the cause and what to do, by class, the most specific classes first
OF_CLASS = (
    ("torch.OutOfMemoryError", "out of GPU memory", MEMORY),
    ("_duckdb.OutOfMemoryException", "out of memory while reading the data", MEMORY),
    ("builtins.MemoryError", "out of memory", MEMORY),
    (
        "torch.AcceleratorError",
        "the GPU failed",
        "run the same command again to continue; nvidia-smi shows the state of the GPU",
    ),
    ("torch.distributed.DistError", "another process that trains with this one has ended", LOST),
    (
        "huggingface_hub.errors.HFValidationError",
        "not a valid name on the Hugging Face hub",
        "check the name",
    ),
    ("huggingface_hub.errors.EntryNotFoundError", "not found on the Hugging Face hub", NETWORK),
    ("huggingface_hub.errors.OfflineModeIsEnabled", "offline", NETWORK),
    ("httpx2.HTTPError", "the download failed", NETWORK),
    ("httpx.HTTPError", "the download failed", NETWORK),
    ("requests.exceptions.RequestException", "the download failed", NETWORK),
    ("urllib.error.URLError", "the download failed", NETWORK),
    ("builtins.ConnectionError", "the connection failed", NETWORK),
    ("builtins.TimeoutError", "the request timed out", NETWORK),
    ("gzip.BadGzipFile", "a compressed file cannot be read", DAMAGED),
    ("zipfile.BadZipFile", "a zip file cannot be read", DAMAGED),
    ("zlib.error", "a compressed file cannot be read", DAMAGED),
    ("_lzma.LZMAError", "a compressed file cannot be read", DAMAGED),
    ("builtins.EOFError", "a file is truncated", DAMAGED),
    ("_pickle.UnpicklingError", "a weights or checkpoint file cannot be read", DAMAGED),
    (
        "safetensors._safetensors_rust.SafetensorError",
        "a safetensors file cannot be read or written",
        DAMAGED,
    ),
    ("pyarrow.lib.ArrowException", "a Parquet or Arrow file cannot be read or written", DAMAGED),
    ("_duckdb.InvalidInputException", "the data cannot be read", "check the file and the data section"),
    ("pyspark.errors.exceptions.base.PySparkException", "Spark failed", SPARK),
    ("py4j.protocol.Py4JError", "Spark failed", SPARK),
    ("_duckdb.Error", "the data cannot be read", "check the files that the data section names"),
    ("yaml.error.YAMLError", "a file is not valid YAML", "correct it at the given position"),
    ("json.decoder.JSONDecodeError", "a file is not valid JSON", DAMAGED),
    ("pydantic_core._pydantic_core.ValidationError", "a configuration has an invalid value", "correct it"),
    ("builtins.UnicodeDecodeError", "a file is not UTF-8 text", "convert it to UTF-8"),
    ("builtins.UnicodeEncodeError", "a name or text has a character that cannot be encoded", "rename it"),
    ("builtins.RecursionError", "something is nested too deeply", "check the configuration and the files"),
)
# the cause and what to do, by a text in the message, for classes that are too general
OF_TEXT = (
    ("can't allocate memory", "out of memory", MEMORY),
    ("out of memory", "out of memory", MEMORY),
    ("embedded null", "a path contains a null character", "remove it"),
    ("determine home directory", "a path begins with ~ and an unknown user name", "write the full path"),
    ("gloo/transport", "another process that trains with this one has ended", LOST),
    ("symlink loop", "the symbolic links in a path form a loop", "correct them"),
    ("os error 28", "no space left on the device", FULL),
    ("can't start new thread", "no more threads can be started", "raise the limit on processes (ulimit -u)"),
)


def sentence(error: BaseException) -> str | None:
    """The cause of an error and what to do about it, in one sentence; None if it must be a bug in peso.

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
        return f"the Python package {error.name} is not installed; reinstall peso with its dependencies"
    for name, cause, cure in OF_CLASS:
        if name in classes:
            return f"{cause} ({first_line(error)}); {cure}"
    if not isinstance(error, OSError):
        return None
    if error.errno is None:  # only a message; Transformers raises such errors for files missing on the hub
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
    """The information for a bug report, without a traceback: error, location, version and command."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "peso" in Path(frame.filename).parts] or frames
    at = f" at {Path(own[-1].filename).name}:{own[-1].lineno} in {own[-1].name}" if own else ""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    return (
        f"{type(error).__name__}: {_first_line(str(error))}{at}\n"
        "This is a bug in peso. Please report it with the line above, the two lines below, and the output of "
        "the command with PESO_DEBUG=1 before it:\n"
        f"  peso {installed_version()}, Python {platform.python_version()}, {platform.platform()}\n"
        f"  command: {shlex.join(words)}"
    )


def installed_version() -> str:
    """The version of the installed package; ``unknown`` if it is imported from its source tree."""
    try:
        return version("peso")
    except PackageNotFoundError:
        return "unknown"


def debugging() -> bool:
    """Whether tracebacks are shown, because of ``peso --debug`` or PESO_DEBUG=1."""
    return os.environ.get("PESO_DEBUG", "") not in ("", "0")


def explain(error: BaseException) -> str:
    """The text to print for an error: its traceback if debugging, then a sentence or a bug report."""
    shown = "".join(traceback.format_exception(error)) if debugging() else ""
    return f"{shown}error: {sentence(error) or 'unexpected ' + unexpected(error)}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class if it has no message."""
    return _first_line(str(error)) or type(error).__name__


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


# C0 and C1 control characters, line separators, bidirectional overrides, lone surrogates
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_BREAKS = re.compile("[\t\n]")


def listed(names: Iterable[str], most: int = 5) -> str:
    """The first of several names, and the number of the others.

    >>> listed(["a", "b", "c", "d"], 2)
    'a, b and 2 more'
    """
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def printable(text: str, *, one_line: bool = False) -> str:
    r"""The text with control characters escaped as ``\u001b``, which JSON reads back as the same character.

    Args:
        one_line: whether to escape tabs and line ends too.

    >>> printable("red \x1b[31m\n"), printable("a\nb", one_line=True)
    ('red \\u001b[31m\n', 'a\\u000ab')
    """
    text = _UNSAFE.sub(_written_out, text)
    return _BREAKS.sub(_written_out, text) if one_line else text


def _written_out(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"
