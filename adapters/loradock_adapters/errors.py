"""The root of every error that Loradock raises on purpose.

    LoradockError                    exit code 1, HTTP 500
    ├── UsageError                   exit code 2: the command line or a config file is wrong
    ├── NotFoundError                a name, version or path that is not there
    └── (each package draws its own tree below these at the top of its module)

An error's message says what is wrong, with both numbers where there are two, and what to do next. The command line prints
it without a traceback; the HTTP edge maps the *type* to a status code. Nothing recognises an error by its text.
"""


class LoradockError(Exception):
    """Anything that Loradock can explain. `code` is stable and machine-readable, the message is for people."""

    code: str = "loradock_error"
    exit_code: int = 1


class UsageError(LoradockError):
    """The command line, or a file that the user wrote, is wrong."""

    code = "usage"
    exit_code = 2


class NotFoundError(LoradockError):
    """Something that was named does not exist."""

    code = "not_found"
