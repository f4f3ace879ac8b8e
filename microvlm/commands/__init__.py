"""Commands of the command line that do their own input and output."""
