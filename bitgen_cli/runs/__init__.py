"""One module per verb: what a subcommand does, from its inputs to its files."""
