"""The slash commands: `table` lists them; the other modules carry them out, one a subject."""
