"""Errors that a user can fix, each with a stable code.

A message states the problem, the file or setting, the reason, and the remedy. Each error is a :class:`ValueError`, so
callers of the Python API catch one type. The commands print the message without traceback and exit with 2 (or 3).
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


class MFMError(ValueError):
    """An error that the user can fix.

    ``code`` is one of the codes in ``documentation/reference/errors.md``, e.g. ``E_GZIP_TRUNCATED``.
    """

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        self.message = message
        super().__init__(f"{code}  {message}")

    def __reduce__(self) -> tuple[type[MFMError], tuple[str, str]]:
        # Pickling between processes: the default would call __init__ with one argument.
        return (type(self), (self.code, self.message))


OUT_OF_MEMORY_WORDS = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "STATUS_ALLOC_FAILED",
    "is killed by signal: Killed",
)
OUT_OF_SHARED_MEMORY_WORDS = ("out of shared memory", "allocate shared memory", "write to file </torch_")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that main, GPU or shared memory ran out.

    torch has an exception type for GPU memory only; other RuntimeErrors are recognised by their text.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    words = (*OUT_OF_MEMORY_WORDS, *OUT_OF_SHARED_MEMORY_WORDS)
    return isinstance(error, RuntimeError) and any(text in str(error) for text in words)


def unreadable(file: str | os.PathLike[str], error: OSError) -> MFMError:
    """Return the error (E_NOT_FOUND, E_PERMISSION) for a file that cannot be opened."""
    code = "E_PERMISSION" if error.errno in (errno.EACCES, errno.EPERM) else "E_NOT_FOUND"
    reason = error.strerror or error
    return MFMError(code, f"{os.fspath(file)}: cannot be read ({reason}). Check the path and its permissions.")


@dataclass(frozen=True)
class CaseFailure:
    """A case that was skipped: its name, the error code and the reason."""

    case: str
    code: str
    reason: str
    details: str = ""
    """Traceback of an unexpected error, for the log; never on the console."""

    def __str__(self) -> str:
        return f"{self.case}: {self.code}  {self.reason}"


class CasesFailedError(MFMError):
    """Error after some cases failed and the others were done (exit code 3).

    ``failures`` lists them with their reasons. ``noun`` names what failed, if not cases.
    """

    def __init__(self, failures: list[CaseFailure], num_cases: int, noun: str = "cases") -> None:
        self.failures = failures
        self.num_cases = num_cases
        self.noun = noun
        lines = "\n".join(f"  {failure}" for failure in failures)
        others = "the others are done" if len(failures) < num_cases else "so nothing is done"
        super().__init__("E_CASES_FAILED", f"{len(failures)} of {num_cases} {noun} failed, {others}:\n{lines}")

    def __reduce__(self) -> tuple[type[MFMError], tuple]:
        return (type(self), (self.failures, self.num_cases, self.noun))


def dataset_refused(name: str, failures: list[CaseFailure], num_cases: int, what_for: str) -> MFMError:
    """Return the error for a labelled dataset with bad cases; ``what_for`` follows "cannot be used" in the message."""
    shown = "\n".join(f"  {failure}" for failure in failures[:20])
    more = f"\n  ... and {len(failures) - 20} more" if len(failures) > 20 else ""
    code = failures[0].code if len({failure.code for failure in failures}) == 1 else "E_FORMAT"
    return MFMError(
        code,
        f"{name}: {len(failures)} of {num_cases} labelled cases cannot be used{what_for}. Repair or remove them:\n"
        f"{shown}{more}",
    )


@contextlib.contextmanager
def about(file: str | os.PathLike[str]) -> Iterator[None]:
    """Prefix an MFMError raised inside with the name of ``file``, unless its message contains it."""
    try:
        yield
    except MFMError as error:
        if str(file) in error.message:
            raise
        raise MFMError(error.code, f"{file}: {error.message}") from error


class StoppedError(BaseException):
    """Exit after a stop signal; ``exit_code`` is 128 + its number, e.g. 130 (Ctrl-C) or 143 (SIGTERM).

    Like KeyboardInterrupt it is not an Exception: it can occur anywhere, and code that catches every error of a reader
    or of a single case must not mistake it for a damaged file.
    """

    def __init__(self, exit_code: int, message: str) -> None:
        self.exit_code = exit_code
        super().__init__(message)


def nearest(name: str, legal: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: the nearest legal one, else all of them."""
    names = sorted(legal)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"Did you mean '{close[0]}'?"
    return "Known: " + ", ".join(names) + "." if names else "There is none here."


@contextlib.contextmanager
def report_foreign_state(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Raise MFMError (E_MODEL_CORRUPT) if a state does not fit the network and optimizer that load it."""
    try:
        yield
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise MFMError(
            "E_MODEL_CORRUPT",
            f"{os.fspath(folder)}: the saved state belongs to another network or task ({reason}). Restore the "
            "resume.pth of this run, or move the folder away and start again.",
        ) from error
