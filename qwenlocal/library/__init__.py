"""From a name to a verified file on this disk."""
