"""One door to disk: files and folders that are whole or absent, sealed, locked, and read with suspicion."""
