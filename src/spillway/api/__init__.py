"""The HTTP side of a running process: health, metrics and the operations of the command line. See `app` and `guard`."""
