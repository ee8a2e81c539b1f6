"""pgoutput against real servers, and the frames that the unit tests feed (`pgoutput.frames`)."""
