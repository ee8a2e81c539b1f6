"""Real servers for the tests and the bench: installed once, started on loopback, never left behind.

``scripts/servers install`` (``python -m servers install`` with ``tests`` on the path) downloads what is missing into a
cache outside the working tree; a test that needs a server which is not there fails with that command. Importable as
``servers`` because pytest's ``pythonpath`` holds ``tests``; a script outside of pytest puts ``tests`` on its path.

What every server here promises:

* it listens on 127.0.0.1 alone, on a port below the kernel's range of ephemeral ports (``ports``), so that nothing can
  take its port while it is down;
* ``start`` returns when it can be used, ``kill`` is SIGKILL of everything that belongs to it, and a ``start`` after
  ``kill`` or ``stop`` finds the same folder and port;
* it dies, and its folder goes, when the process that started it dies, however that happens (``reaper``).
"""
