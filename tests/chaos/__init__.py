"""Hunters of histories that lose data."""
