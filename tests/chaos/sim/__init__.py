"""A deterministic simulation of two whole nodes. One seed is one history; see tests/chaos/sim/world.py."""
