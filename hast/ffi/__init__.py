"""The C side of hast: pumps, rings, the sequencer and the hot formats, reached through cffi."""
