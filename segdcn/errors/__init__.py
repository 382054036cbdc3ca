"""What went wrong, and whose it is: the user's to mend, a fault of the moment, or a bug of ours."""

import errno

_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "insufficient memory")
_LASTING = {
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EINVAL,  # of a place within a file that its own, damaged bytes name
}


class UserError(ValueError):
    """What whoever called can mend: a setting, an argument, a file. The message is one line: what, where, what to do.

    A command prints it as that line, and a sweep does not try such a job again. Everything else that is raised is a
    fault of the moment or a bug of ours.
    """

    def __init__(self, message: str = "") -> None:
        # a DataLoader raises its worker's error anew with the worker's whole traceback as the message
        super().__init__(message.strip().rpartition(f"{type(self).__name__}: ")[2] if "\n" in message else message)


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that is not where it was said to be."""


class MissingPackageError(UserError, ImportError):
    """An optional package that is not installed."""


def is_lasting(error: OSError) -> bool:
    """Whether a path is missing, forbidden or none at all, or a file damaged: another moment it would be the same.

    Without a number it is not the system's error but one that a reader makes of what a file holds.
    """
    return error.errno in _LASTING or (error.errno is None and not isinstance(error, ConnectionError | TimeoutError))


def is_passing(error: BaseException) -> bool:
    """Whether a disk or a network fails at the moment, whatever was to be read: no reason to call a file damaged."""
    return isinstance(error, OSError) and not is_lasting(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory did not suffice; torch's words for it differ by device."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in _NO_MEMORY)


def one_line(error: BaseException) -> str:
    """What an error says, in one line; its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """As ``one_line``, of a library whose messages go on for paragraphs of advice."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
