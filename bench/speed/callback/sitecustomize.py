"""Read by the interpreter of the product before anything else: with this folder on PYTHONPATH, ``type: blackhole`` is
`timed_sink.TimedBlackhole`. Everything else is the product as it is."""

from spillway.sinks import CLASSES

CLASSES["blackhole"] = "timed_sink:TimedBlackhole"
