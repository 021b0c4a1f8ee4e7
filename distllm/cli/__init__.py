"""The command line: one file per command. Parses, builds a config, calls one function. Loads nothing big."""
