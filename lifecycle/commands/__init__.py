"""The command line, one module a command; `lifecycle.cli` is the table of them."""
