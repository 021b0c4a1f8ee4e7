"""What an operator runs beside serving. Returns data; the command line prints it."""
