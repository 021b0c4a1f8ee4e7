"""The exceptions that users can meet. A leaf: imports nothing of distllm.

`UserError` and its kin are one clear line (value, limit, what to change) and end a command with exit code 2.
`CommError` is fatal for the whole job: peers may be waiting in the same collective.
"""


class DistllmError(Exception):
    """Base of everything that distllm raises on purpose."""


class UserError(DistllmError, ValueError):
    """Something that the user wrote or supplied cannot work; the text says what to change."""


class ConfigError(UserError):
    """An engine option is out of its bounds or contradicts another."""


class LayoutError(UserError):
    """tp × pp × dp does not fit the world, the heads or the layers."""


class LaunchError(UserError):
    """The launcher and the MPI library do not form the world that was asked for."""


class CheckpointError(UserError):
    """A model folder or an engine folder is missing, damaged or not understood."""


class RequestError(UserError):
    """A prompt or a sampling parameter is refused; no other request is harmed."""


class CommError(DistllmError):
    """A collective failed: a peer is gone, the communicator is closed, or the transport broke."""


class CommTimeout(CommError):
    """A wait passed its deadline; the text names the operation, the communicator and the seconds."""
