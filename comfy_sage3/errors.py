"""Errors a person can act on: each message is one sentence that says what to do."""


class Sage3Error(Exception):
    """Base of every error this package raises on purpose; the command line prints it without a traceback."""


class InputError(Sage3Error, ValueError):
    """An argument, tensor or option that cannot be used as it is."""


class WeightsError(Sage3Error):
    """A weight file that is missing, truncated, altered or not safetensors."""


class KernelError(Sage3Error):
    """A compiled kernel that is needed and not there, or that failed where a failure is to stop the run."""


class EngineError(Sage3Error):
    """A generation back end (diffusers, a ComfyUI server) that is absent, unreachable or failed."""
