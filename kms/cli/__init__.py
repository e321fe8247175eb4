"""The three commands. The only code that prints or exits."""
