"""The two kinds of failure a command can end with, each one clear message and an exit status."""


class RopewalkError(Exception):
    """Something failed that the user did not get wrong: a full disk, a NaN loss. Exit status 1."""

    exit_code = 1


class UserError(RopewalkError):
    """The user's input is wrong; the message says where and what to do. Exit status 2."""

    exit_code = 2
