"""Builds the C side: one cffi extension, hast.ffi._hast, from hast/ffi/*.c."""

from setuptools import setup

setup(cffi_modules=["hast/ffi/build.py:ffibuilder"])
