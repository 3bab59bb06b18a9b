"""The one error that reading or writing a checkpoint raises."""


class CheckpointError(ValueError):
    """A model that cannot be found or read; the message names the file, the tensor and the fix."""
