"""The parts of ``bench/shape.py``: each is one run with a report of its own."""
