"""What goes wrong while the default model is fetched or made."""


class DefaultModelError(RuntimeError):
    """The default model cannot be had; the message says why and what to do."""
