"""Kernels that are forked from one process, which has loaded the libraries already.

Each of some thirty notebooks would load torch, Matplotlib and IPython again: 2.4
seconds of a processor. OMP_NUM_THREADS=1 makes it safe: libraries start no threads.
"""

import atexit
import functools
import multiprocessing
import os
import subprocess
import sys
from threading import Thread

from jupyter_client.provisioning import local_provisioner

FORKS = multiprocessing.get_context("forkserver")
LOADED = ["ipykernel.kernelapp", "ipywidgets", "matplotlib_inline.backend_inline"]


@functools.cache
def plain_path():
    """Where a new Python looks for modules: not in tests/, as pytest does."""
    command = [sys.executable, "-c", "import sys; print(*sys.path[1:], sep='\\n')"]
    return subprocess.check_output(command, text=True).splitlines()


def end_with(parent):
    """Wait until a process has ended, be it killed, and end, too."""
    parent.join()
    os._exit(1)


class ForkedKernel(FORKS.Process):
    """A Python kernel, with what jupyter_client asks of a `subprocess.Popen`."""

    stdin = stdout = stderr = None

    def __init__(self, command, cwd, env, **_):
        super().__init__()
        self.how = command[command.index("-f") :], cwd, env, plain_path()
        self.started = FORKS.Event()
        self.start()
        while not self.started.wait(0.1):
            if self.exitcode is not None:
                raise RuntimeError(f"a kernel ended with {self.exitcode} at its start")

    def run(self):
        from ipykernel.kernelapp import launch_new_instance

        options, cwd, env, sys.path[:] = self.how
        os.setsid()  # signals for the kernel and what it starts go to this group
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(env)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):  # of the process; the client has those of the notebook
            os.dup2(nowhere, stream)
        self.started.set()
        parent = multiprocessing.parent_process()
        Thread(target=end_with, args=[parent], daemon=True).start()
        launch_new_instance(options)
        atexit._run_exitfuncs()  # temporary folders go
        os._exit(0)  # without a wait for the threads of the notebook

    def poll(self):
        return self.exitcode

    def wait(self):
        self.join()
        return self.exitcode

    def send_signal(self, number):
        if self.exitcode is None:
            os.kill(self.pid, number)


def fork_kernels():
    """Let all kernels that this process starts be forked."""
    FORKS.set_forkserver_preload([*LOADED, "glassgpt", "forked_kernels"])
    local_provisioner.launch_kernel = ForkedKernel
