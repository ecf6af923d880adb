"""Messages in, events out: the one path from a question to its answer, for every user interface."""
