"""Run the job of a command, and turn errors into short messages and exit codes.

Exit codes: 0 done, 1 internal error, 2 usage or input, 3 some cases failed, 128 + number of the stop signal (130
Ctrl-C, 143 SIGTERM, 129 SIGHUP, 138 SIGUSR1).
"""

from __future__ import annotations

import argparse
import errno
import os
import select
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from mfm_nnunet import terminal, workspace
from mfm_nnunet.errors import CasesFailedError, MFMError, StoppedError, is_out_of_memory
from mfm_nnunet.files import open_to_append, shown
from mfm_nnunet.version import __version__

LOG_FILE = "mfm_error.log"
MAX_MESSAGE_LINES = 5
_OUT_OF_MEMORY = "E_OOM  not enough memory. Plan with a smaller --memory-gb, free some memory, or take -device cpu."

_NO_ACCESS = ("E_PERMISSION", "Check its owner and mode, or choose another place.")
_IN_THE_WAY = ("E_EXISTS", "A file is where a folder is needed: choose another place, or move the file away.")
_PATH_ERRORS = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _NO_ACCESS),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST, errno.EISDIR), _IN_THE_WAY),
    errno.ENAMETOOLONG: ("E_CONFIG", "Give a shorter name."),
}
"""System errors that the user can fix: the code and the remedy."""


def run_command(job: Callable[[argparse.Namespace], None], arguments: argparse.Namespace) -> int:
    """Call ``job(arguments)`` and return the exit code. ``arguments`` needs ``workspace`` and ``debug``."""
    # Spinning idle OpenMP threads starve the data workers on few cores. Must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("MPLBACKEND", "Agg")
    with terminal.escaped_streams():
        return _run_command(job, arguments)


def _run_command(job: Callable[[argparse.Namespace], None], arguments: argparse.Namespace) -> int:
    terminal.configure_logging()
    if not arguments.debug:  # users cannot act on deprecations inside other libraries
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
    from mfm_nnunet.signals import end_despite_threads, raise_on_signal

    with raise_on_signal(is_command=True) as flag:
        try:
            job(arguments)
            sys.stdout.flush()
            return 0
        except BaseException as error:
            with flag.noted("this message"):
                exit_code = 1 if _is_stdout_closed(error) else _report(error, arguments)
            if isinstance(error, StoppedError):
                end_despite_threads(exit_code)
            return exit_code


def _report(error: BaseException, arguments: argparse.Namespace) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    exit_code, message = _classify(error)
    lines = terminal.one_message(message).splitlines() or [type(error).__name__]
    if arguments.debug:
        traceback.print_exception(type(error), error, error.__traceback__)
    elif len(lines) > MAX_MESSAGE_LINES:
        num_hidden = len(lines) - MAX_MESSAGE_LINES + 1
        place = _write_log(error, arguments)
        lines = [*lines[: MAX_MESSAGE_LINES - 1], f"  ... and {num_hidden} more lines, all in {place}"]
    elif exit_code == 1 or _unexpected(error):
        lines[-1] += f" (Details: {_write_log(error, arguments)}; or run with --debug.)"
    print(shown("\n".join(lines)), file=sys.stderr)
    return exit_code


def _classify(error: BaseException) -> tuple[int, str]:
    if isinstance(error, CasesFailedError):
        return 3, str(error)
    if isinstance(error, StoppedError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):  # raised by a library: a real Ctrl-C is a StoppedError
        return 130, "stopped by Ctrl-C."
    if isinstance(error, MFMError):
        return 2, str(error)
    if isinstance(error, FloatingPointError):
        return 1, str(error)
    if is_out_of_memory(error):
        return 2, _OUT_OF_MEMORY
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return 2, f"E_DISK_FULL  {error.filename or 'a file'}: the disk is full. Free some space and run again."
    if isinstance(error, OSError) and error.filename and error.errno in _PATH_ERRORS:
        code, advice = _PATH_ERRORS[error.errno]
        return 2, f"{code}  {error.filename}: {(error.strerror or '').lower()}. {advice}"
    first_line = (str(error).splitlines() or [""])[0]
    return 1, f"internal error: {type(error).__name__}: {first_line}"


def _unexpected(error: BaseException) -> list[str]:
    """Return the tracebacks of unexpected failures of single cases."""
    causes = (error, error.__cause__)
    failures = [failure for cause in causes if isinstance(cause, CasesFailedError) for failure in cause.failures]
    return [f"\n{failure.case}:\n{failure.details}" for failure in failures if failure.details]


def _write_log(error: BaseException, arguments: argparse.Namespace) -> str:
    """Append the whole message and traceback to the workspace's error log and return its path."""
    file = Path(arguments.workspace or workspace.DEFAULT) / LOG_FILE
    details = "".join([*traceback.format_exception(type(error), error, error.__traceback__), *_unexpected(error)])
    details, command = terminal.escaped(details), terminal.one_message(" ".join(sys.argv))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open_to_append(file) as handle:
            line = f"{time.strftime('%Y-%m-%d %H:%M:%S')}  mfm_nnunet {__version__}  {command}"
            handle.write(shown(f"{line}\n{details}\n").encode())
    except (OSError, MFMError):
        return "nowhere, the workspace cannot be written"
    return str(file)


def _is_stdout_closed(error: BaseException) -> bool:
    """Check if the reader of our output closed the pipe (``| head``), and if so redirect stdout to a sink.

    A broken pipe to a worker process looks the same and is an error, so stdout itself is tested.
    """
    if not isinstance(error, BrokenPipeError) or not hasattr(select, "poll"):
        return False
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True
