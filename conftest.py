"""nbval runs cells as Jupyter does, so that a `;` at the end hides a value."""

from nbval.kernel import RunningKernel


def execute_as_jupyter(self, code, allow_stdin=None):
    """As nbval's own, but in the history, where IPython looks for the `;`."""
    return self.kc.execute(code, allow_stdin=allow_stdin, stop_on_error=False)


RunningKernel.execute_cell_input = execute_as_jupyter
