"""Errors of the harness that the command line shows as one line, without a traceback."""


class HarnessError(Exception):
    """Something the user can put right."""


class ConfigError(HarnessError, ValueError):
    """A recipe, an override or a combination of options that cannot be run."""


class DataError(HarnessError, ValueError):
    """A data set that is missing, malformed or does not fit the configuration."""


class CheckpointError(HarnessError, RuntimeError):
    """A file of weights or of training state that cannot be used."""


class DivergedError(HarnessError, RuntimeError):
    """A loss that is no longer finite."""


class Stopped(HarnessError):
    """The run was asked to stop by a signal, and wrote a checkpoint."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum
