"""What the commands share: reading files with errors that name the fault, atomic writes, and how a command ends.

How it ends, `ended` and what is beside it, holds for the commands of ``eve_ds``, too.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import json
import os
import re
import secrets
import select
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

STREAMS = ("/dev/stdin", "/dev/fd/", "/proc/self/fd/")
OUTPUT_STREAMS = ("/dev/stdout", "/dev/stderr", *STREAMS[1:])
OUTPUTS = {"out", "per_question", "html"}  # options that name files to be written
STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG)
NO_MEMORY = "no memory is left; end other programs, raise the limit (ulimit -v) or take a larger machine"

SECRETS = re.compile(
    r"((?:s3[an]?|gs|hdfs|https?):/+|[a-z][a-z0-9+.-]{0,20}://)[^\s@]{0,400}@"
    r"|([?&]endpoint_override=)[^\s/@:&]{1,200}:[^\s/@&]{0,400}@|([?&][^=&?\s]{1,64}=)[^&\s'\"]+",
    re.IGNORECASE,
)
# Parameters that sign a URL, in the names of files that were downloaded from one. Others are harmless there.
KEYS = re.compile(r"([?&](?:x-(?:amz|goog)-[a-z-]{1,40}|signature|sig|[a-z_]{0,20}token)=)[^&\s:'\"]+", re.IGNORECASE)


class InputError(ValueError):
    """A user's bad input; ``str(error)`` is one line that names the file, row or option at fault."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line on stderr and exit code 2."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        self.add_argument("--local_rank", help=argparse.SUPPRESS)  # launchers pass it; it is ignored

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in argparse; also an error if an output is one of the inputs or the other output."""
        options = super().parse_args(args, namespace)
        values = vars(options).items()
        paths = {f"--{name}": value for name, value in values if isinstance(value, str)}
        listed = {name: value for name, value in values if isinstance(value, list)}  # without an option of their own
        paths |= {f"{name} {n}": path for name, value in listed.items() for n, path in enumerate(value, 1)}
        for output in {f"--{name}" for name in OUTPUTS} & paths.keys():
            for name in paths.keys() - {output}:
                if _same_file(paths[output], paths[name]):
                    self.error(f"{output} and {name} are one file, {paths[name]}")
        return options

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """As in argparse; an empty value is an error: as a path it would be the current folder."""
        if "" in arg_strings and action.nargs != argparse.PARSER:  # PARSER: all that a command is given
            raise argparse.ArgumentError(action, "is empty; give a value, or see that a shell variable is set")
        return super()._get_values(action, arg_strings)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {printable(message)} (--help lists the options)\n")


def without_secrets(text: str) -> str:
    """``text`` with *** for each user, password and parameter of the URLs in it."""
    if ":/" not in text:
        return KEYS.sub(lambda found: f"{found[1]}***", text) if "?" in text else text
    return SECRETS.sub(lambda found: f"{found[1] or found[2]}***@" if found[1] or found[2] else f"{found[3]}***", text)


def check_regular(path: str | Path, streams: bool = True) -> None:
    """Refuse a pipe or a device: reading one may block or never end.

    Pipes that the shell has opened, as in ``<(command)`` or /dev/stdin, are accepted, if ``streams``.

    Raises:
        InputError: ``path`` is one.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return  # reported when the file is read
    stream = streams and stat.S_ISFIFO(mode) and str(path).startswith(STREAMS)
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stream):
        raise InputError(f"{path}: is a pipe, a socket or a device; write its content to a file, and name that")


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[BinaryIO]:
    """The file, open.

    Raises:
        InputError: it is missing, a device or unreadable; and what is read in the context is not UTF-8.
    """
    check_regular(path)
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text, byte {error.start} is 0x{error.object[error.start]:02x}") from error
    except ValueError as error:  # a name with a zero byte
        raise InputError(f"{path}: {error}") from error


