"""The exception for everything that a user can fix; any other exception is a bug of ours or of a library."""


class AtomLensError(ValueError):
    """One sentence that names the key, the value and what is allowed. The command line prints it and exits with 2."""
