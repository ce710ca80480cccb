"""The version, in a module of its own: packaging and every report read it."""

__version__ = '0.1.0'
