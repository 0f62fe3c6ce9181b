"""All access to disk: files and folders that are whole or absent, sealed, locked, and checked when read."""
