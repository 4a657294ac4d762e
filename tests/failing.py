"""Processes that die, and disks that get full, at any call that changes files."""

import errno
import os
from contextlib import ExitStack, contextmanager, suppress
from unittest.mock import patch

CALLS = ("fsync", "replace", "rename", "unlink", "mkdir", "rmdir")
FULL = OSError(errno.ENOSPC, "No space left on device")


class Killed(BaseException):
    """Stands for SIGKILL: no handler of errors catches it."""


@contextmanager
def failing_from(number, error):
    """Let the `number`th call that changes files and all after it raise an error.

    Where nobody handles the error it ends the block.
    """
    calls = 0

    def failing(function):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls >= number:
                raise error
            return function(*arguments, **options)

        return call

    with ExitStack() as patches:
        for name in CALLS:
            patches.enter_context(patch.object(os, name, failing(getattr(os, name))))
        with suppress(type(error)):
            yield
