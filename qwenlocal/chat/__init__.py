"""Messages in, events out: the turn is written once, here, for every face of the program."""
