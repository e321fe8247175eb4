"""The pure part: formats, keys, states and rules. No trio, no sockets, no files, no clock of its own."""
