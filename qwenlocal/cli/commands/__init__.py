"""One module per command; `cli.app` imports it when the command is called."""
