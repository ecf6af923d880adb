"""The terminal chat: input line, answers, slash commands and progress."""
