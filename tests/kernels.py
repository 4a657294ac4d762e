"""Kernels that are forked from one process, which has loaded the libraries already.

Each of some thirty notebooks would load torch, Matplotlib and IPython again: 2.4
seconds of a processor.
"""

import multiprocessing
import os
from threading import Thread

from jupyter_client.provisioning import local_provisioner

FORKS = multiprocessing.get_context("forkserver")
LOADED = ["ipywidgets", "matplotlib_inline.backend_inline", "glassgpt.figures"]


def end_with(parent):
    """Wait until a process has ended, be it killed, and end, too."""
    parent.join()
    os._exit(1)


class ForkedKernel(FORKS.Process):
    """A Python kernel, with what jupyter_client asks of a `subprocess.Popen`."""

    stdin = stdout = stderr = None

    def __init__(self, command, cwd, env, **_):
        super().__init__()
        self.how = command[command.index("-f") :], cwd, env
        self.started = FORKS.Event()
        self.start()
        self.started.wait()

    def run(self):
        from ipykernel.kernelapp import launch_new_instance

        options, cwd, env = self.how
        os.setsid()  # signals for the kernel and what it starts go to this group
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(env)
        self.started.set()
        parent = multiprocessing.parent_process()
        Thread(target=end_with, args=[parent], daemon=True).start()
        launch_new_instance(options)
        os._exit(0)  # without a wait for the threads of the notebook

    def poll(self):
        return self.exitcode

    def wait(self):
        self.join()
        return self.exitcode


def fork_kernels():
    """Let all kernels that this process starts be forked."""
    FORKS.set_forkserver_preload(["ipykernel.kernelapp", "glassgpt", *LOADED])
    local_provisioner.launch_kernel = ForkedKernel