def decoded(file: BinaryIO) -> str:
    """The text of a UTF-8 file from where it is, a byte order mark removed."""
    return io.TextIOWrapper(file, encoding="utf-8-sig").read()


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, a byte order mark removed.

    Raises:
        InputError: the file is missing, unreadable or not UTF-8.
    """
    with reading(path) as file:
        return decoded(file)


def read_json(path: str | Path) -> Any:
    """The value in a JSON file.

    Raises:
        InputError: unreadable, empty or not JSON; the message has line and column.
    """
    return parse_json(read_text(path), str(path))


def parse_json(text: str, path: str) -> Any:
    """As ``read_json``, of the text of a file."""
    if not text.strip():
        raise InputError(f"{path}: is empty")
    return _parse(text, path)


def read_json_rows(path: str | Path) -> list[Any]:
    """The rows of a JSON lines file, or of a file that is one JSON list. Empty lines are skipped.

    Raises:
        InputError: unreadable, empty or not JSON; the message has line and column.
    """
    text = read_text(path)
    rows: list[Any]
    if text.lstrip().startswith("["):
        rows = _parse(text, str(path))
    else:
        rows = [_parse(line, str(path), number) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not rows:
        raise InputError(f"{path}: holds no rows")
    return rows


def _parse(text: str, name: str, line: int = 1) -> Any:
    """Decode JSON; ``line`` is the number that the first line of ``text`` has in file ``name``."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {line + error.lineno - 1} column {error.colno}"
        raise InputError(f"{name}: invalid JSON at {where}: {error.msg}") from error
    except RecursionError as error:
        raise InputError(f"{name}: JSON nested too deeply from line {line}") from error
    except MemoryError as error:
        raise InputError(f"{name}: {NO_MEMORY}") from error
    except ValueError as error:  # a number of thousands of digits
        raise InputError(f"{name}: invalid JSON from line {line}: {error}") from error


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
    """Errors begin with ``what``."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{what}: {error}") from error


def _same_file(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):
        return os.path.abspath(one) == os.path.abspath(other)


def write_text(path: str | Path, text: str) -> None:
    """Write a file atomically: a reader sees either the old content or the new.

    A symbolic link stays, and what it leads to is written. Devices and pipes, such as /dev/stdout, are written to
    directly. Lone surrogates are escaped.

    Raises:
        InputError: the folder cannot be made or the file cannot be written.
    """
    target = Path(path)
    try:
        if str(path).endswith(os.sep) or target.is_dir():
            raise InputError(f"{path}: is a folder; name a file")
        if target.is_char_device() or target.is_fifo():
            target.write_text(text, encoding="utf-8", errors="backslashreplace")
            return
        if str(path).startswith(OUTPUT_STREAMS):  # what is printed would be lost with the file that is replaced
            raise InputError(f"{path}: is neither a pipe nor a terminal here; name a file")
        if target.is_symlink():
            target = Path(os.path.realpath(target))
            if target.is_symlink():
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        target.parent.mkdir(parents=True, exist_ok=True)
        _replace(target, text)
        _sync_names(target.parent)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error


def _replace(path: Path, text: str) -> None:
    """Write another file and give it the name. Raises OSError; whatever is raised, no other file is left."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    # Not mkstemp, whose files are private: the umask decides who may read.
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # Ctrl-C, too
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as JSON, as ``write_text``."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_scores(path: str | Path, scores: Any, line: str) -> None:
    """Write scores as ``write_json``, and print ``line``, even if the file cannot be written."""
    try:
        write_json(path, scores)
    except InputError:
        with contextlib.suppress(OSError):  # it would hide that the file is not written
            print(line, flush=True)
        raise
    print(line)


def _sync_names(folder: Path) -> None:
    """Flush the names in a folder to disk, unless the folder or its file system does not allow it."""
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.EACCES):
            raise


def run(command: Callable[[list[str] | None], None], arguments: list[str] | None = None) -> int:
    """Run a command, which ends as ``ended`` says. Prints an InputError as one line on stderr.

    Returns the exit code: 0, 2 for bad input or want of memory, and those of ``ended``.
    """
    mend_streams()
    try:
        return ended(lambda: command(arguments))
    except (InputError, MemoryError) as error:
        print(f"error: {NO_MEMORY if isinstance(error, MemoryError) else printable(str(error))}", file=sys.stderr)
        return 2
    finally:
        flush_or_drop()


def ended(main: Callable[[], int | None]) -> int:
    """Run a command to the ends that are nobody's bug. Returns the exit code; other exceptions are raised.

    - A reader that has left, as in ``command | head``: 0.
    - A full disk, or a file of the user that cannot be read or written: one line on stderr, 2.
    - Ctrl-C: 130.
    """
    try:
        try:
            code = main()
        except SystemExit:  # argparse's, after --help
            sys.stdout.flush()
            raise
        sys.stdout.flush()  # here, where an error is handled
    except BrokenPipeError:
        if not _is_unread(1):
            raise
        flush_or_drop()
        return 0
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise MemoryError(str(error)) from error
        full = error.errno in STORAGE_ERRORS
        if not full and error.filename is None:  # not about a file of the user: a bug
            raise
        where = printable(f"{error.filename}: ") if error.filename is not None else ""
        advice = "make room or choose another folder" if full else "see that it can be read and written"
        print(f"error: {where}{error.strerror}; {advice}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        return 130
    return code or 0


def mend_streams() -> None:
    """A closed stream (``>&-``) becomes the null device; what the terminal's encoding lacks is printed escaped."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as Python does for stderr


def flush_or_drop() -> None:
    """Flush stdout. What it does not take is dropped: Python would try again at its end, in vain, and exit with 120."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stdout.flush()


def _is_unread(descriptor: int) -> bool:
    """Whether a file descriptor is a pipe whose reader has left."""
    poll = select.poll()
    poll.register(descriptor, 0)  # errors are reported without being asked for
    return any(event & select.POLLERR for _, event in poll.poll(0))


def printable(text: str) -> str:
    """``text`` for a terminal: without secrets, with escapes for control characters and marks of text direction."""
    shown = without_secrets(text)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def excerpt(value: Any, limit: int = 60) -> str:
    """The start of ``repr(value)`` for a message. Secrets are hidden first: half a secret is not recognized as one."""
    try:
        text = without_secrets(repr(value))
    except RecursionError:  # a value that could just be read may be too deep to be written
        return "nested too deep"
    return text if len(text) <= limit else f"{text[:limit]} …"


def first_few(names: list[Any], limit: int = 3) -> str:
    """The start of a list for a message: ``"'a', 'b', 'c' and 7 more"``."""
    shown = ", ".join(map(excerpt, names[:limit]))
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
