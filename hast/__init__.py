"""Highly available block storage for two machines, wire- and disk-compatible with FreeBSD's HAST."""

__version__ = "0.1.0"
