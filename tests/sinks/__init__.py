"""Sinks against real sockets, files and servers. `conformance` holds what every sink must do."""
