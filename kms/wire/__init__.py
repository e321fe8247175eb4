"""The protocol as data: messages and framing. No trio, no sockets, no files."""
