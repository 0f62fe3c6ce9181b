"""The one exception for what a user can mend; anything else that is raised is a fault of ours, or of a library."""


class AtomLensError(ValueError):
    """One sentence that names the key, the value and what is allowed. The command line prints it and exits with 2."""
